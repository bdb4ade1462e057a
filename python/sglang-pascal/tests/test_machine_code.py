"""Which GPU code a library holds, and what `sglang-pascal info` concludes from it for a card."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sglang_pascal import card_code
from sglang_pascal.card_code import (
    LibraryCode,
    bitsandbytes_library,
    check_torch,
    compiled_at_start,
    judge,
    loaded_libraries,
    what_runs,
)
from sglang_pascal.errors import UnsupportedVersionError
from sglang_pascal.kernels import build
from sglang_pascal.kernels.build import MODULES
from sglang_pascal.kernels.driver import KernelError
from sglang_pascal.machine_code import Code, MachineCodeError, architectures, kernel_names, parse_code

P4, P100, H200 = (6, 1), (6, 0), (9, 0)


def installed(package: str, file: str) -> Path:
    """A file of an installed package; none is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; run ./dev sync")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        pytest.skip(f"{path} is missing; run ./dev sync")
    return path


def cuobjdump(*arguments: str) -> str:
    """What the program of that name in Triton's wheel prints."""
    program = installed("triton", "backends/nvidia/bin/cuobjdump")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


class TestAgainstCuobjdump:
    """NVIDIA's own reader of the same files."""

    @pytest.mark.parametrize(
        ("package", "file"), [("torchvision", "_C.so"), ("nvidia", "cublas/lib/libcublas.so.12")], ids=lambda x: x[-12:]
    )
    def test_the_architectures_are_the_same(self, package, file):
        library = installed(package, file)
        listed = Counter()
        for option, kind in (("--list-elf", "sm"), ("--list-ptx", "compute")):
            numbers = re.findall(r"\.sm_(\d+)a?\.(?:cubin|ptx)$", cuobjdump(option, str(library)), re.MULTILINE)
            listed.update((kind, int(number)) for number in numbers)
        found = Counter()
        for code, count in architectures(library).items():
            found[code.kind, code.number] += count
        assert found == listed
        assert found["sm", 60] > 0

    def test_the_kernels_are_the_same(self):
        library = installed("torchvision", "_C.so")
        symbols = cuobjdump("--dump-elf-symbols", "--gpu-architecture", "sm_60", str(library))
        functions = set(re.findall(r"^STT_FUNC\s+\S+\s+STO_ENTRY\s+(\S+)", symbols, re.MULTILINE))
        names = kernel_names(library, [Code("sm", 60)])[Code("sm", 60)]
        assert names == functions
        assert len(names) == 46


class TestLockedPackages:
    """The claim that everything else rests on: the locked wheels have machine code for 6.0 and 6.1."""

    def test_torch_holds_as_much_for_pascal_as_for_any_other(self):
        counts = architectures(installed("torch", "lib/libtorch_cuda.so"))
        assert counts[Code("sm", 60)] == max(counts.values()) > 300

    @pytest.mark.parametrize("file", ["libcublas.so.12", "libcublasLt.so.12"])
    def test_so_does_cublas(self, file):
        library = installed("nvidia", f"cublas/lib/{file}")
        assert [judge("cuBLAS", library, card).runs for card in (P100, P4)] == ["sm_60", "sm_61"]

    def test_bitsandbytes_has_what_6_0_runs(self):
        library = bitsandbytes_library("12.6")
        if library is None:
            pytest.skip("bitsandbytes is not installed: pip install --no-deps bitsandbytes==0.49.2")
        assert judge("bitsandbytes", library, P4).runs == "sm_60"


class TestCode:
    @pytest.mark.parametrize(
        ("name", "cards"),
        [
            ("sm_60", [P100, P4]),
            ("sm_61", [P4]),
            ("sm_50", []),
            ("sm_70", []),
            ("sm_90", [H200]),
            ("sm_90a", [H200]),
            ("sm_80", []),
            ("compute_50", [P100, P4, H200]),
            ("compute_61", [P4, H200]),
            ("compute_90", [H200]),
        ],
    )
    def test_it_runs_on(self, name, cards):
        code = parse_code(name)
        assert str(code) == name
        assert [card for card in (P100, P4, H200) if code.runs_on(card)] == cards

    @pytest.mark.parametrize("word", ["", "sm_", "gfx90a", "sm_x", "6.1"])
    def test_another_word_is_no_code(self, word):
        assert parse_code(word) is None


def entry(kind: int, number: int, payload: bytes, flags: int = 0, packed: int = 0) -> bytes:
    """One entry of a container, as nvcc's fatbinary writes it."""
    return (
        struct.pack("<HHIQIIHHIIIQQQ", kind, 257, 64, len(payload), packed, 0, 7, 1, number, 0, 0, flags, 0, 0)
        + payload
    )


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def cubin(*kernels: str) -> bytes:
    """The beginning of a cubin: header, section names, and the next table, which begins with an empty string."""
    names = b"".join(b"\0.text." + name.encode() for name in kernels)
    return b"\x7fELF" + bytes(60) + b"\0.shstrtab\0.strtab" + names + b"\0\0.shstrtab\0"


def library_of(folder: Path, code: bytes, name: bytes = b".nv_fatbin") -> Path:
    """A shared library of one section that holds this."""
    names = b"\0.shstrtab\0" + name + b"\0"
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 40, 64)
    struct.pack_into("<HHH", header, 58, 64, 3, 1)
    start = 64 + 3 * 64
    sections = [(0, 0, 0, 0, 0, 0), (1, 3, 0, 0, start, len(names)), (11, 1, 0, 0, start + len(names), len(code))]
    table = b"".join(struct.pack("<IIQQQQ", *section).ljust(64, b"\0") for section in sections)
    path = folder / "library.so"
    path.write_bytes(bytes(header) + table + names + code)
    return path


class TestReading:
    def test_entries_of_all_containers_are_counted_and_padding_is_passed_over(self, tmp_path):
        first = container(entry(2, 60, cubin("a")), entry(1, 90, b"ptx"), entry(2, 90, cubin("a"), flags=0x100000))
        path = library_of(tmp_path, first + bytes(5) + container(entry(2, 60, cubin("b")), entry(8, 60, b"options")))
        assert {str(code): count for code, count in architectures(path).items()} == {
            "sm_60": 2,
            "compute_90": 1,
            "sm_90a": 1,
        }
        assert kernel_names(path, [Code("sm", 60)]) == {Code("sm", 60): {"a", "b"}}

    def test_packed_code_is_unpacked_as_far_as_its_names(self, tmp_path):
        plain = cubin("first_kernel", "second_kernel")
        head = plain[:20]
        # Literals, a match that overlaps what it appends (zeros), more literals; then rubbish that is never read.
        overlap = plain[20:64]
        assert overlap == bytes(44)
        packed = bytes([0xFF, 5]) + head + struct.pack("<H", 1) + bytes([44 - 19])
        rest = plain[64:]
        packed += bytes([0xF0, len(rest) - 15]) + rest
        path = library_of(tmp_path, container(entry(2, 61, packed, flags=0x2000)))
        assert kernel_names(path, [Code("sm", 61)]) == {Code("sm", 61): {"first_kernel", "second_kernel"}}

    def test_a_library_without_gpu_code_has_none(self, tmp_path):
        assert architectures(library_of(tmp_path, b"anything", name=b".rodata")) == {}

    def test_a_replaced_file_is_read_again(self, tmp_path):
        library_of(tmp_path, container(entry(2, 60, cubin("a"))))
        before = architectures(tmp_path / "library.so")
        library_of(tmp_path, container(entry(2, 61, cubin("a")), entry(2, 75, cubin("a"))))
        after = architectures(tmp_path / "library.so")
        assert [sorted(map(str, counts)) for counts in (before, after)] == [["sm_60"], ["sm_61", "sm_75"]]

    def test_a_missing_file_says_so(self, tmp_path):
        with pytest.raises(MachineCodeError) as caught:
            architectures(tmp_path / "none.so")
        assert (
            str(caught.value) == f"{tmp_path}/none.so cannot be read: No such file or directory; reinstall its package"
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"", "cannot be read: cannot mmap an empty file; reinstall its package"),
            (b"#!/bin/sh\n", "is not a 64-bit ELF library; reinstall its package"),
            (b"\x7fELF\x02" + bytes(20), "is cut off or damaged"),
        ],
    )
    def test_what_is_no_library_says_so(self, tmp_path, text, message):
        path = tmp_path / "library.so"
        path.write_bytes(text)
        with pytest.raises(MachineCodeError) as caught:
            architectures(path)
        assert str(caught.value).startswith(f"{path} {message}")

    def test_a_cut_container_is_an_error(self, tmp_path):
        with pytest.raises(MachineCodeError, match="is cut off; reinstall its package"):
            architectures(library_of(tmp_path, container(entry(2, 60, cubin("a")))[:-10]))

    def test_an_unknown_layout_or_compression_is_an_error(self, tmp_path):
        odd = struct.pack("<HHIQIIHHIIIQQQ", 2, 257, 8, 0, 0, 0, 7, 1, 60, 0, 0, 0, 0, 0)
        with pytest.raises(MachineCodeError, match="has an unknown layout; report it"):
            architectures(library_of(tmp_path, container(odd)))
        zstd = library_of(tmp_path, container(entry(2, 60, b"x" * 8, flags=0x8000)))
        assert architectures(zstd) == {Code("sm", 60): 1}
        with pytest.raises(MachineCodeError, match="compressed by zstd, which is not read here"):
            kernel_names(zstd, [Code("sm", 60)])


class TestJudgement:
    def test_a_process_knows_its_libraries_by_its_maps(self):
        maps = (
            "7f00 r-xp 0 08:01 12      /opt/torch/lib/libtorch_cuda.so\n"
            "7f01 r-xp 0 08:01 13      /opt/my libraries/libcublas.so.12.6.4.1\n"
            "7f02 rw-p 0 00:00 0\n7f03 r-xp 0 08:01 14      /opt/torch/lib/libtorch_cuda_linalg.so\n"
        )
        assert loaded_libraries(maps) == {
            "torch": Path("/opt/torch/lib/libtorch_cuda.so"),
            "cuBLAS": Path("/opt/my libraries/libcublas.so.12.6.4.1"),
        }

    def test_each_verdict_has_its_sentence(self, tmp_path):
        code = container(entry(2, 75, cubin("a")), entry(1, 52, b"ptx"))
        path = library_of(tmp_path, code)
        assert judge("x", path, P4) == LibraryCode("x", str(path), ("sm_75 x1", "compute_52 x1"), "", "compute_52")
        assert [judge("x", path, card).describe() for card in ((7, 5), P4, (5, 0))] == [
            "x: has machine code for this card (sm_75)",
            "x: the driver compiles its compute_52 at the first start",
            "x: has no code for this card, only sm_75 x1, compute_52 x1",
        ]
        assert judge("cuBLAS", path, (5, 0)).describe() == (
            "cuBLAS: has no code for this card, only sm_75 x1, compute_52 x1; pip install 'torch==2.7.1'"
        )

    def test_a_torch_without_code_for_the_card_is_refused_with_the_one_that_works(self):
        newer = ["sm_75", "sm_80", "sm_90", "compute_120"]
        with pytest.raises(UnsupportedVersionError) as caught:
            check_torch("2.11.0+cu130", newer, [H200, P4])
        assert str(caught.value) == (
            "torch 2.11.0+cu130 has no code for compute capability 6.1, only for sm_75, sm_80, sm_90, compute_120: "
            "pip install 'torch==2.7.1'"
        )
        with pytest.raises(UnsupportedVersionError, match="only for the CPU"):
            check_torch("2.7.1+cpu", [], [P4])

    @pytest.mark.parametrize("built", [["sm_50", "sm_60", "sm_90"], ["sm_61"], ["sm_75", "compute_50"]])
    def test_any_torch_with_code_for_it_is_accepted_whatever_its_version(self, built):
        check_torch("2.8.0+cu126", built, [P4])

    def test_what_a_first_start_compiles(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv(build.PREBUILT_VARIABLE, str(tmp_path))
        monkeypatch.setattr(build, "MODULES", {name: MODULES[name] for name in ("quantize", "sampling")})
        for name in ("quantize", "sampling"):
            (tmp_path / MODULES[name].file_name("61", "cubin")).touch()
        (tmp_path / MODULES["quantize"].file_name("60", "cubin")).touch()
        ptx = LibraryCode("torch", "", (), "", "compute_50")
        assert compiled_at_start(P4, []) == []
        assert compiled_at_start(P4, [ptx]) == ["torch's compute_50, in the driver"]
        assert compiled_at_start(P100, []) == ["1 of 2 modules of the plugin's kernels, once"]
        assert compiled_at_start(H200, [])[-1] == "the kernels' PTX for compute_61, in the driver"

    def test_what_runs_on_a_p4_and_a_p100(self):
        p4, p100 = what_runs(P4), what_runs(P100)
        assert p4["products"] == "dp4a, four int8 products an instruction"
        assert p100["products"] == "integer products one by one: the card has no dp4a"
        assert p4["widths"] == (
            "decode steps 16 bits, one pass over the weights for up to 24 rows; prompts 16 bits, in tiles of 32 to 64 rows"
        )
        with pytest.raises(KernelError, match="older than Pascal"):
            what_runs((5, 2))

    def test_bitsandbytes_has_a_library_for_each_cuda(self, tmp_path, monkeypatch):
        package = importlib.util.spec_from_file_location("bitsandbytes", tmp_path / "__init__.py")
        monkeypatch.setattr(card_code.importlib.util, "find_spec", lambda name: package)
        assert bitsandbytes_library("12.6") == tmp_path / "libbitsandbytes_cuda126.so"
        assert bitsandbytes_library(None) is None
