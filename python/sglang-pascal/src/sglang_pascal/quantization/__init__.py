"""Quantised execution: GGUF weights stay quantised in device memory, in the layout that the kernels read.

storage   which type a tensor is held in: its own, a lossless equivalent, or float16
convert   rows of a type without kernels -> rows of one that has them, without loss
matrix    one weight matrix in memory: load rows, multiply, look rows up
staging   host rows -> device, in bounded chunks, repacked on arrival
table     what a GGUF file holds, under the names that SGLang's models use
handover  activations that a norm has quantised already
precision  with how many bits activations are multiplied
method    SGLang's linear and embedding methods over it
binding    the layers of a model get the file's matrices
config    SGLang's quantisation configuration `gguf`
nf4       SGLang's quantisation configuration `bitsandbytes`
progress  how far loading is, on a terminal or in a log
"""
