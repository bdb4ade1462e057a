"""Shows where the time of a running decode goes: a timeline of kernels, its sums, and the card's roofline beside them.

timeline   what was recorded: kernels with their times and, if known, their bytes
trace      traces of torch's profiler (CPU, and every GPU that its CUPTI knows)
nvprof     databases of CUDA 11.8's nvprof, which still supports Pascal
roofline   sums of a timeline: top kernels, kinds of work, achieved bandwidth
session    drives a decode on a running engine and records it
"""
