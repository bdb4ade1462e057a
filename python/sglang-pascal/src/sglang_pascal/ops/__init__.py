"""The operations that SGLang's layers call: one thin function per kernel, on torch tensors.

On CUDA tensors each operation starts our kernel on torch's current stream, without waiting and without reading anything
back, so it can be captured in a CUDA graph (load the kernels first: call each once, or use `kernels.driver.preload`).
On CPU tensors it computes the same through `reference.py`, slowly and exactly. A tensor of a wrong type, shape or
layout raises OperationError, which names it; nothing is converted silently.

weights      pack, pack_into, unpack, dequantize                 PackedWeight: a quantised matrix in the kernels' layout
activations  quantize, rms_norm, rms_norm_quantize,              Activations: int8 with a scale per 32
             silu_mul_quantize
matmul       matmul, matmul_half                                 Activations x PackedWeight, any number of rows
kv_cache     rope_and_store                                      KvPool: keys and values of a layer
attention    attention_decode, attention_prefill                 Sequences: which slots belong to which request
sampling     argmax, top_k_top_p_filter_
"""
