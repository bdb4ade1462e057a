"""What an instance is planned on: the GPU as NVML shows it, its profile where NVML fails, the host without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pascaline.configuration import load
from pascaline.errors import ConfigurationError, DoesNotFitError, MissingError
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from pascaline.serving import task
from pascaline.serving.task import place_instance, plan_instance
from support.planning import LLAMA_2_7B

CAPTURES = Path(__file__).parents[3] / "tests/gpu/captures"


def test_an_engine_never_starts_with_an_empty_key(tmp_path: Path) -> None:
    """The file was replaced after the settings were checked, and is read again for the next start."""
    file = tmp_path / "key"
    with pytest.raises(ConfigurationError, match=f"no key in {file}: .*No such file"):
        task._api_key(file)
    file.write_text("")
    with pytest.raises(ConfigurationError, match=f"no key in {file}: is empty, must hold one key"):
        task._api_key(file)
    file.write_text("sk-task-0123456789\n")
    assert task._api_key(file) == "sk-task-0123456789"
    assert task._api_key(None) is None


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a scenario what NVML answers in this process's children."""

    def use(scenario: Path) -> None:
        for name, value in fake_nvml_environment(scenario).items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def p4_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's folder shows one P4."""
    monkeypatch.setattr(task, "installed_models", lambda: ["Tesla P4"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def settings(**values: Any) -> Any:
    return load({"card": "tesla-p4"} | values, environment={}, check_host=False)


class TestPlace:
    @pytest.fixture(autouse=True)
    def _all_gpus_visible(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def test_the_gpu_as_nvml_shows_it(self, nvml: Any) -> None:
        nvml(CAPTURES / "tesla-p4.nvml")
        found = place_instance(settings(device="cuda"))
        assert (found.card.name, found.memory.total_bytes, found.notes) == ("tesla-p4", 8053063680, ())
        assert [gpu.uuid for gpu in found.gpus] == ["GPU-00000000-0000-4000-8000-000000000004"]

    def test_a_gpu_without_a_profile(self, nvml: Any) -> None:
        nvml(CAPTURES / "nvidia-h100-80gb-hbm3.nvml")
        found = place_instance(settings(device="cuda"))
        assert found.card.name == found.memory.name == "H100 80GB HBM3"
        assert found.card.memory_bytes == found.memory.total_bytes

    @pytest.mark.usefixtures("p4_host")
    def test_the_profile_stands_in_where_nvml_fails(self, nvml: Any, tmp_path: Path) -> None:
        write_scenario(tmp_path / "none.nvml", "[library]\nnvmlSystemGetDriverVersion = 580.1\n")
        nvml(tmp_path / "none.nvml")
        found = place_instance(settings(device="cuda"))
        assert (found.card.name, found.memory.total_bytes, found.memory.used_bytes) == (
            "tesla-p4",
            found.card.memory_bytes,
            0,
        )
        assert found.notes == (
            "planned as if nothing else used the card: NVML shows no GPU: NVML counts no GPU; name a card (--card) to "
            "plan without it",
        )

    def test_neither_profile_nor_nvml(self, nvml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_scenario(tmp_path / "none.nvml", "[library]\nnvmlSystemGetDriverVersion = 580.1\n")
        nvml(tmp_path / "none.nvml")
        monkeypatch.setattr(task, "installed_models", lambda: ["a card without a profile"])
        with pytest.raises(MissingError):
            place_instance(load({"device": "cuda"}, environment={}, check_host=False))

    def test_the_host(self) -> None:
        found = place_instance(settings(device="cpu"))
        assert (found.card.name, found.memory.name, found.notes) == ("cpu", "cpu", ())
        assert found.variables == {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.usefixtures("p4_host")
class TestPlanInstance:
    def test_what_others_use_is_missing(self, nvml: Any) -> None:
        """The recorded P4 is under load: 5.6 GiB of it are taken, and a 7B model has no place beside them."""
        nvml(CAPTURES / "tesla-p4.nvml")
        with pytest.raises(DoesNotFitError) as caught:
            plan_instance(settings(), LLAMA_2_7B)
        first, _, rest = str(caught.value).partition("\n")
        assert first.startswith("the plan does not fit: it needs 6.78 GiB, the card has 7.50 GiB, of which others use ")
        assert "x used by others" in rest

    def test_overcommit_is_allowed_by_name(self, nvml: Any) -> None:
        nvml(CAPTURES / "tesla-p4.nvml")
        assert not plan_instance(settings(allow_overcommit=True), LLAMA_2_7B).fits
