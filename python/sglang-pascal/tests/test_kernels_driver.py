"""Which file a card gets, and what is said when it cannot be used."""

from __future__ import annotations

import pytest
import torch
from sglang_pascal.kernels import driver
from sglang_pascal.kernels.arguments import ArgMax
from sglang_pascal.kernels.build import MODULES
from sglang_pascal.kernels.driver import KernelError, target_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("capability", "target"),
    [((6, 0), ("60", "cubin")), ((6, 1), ("61", "cubin")), ((6, 2), ("61", "cubin")), ((9, 0), ("61", "ptx"))],
)
def test_pascal_gets_machine_code_and_newer_cards_ptx(capability, target):
    assert target_of(capability) == target


def test_the_p100_path_can_be_tried_on_a_newer_card(monkeypatch):
    monkeypatch.setenv(driver.ARCHITECTURE_VARIABLE, "60")
    assert target_of((8, 0)) == ("60", "ptx")


def test_an_unknown_architecture_is_refused(monkeypatch):
    monkeypatch.setenv(driver.ARCHITECTURE_VARIABLE, "70")
    with pytest.raises(KernelError) as caught:
        target_of((8, 0))
    assert str(caught.value) == "SGLANG_PASCAL_ARCHITECTURE is '70'; allowed: 60, 61; unset it to use 61"


def test_a_card_older_than_pascal_is_refused():
    with pytest.raises(KernelError) as caught:
        target_of((5, 2))
    assert str(caught.value) == (
        "compute capability 5.2 is older than Pascal: the kernels need 6.0 or newer; "
        "choose another card with CUDA_VISIBLE_DEVICES"
    )


def test_a_machine_without_driver_is_told_to_install_it(monkeypatch):
    monkeypatch.setattr(driver, "DRIVER_LIBRARY", "libcuda-that-is-not-there.so.1")
    driver._cuda.cache_clear()
    try:
        with pytest.raises(KernelError) as caught:
            driver.describe(1)
    finally:
        driver._cuda.cache_clear()
    assert str(caught.value) == (
        "libcuda-that-is-not-there.so.1 cannot be loaded: libcuda-that-is-not-there.so.1: "
        "cannot open shared object file: No such file or directory; install NVIDIA's driver"
    )


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    def test_ptx_that_the_driver_refuses_is_reported_with_its_log(self, monkeypatch):
        monkeypatch.setattr(driver, "artifact", lambda *_: b".version 7.8\n.target sm_61\n.address_size 64\nnonsense")
        driver._module.cache_clear()
        with pytest.raises(KernelError) as caught:
            driver.preload(["sampling"], 0)
        driver._module.cache_clear()
        assert str(caught.value).startswith("the driver refuses the ptx of sampling for compute capability ")
        assert "CUDA_ERROR_INVALID_PTX" in str(caught.value)
        assert str(caught.value).endswith("; install a driver of the 470 to 580 series")
        assert "\n" not in str(caught.value)

    def test_a_missing_kernel_is_named(self):
        with pytest.raises(KernelError) as caught:
            driver.kernel("sampling", "no_such_kernel", 32, 0)
        assert str(caught.value) == (
            "module sampling has no kernel no_such_kernel: CUDA error 500 (CUDA_ERROR_NOT_FOUND); reinstall sglang-pascal"
        )

    def test_a_launch_that_the_driver_refuses_is_reported_with_its_shapes(self):
        kernel = driver.kernel("sampling", "argmax", 1024, 0)
        with pytest.raises(KernelError) as caught:
            kernel.launch((0, 1, 1), ArgMax(logits=0, out=0, logits_are_half=0, vocabulary=0), "logits [0, 4]")
        assert str(caught.value) == (
            "kernel argmax failed to start: CUDA error 1 (CUDA_ERROR_INVALID_VALUE); grid (0, 1, 1), 1024 threads, "
            "logits [0, 4]; an earlier kernel may be the cause: run again with CUDA_LAUNCH_BLOCKING=1"
        )

    def test_every_module_loads(self):
        driver.preload(MODULES, 0)
