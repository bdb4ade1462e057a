"""Quantised execution: GGUF weights stay quantised in device memory, in the layout that the kernels read.

storage   the type in which a tensor is held: its own, a lossless equivalent, or float16
convert   rows of a type without kernels -> rows of a type that has them, without loss
matrix    one weight matrix in memory: load rows, multiply, look rows up
staging   host rows -> device, in bounded chunks, repacked on arrival
weight_table  the content of a GGUF file, under the names that SGLang's models use
handover  passes activations that a norm has quantised to the layer that multiplies them
precision  the number of bits of the activations in products
method    SGLang's linear and embedding methods for these matrices
binding   gives the file's matrices to the layers of a model
config    SGLang's quantisation configuration `gguf`
nf4       SGLang's quantisation configuration `bitsandbytes`
progress  shows how far loading is, on a terminal or in a log
"""
