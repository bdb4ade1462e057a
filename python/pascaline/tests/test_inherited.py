"""An engine inherits what it needs, and nothing that may be secret."""

from __future__ import annotations

import pytest
from pascaline.inherited import inherited, is_inherited


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_CACHE_HOME"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"),
        *("SGLANG_PLATFORM", "TRITON_LIBCUDA_PATH", "TOKENIZERS_PARALLELISM", "GGML_CUDA_FORCE_MMQ", "CC"),
    ],
)
def test_what_an_engine_needs(name: str) -> None:
    assert is_inherited(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "GITHUB_TOKEN",
            "OPENAI_API_KEY",
            "PGPASSWORD",
        ),
        *("SGLANG_API_KEY", "NVIDIA_API_KEY", "TORCH_TOKEN", "CUDA_SECRET", "LLAMA_ARG_API_KEY"),
        *("NOTIFY_SOCKET", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "LISTEN_FDS", "JOURNAL_STREAM"),
        *("SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "PASCALINE_API_KEY_FILE", "http_proxy", "ANYTHING", ""),
    ],
)
def test_what_it_does_not(name: str) -> None:
    assert not is_inherited(name)


def test_values_are_kept() -> None:
    assert inherited({"PATH": "/bin", "HF_TOKEN": "hf_x", "LANG": ""}) == {"PATH": "/bin", "LANG": ""}
