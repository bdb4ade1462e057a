"""Paged attention behind SGLang's interface.

kernels_backend  uses our kernels: the default on CUDA
backend          in plain torch: the default on the CPU, and the reference for the other
paged            its arithmetic and the plan of a prefill, on tensors only
kv_pool          SGLang's pool with int8 storage
kv_types         adds types to SGLang's `--kv-cache-dtype`
"""
