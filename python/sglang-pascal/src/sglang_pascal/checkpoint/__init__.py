"""From a GGUF file to what SGLang loads: a folder with configuration and tokenizer, and a stream of named tensors.

gguf_file      the file itself: metadata, and every tensor's type, shape and bytes (memory-mapped)
acceptance     whether the file can be served as it describes itself
architectures  the supported architectures: tensor names, and what llama.cpp's converter changed in the values
config         metadata -> config.json and generation_config.json
tokenizer      metadata -> tokenizer.json and tokenizer_config.json
chat_template  metadata -> chat templates, each rendered once in a child process
prepare        writes all of that to a folder, atomically
weights        (Hugging Face name, tensor type, raw rows), with the converter's changes undone
dequantize     raw rows -> torch tensor: the only place that decides to dequantise at load
completeness   checks that every parameter of a loaded model got weights
loader         SGLang's model loader for `--load-format pascal_gguf`
"""
