"""Where the time of a running decode goes: kernels on a timeline, summed up and held against the card's roofline.

timeline   what was recorded: kernels with their times and, where known, their bytes
trace      torch's profiler traces (CPU, and every GPU that its CUPTI knows)
nvprof     databases of CUDA 11.8's nvprof, which still knows Pascal well
roofline   a timeline summed up: top kernels, kinds of work, achieved bandwidth
session    drives a decode on a running engine and records it
"""
