"""The CUDA kernels: sources (`*.cu`, `*.cuh`), how they are built, loaded and launched.

formats    the quantised types: bytes per block, planes of the device layout
build      NVRTC -> PTX -> ptxas -> cubin, with a cache; the kernels that a package carries prebuilt
arguments  the arguments of every kernel: one block each, compared with the source and the PTX
driver     load and launch through the CUDA driver API
static     what ptxas and nvdisasm report about each kernel, and the limits that it must keep
bounds     what the compiler made of each kernel, and estimates from it, for docs/kernels.md
"""
