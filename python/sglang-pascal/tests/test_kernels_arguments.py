"""Every kernel's arguments, as Python lays them out: those of the source by name, of the PTX by size and offset.

Without a GPU: NVRTC compiles each module to PTX (the sizes of parameters, and from where they are loaded).
"""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path

import pytest
import sglang_pascal
from sglang_pascal.kernels import arguments, build
from sglang_pascal.kernels.arguments import BLOCKS, Block, block_of
from sglang_pascal.kernels.build import MODULES, SOURCES, ToolchainError

PACKAGE = Path(sglang_pascal.__file__).parent
ENTRY = re.compile(r"\.entry (\w+)\(\s*(.*?)\s*\)\s*(?:\.maxntid.*?)?\{(.*?)^\}", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+) \w+_param_\d+(?:\[(\d+)\])?")
LOAD = re.compile(r"ld\.param\.(?:v(\d)\.)?[a-z](\d+)\s+[^;]*\[(?:\w+_param_(\d+)|(%rd\d+))(?:\+(\d+))?\]")
COPY = re.compile(r"mov\.[bu]64\s+(%rd\d+), (?:\w+_param_0|(%rd\d+));")


def has_nvrtc() -> bool:
    try:
        build._nvrtc()
    except ToolchainError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC 11.8: install the extra 'kernels'")
ONE_OF_EACH = sorted({module.source: name for name, module in sorted(MODULES.items())}.values())
"""One module of each source: the others differ in types and sizes that the arguments do not depend on."""


def spans(block: type[Block]) -> dict[int, int]:
    """Offset -> bytes of each field."""
    found = [getattr(block, name) for name, _ in block._fields_]
    return {field.offset: field.size for field in found}


@needs_nvrtc
@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_block_is_laid_out_as_the_ptx_declares_it(name: str, architecture: str) -> None:
    ptx = build.artifact(MODULES[name], architecture, "ptx").decode()
    kernels = ENTRY.findall(ptx)
    assert len(kernels) == ptx.count(".entry ")
    for kernel, declared, body in kernels:
        block = block_of(kernel)
        parameters = PARAMETER.findall(declared)
        if block.is_struct:
            assert [(int(align), int(size)) for align, _, size in parameters] == [
                (ctypes.alignment(block), block.n_bytes)
            ], kernel
            offsets = [0]
        else:
            sizes = [int(re.sub(r"\D", "", kind)) // 8 for _, kind, _ in parameters]
            # Each starts at a multiple of its own size.
            at, offsets = 0, []
            for size in sizes:
                at = -(-at // size) * size
                offsets.append(at)
                at += size
            assert dict(zip(offsets, sizes, strict=True)) == spans(block), kernel
            assert at == block.n_bytes, kernel
        loaded = set()
        for count, bits, parameter, offset in loads(body):
            size, first = bits // 8, offsets[parameter] + offset
            for place in range(first, first + size * count, size):
                assert spans(block).get(place) == size, f"{kernel} loads {size} bytes at {place}"
                loaded.add(place)
        # Some are not seen: the scales of a pool without them, and keys or values by an address that is computed.
        assert len(loaded) >= len(block._fields_) - 4, kernel


def loads(body: str) -> list[tuple[int, int, int, int]]:
    """(values, bits of each, index of the parameter, offset in it); the only struct's address may be in a register."""
    of_struct = {""}
    for register, copied in COPY.findall(body):
        if copied in of_struct:
            of_struct.add(register)
    return [
        (int(count or 1), int(bits), int(parameter or 0), int(offset or 0))
        for count, bits, parameter, register, offset in LOAD.findall(body)
        if register in of_struct
    ]


def test_loads_are_found() -> None:
    body = """
        mov.b64         %rd1, k_param_0;
        mov.u64         %rd2, %rd1;
        mov.u64         %rd3, %rd9;
        ld.param.v2.u32         {%r1, %r2}, [k_param_0+88];
        ld.param.u64    %rd4, [%rd2+8];
        ld.param.f32    %f1, [k_param_2];
        ld.param.u64    %rd5, [%rd3];
    """
    assert loads(body) == [(2, 32, 0, 88), (1, 64, 0, 8), (1, 32, 2, 0)]


def c_names(text: str) -> list[str]:
    """Names of members or parameters, in order: `const u8* in; int a, b;` -> in, a, b."""
    text = re.sub(r"//.*", "", text)
    return re.findall(r"(\w+)\s*(?=[,;)]|$)", text.strip())


def python_names(block: type[Block]) -> list[str]:
    return [name.rstrip("_") for name, _ in block._fields_]


SOURCE_OF = {
    "AttentionDecode": "attention_decode.cu",
    "AttentionCombine": "attention_combine.cu",
    "AttentionPrefill": "attention_prefill.cu",
    "QuantizedProduct": "matmul.cuh",
    "HalfProduct": "half_matmul.cu",
    "RopeAndStore": "kv_cache.cu",
}


@pytest.mark.parametrize("name", SOURCE_OF)
def test_a_struct_has_the_members_of_the_source(name: str) -> None:
    source = (SOURCES / SOURCE_OF[name]).read_text()
    (members,) = re.findall(r"^struct Arguments \{(.*?)^\};", source, re.DOTALL | re.MULTILINE)
    assert c_names(members) == python_names(getattr(arguments, name))


PARAMETERS = {
    "quantize": ("quantize.cu", "quantize"),
    "silu_mul_quantize": ("quantize.cu", "silu_mul_quantize"),
    "rms_norm_quantize": ("quantize.cu", "rms_norm_quantize"),
    "repack_": ("repack.cu", r"NAME\(repack, TYPE\)"),
    "unrepack_": ("repack.cu", r"NAME\(unrepack, TYPE\)"),
    "dequantize_": ("repack.cu", r"NAME\(dequantize, TYPE\)"),
    "argmax": ("sampling.cu", "argmax"),
    "top_k_top_p_filter": ("sampling.cu", "top_k_top_p_filter"),
    "probe_": ("probe.cu", "probe_##NAME"),
    "probe_stream": ("probe.cu", "probe_stream"),
}


@pytest.mark.parametrize("kernel", PARAMETERS)
def test_parameters_have_the_names_of_the_source(kernel: str) -> None:
    file, pattern = PARAMETERS[kernel]
    source = (SOURCES / file).read_text()
    (text,) = re.findall(rf"__launch_bounds__\(\w+\)\s+{pattern}\((.*?)\)", source, re.DOTALL)
    assert c_names(text) == python_names(BLOCKS[kernel])


def test_every_block_is_compared_with_its_source() -> None:
    compared = {getattr(arguments, name) for name in SOURCE_OF} | {BLOCKS[kernel] for kernel in PARAMETERS}
    assert compared == set(BLOCKS.values()) == set(Block.__subclasses__())


def test_every_launch_names_every_argument() -> None:
    """A field of ctypes that is left out would be 0 without a word."""
    blocks = {block.__name__: block for block in BLOCKS.values()}
    launched = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in blocks:
                block = blocks[node.func.id]
                assert not node.args, path
                assert [keyword.arg for keyword in node.keywords] == [name for name, _ in block._fields_], path
                launched.add(block)
    assert launched == set(blocks.values())
