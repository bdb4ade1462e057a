"""Serve language models on the NVIDIA GPUs that the frameworks dropped: plan, launch, supervise, monitor, diagnose."""

__version__ = "0.1.0"
