"""The variables that a program which we start inherits: those that it needs, and none that may hold a secret.

This process's environment may hold tokens, passwords and the service manager's addresses; an engine loads models and
plugins of others. What else an engine should get is named in the setting `environment`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = frozenset(
    {
        # The user, the language, the time.
        *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TZDIR", "LOCALE_ARCHIVE"),
        # Where programs, libraries and temporary files are; NixOS adds its own.
        *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "VIRTUAL_ENV", "NIX_LD", "NIX_LD_LIBRARY_PATH"),
        *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "HF_HOME"),
        # Triton compiles a file in C; glibc's allocator.
        *("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "LIBRARY_PATH", "GLIBC_TUNABLES"),
        # The simulated NVML of tests and demonstrations.
        "PASCALINE_FAKE_NVML",
    }
)
PREFIXES = (
    *("LC_", "PYTHON", "MALLOC_"),
    # The driver, its libraries, and communication between GPUs.
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "GLOO_"),
    # Threads and mathematics on the CPU.
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_"),
    # The engines, and what they are made of.
    *("SGLANG_", "SGL_", "GGML_", "TORCH", "PYTORCH_", "TRITON_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_"),
    # Stand-ins for an engine in tests.
    *("FAKE_ENGINE_", "STAND_IN_"),
)
_SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(?:API_?)?KEY)(?:_|$)")
"""Parts of a name that promise a secret."""


def inherited(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that an engine inherits."""
    return {name: value for name, value in environment.items() if is_inherited(name)}


def is_inherited(name: str) -> bool:
    """Whether an engine inherits the variable of this name."""
    return (name in NAMES or name.startswith(PREFIXES)) and not _SECRET.search(name)
