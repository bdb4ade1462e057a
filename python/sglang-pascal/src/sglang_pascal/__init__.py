"""SGLang platform plugin for Pascal GPUs (compute capability 6.x) and for CPUs."""

__version__ = "0.1.0"
