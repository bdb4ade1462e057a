"""Paged attention in plain torch: SGLang's backend `pascal`, and the reference for the CUDA kernels.

paged    the arithmetic and the plan of a prefill, on tensors only
backend  SGLang's interface over it
"""
