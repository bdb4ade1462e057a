"""Every kernel that serving launched on a GPU exists for Pascal in the locked wheels: names recorded there, held here.

`benchmarks/kernel_names.py` records them. A new torch that lacks one, or a new operation without code for Pascal, fails.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import kernel_classes
from support.kernel_classes import Index, Match, classify, own_kernels, parts, plain, torch_index

RECORD = Path(__file__).parents[2] / "docs/results/kernel-names.json"

COPY = (
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}"
)
ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<4, %s, std::array<char*, 2ul> >(int, %s, std::array<char*, 2ul>)"
)


class TestParts:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (ELEMENTWISE % (COPY, COPY), ("vectorized_elementwise_kernel", {"direct_copy_kernel_cuda"})),
            (
                "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<c10::Half>, at::detail::Array<char*, 3>, "
                "4, TrivialOffsetCalculator<2, unsigned int> >(int)",
                ("unrolled_elementwise_kernel", {"CUDAFunctor_add"}),
            ),
            ("void at_cuda_detail::cub::DeviceScanKernel<int>(int)", ("DeviceScanKernel", set())),
            ("attention_combine", ("attention_combine", set())),
            (
                "void at_cuda_detail::cub::detail::scan::DeviceScanKernel<at_cuda_detail::cub::detail::scan::"
                "policy_hub<long, std::plus<long> >::Policy1000, long const*>(long const*)",
                ("DeviceScanKernel", set()),
            ),
        ],
    )
    def test_kernel_and_functors_are_told_from_types(self, name, expected):
        base, functors = parts(plain(name))
        assert (base, set(functors)) == expected

    def test_what_a_build_adds_is_left_out(self):
        older = "at::native::(anonymous namespace)::CatArrayBatchedCopy<int>(int)"
        newer = "void at::native::_GLOBAL__N__a1b2_8_Shape_cu_49f7391c::CatArrayBatchedCopy<int>(int)"
        assert plain(older) == plain(newer) == "at::native::CatArrayBatchedCopy<int>(int)"


class TestClasses:
    INDEX = Index(
        [ELEMENTWISE % (COPY, COPY), "void at::native::reduce_kernel<128, 4, at::native::MaxOps<float> >(int)"]
    )

    @pytest.mark.parametrize(
        ("name", "operators", "expected"),
        [
            ("attention_combine", [], Match("ours", "name")),
            (ELEMENTWISE % (COPY, COPY), ["aten::copy_"], Match("torch", "name")),
            (ELEMENTWISE.replace("<4", "<8") % (COPY, COPY), [], Match("torch", "parts")),
            ("void at::native::reduce_kernel<512, 1, at::native::MaxOps<float> >(int)", [], Match("torch", "parts")),
            ("void at::native::reduce_kernel<512, 1, at::native::NewOps<float> >(int)", [], Match("unknown", "")),
            ("void kgemm_4bit_inference_naive<__half, 128, 16>(int)", [], Match("bitsandbytes", "name")),
            ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", ["aten::addmm"], Match("cuBLAS", "operator")),
            ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", [], Match("unknown", "")),
            ("void pytorch_flash::flash_fwd_kernel<int>(int)", ["aten::mm"], Match("forbidden", "name")),
            ("triton_poi_fused_add_0", [], Match("forbidden", "name")),
            ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(int)", [], Match("forbidden", "name")),
        ],
    )
    def test_each_has_its_owner(self, name, operators, expected):
        assert classify(name, operators, self.INDEX, own_kernels()) == expected

    def test_the_locked_torch_has_the_kernels_of_every_step(self):
        index = torch_index()
        for base in (
            "CatArrayBatchedCopy",
            "index_elementwise_kernel",
            "vectorized_elementwise_kernel",
            "reduce_kernel",
        ):
            assert any(base == name for name, _ in index._parts), base
        assert index.find("void at::native::reduce_kernel<1, 1, at::native::NoSuchOps<float> >(int)") == ""


@pytest.fixture(scope="module")
def recorded():
    """Kernel -> what the record says of it."""
    if not RECORD.is_file():
        pytest.skip(f"{RECORD.name} is not recorded yet: benchmarks/kernel_names.py on a machine with a GPU writes it")
    return json.loads(RECORD.read_text())


class TestRecord:
    def test_every_kernel_has_code_for_pascal(self, recorded):
        owners = {
            name: classify(name, entry["operators"], torch_index(), own_kernels()).owner
            for name, entry in recorded["kernels"].items()
        }
        assert {name for name, owner in owners.items() if owner in ("unknown", "forbidden")} == set()
        assert {"ours", "torch"} <= set(owners.values())

    def test_no_recorded_step_multiplies_by_cublas(self, recorded):
        found = {
            name
            for name, entry in recorded["kernels"].items()
            if entry["recorded"]
            and classify(name, entry["operators"], torch_index(), own_kernels()).owner in ("cuBLAS", "unknown")
        }
        assert found == set()

    def test_what_bitsandbytes_launched_is_in_its_library(self, recorded):
        held = kernel_classes.bitsandbytes_names()
        if held is None:
            pytest.skip("bitsandbytes is not installed: pip install --no-deps bitsandbytes==0.49.2")
        launched = {
            parts(plain(name))[0]
            for name, entry in recorded["kernels"].items()
            if classify(name, entry["operators"], torch_index(), own_kernels()).owner == "bitsandbytes"
        }
        assert launched <= held

    def test_every_configuration_was_served(self, recorded):
        assert {
            name: each["state"] for name, each in recorded["configurations"].items() if each["state"] != "done"
        } == {}
