"""The catalogue of well-known models: sizes of files as published, and what a card runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.cards import load_card
from pascaline.cli import main
from pascaline.errors import ExitCode
from pascaline.planning import make_plan
from pascaline.planning.catalog import catalog, catalog_spec, shapes
from pascaline.planning.hints import with_hints
from pascaline.planning.placement import place_on_card
from pascaline.planning.request import request_from_placement
from pascaline.settings import Settings

if TYPE_CHECKING:
    from pascaline.planning.placement import Placement

GIB = 2**30
MTP_SHARE = 0.08
"""What the layer that predicts further tokens adds to a published file; the shapes leave it out."""
PUBLISHED = [shape for shape in shapes() if "file_gib" in shape]


def on_p4(host_gib: int) -> Placement:
    """A P4 beside this much free memory."""
    return replace(place_on_card(Settings(), load_card("tesla-p4")), host_memory_bytes=host_gib * GIB)


@pytest.mark.parametrize("shape", PUBLISHED, ids=[shape["name"] for shape in PUBLISHED])
def test_a_file_has_the_published_size(shape: Any) -> None:
    published = shape["file_gib"] * GIB
    allowed = MTP_SHARE if shape["architecture"].startswith("qwen35") else 0.025
    assert catalog_spec(shape).weights_bytes == pytest.approx(published, rel=allowed)


def test_every_model_has_a_source_and_a_shape() -> None:
    assert len(shapes()) >= 20
    for shape in shapes():
        assert shape["source"]
        spec = catalog_spec(shape)
        assert all(tensor.n_bytes > 0 for tensor in spec.tensors)
        assert spec.num_hidden_layers == len({t.name.split(".")[1] for t in spec.tensors if t.name.startswith("blk.")})


def test_a_mixture_of_eight_experts_has_more_bits_for_its_attention() -> None:
    """llama-quant.cpp: keys and values of Q8_0 and an output of Q5_K, whose files are 0.6 % larger."""
    (shape,) = [shape for shape in shapes() if shape["name"] == "Mixtral-8x7B"]
    types = {tensor.name: tensor.tensor_type for tensor in catalog_spec(shape).tensors}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_gate_inp")
    found = {name: {types[f"blk.{layer}.{name}.weight"] for layer in range(32)} for name in names}
    assert found == {
        "attn_q": {"Q4_K"}, "attn_k": {"Q8_0"}, "attn_v": {"Q8_0"}, "attn_output": {"Q5_K"},
        "ffn_gate_exps": {"Q4_K"}, "ffn_gate_inp": {"F32"},
    }  # fmt: skip


def test_gpt_oss_has_the_bytes_of_its_file_but_for_its_vectors() -> None:
    """12,100,697,216 bytes of tensors with biases and sinks (run 2026-11-29)."""
    (shape,) = [shape for shape in shapes() if shape["name"] == "gpt-oss-20b"]
    assert catalog_spec(shape).weights_bytes == pytest.approx(12_100_697_216, rel=0.005)


class TestRows:
    def test_of_a_p4_with_much_host_memory(self) -> None:
        rows = {row.name: row.plan for row in catalog(Settings(), on_p4(192))}
        assert rows["Llama-3.1-8B"].fits
        assert rows["Qwen3-30B-A3B"].fits
        assert rows["Qwen3-30B-A3B"].request.engine == "llama.cpp"
        assert rows["Qwen3-30B-A3B"].request.expert_layers_on_host
        assert not rows["Qwen3-14B"].fits

    def test_without_host_memory_mixtures_do_not_fit(self) -> None:
        rows = {row.name: row.plan for row in catalog(Settings(), on_p4(2))}
        assert not rows["Qwen3-30B-A3B"].fits
        assert "of the host's memory" in rows["Qwen3-30B-A3B"].reasons[0]

    def test_a_row_is_the_plan_of_its_model(self) -> None:
        """With the chunk of 2048 that a plan takes by itself, unless one is chosen."""
        (shape,) = [shape for shape in shapes() if shape["name"] == "Qwen3-30B-A3B"]
        spec, placement = catalog_spec(shape), on_p4(192)
        settings = Settings.model_validate({"engine": "llama.cpp", "context_length": 4096})
        request = request_from_placement(settings, spec, placement)
        plan = make_plan(spec, placement.card, request)
        plan = with_hints(plan, spec, placement.card, request, chunk_is_free=True)
        rows = {row.name: row.plan for row in catalog(settings, placement)}
        assert rows["Qwen3-30B-A3B"] == plan
        assert plan.request.chunked_prefill_tokens == 2048
        chosen = {row.name: row.plan for row in catalog(settings, placement, chunk_is_free=False)}
        assert chosen["Qwen3-30B-A3B"].request.chunked_prefill_tokens == 512

    def test_dense_layers_may_be_on_the_host(self) -> None:
        settings = Settings.model_validate({"placement": {"layers": "auto"}})
        rows = {row.name: row.plan for row in catalog(settings, on_p4(192))}
        assert rows["Qwen3-14B"].fits
        assert rows["Qwen3-14B"].request.gpu_layers is not None
        assert rows["Qwen3-14B"].request.gpu_layers < 40


class TestCommand:
    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "--catalog", "--card", "tesla-p4", "--host-memory", "192GiB"]) == ExitCode.OK
        text = capsys.readouterr().out
        assert "Qwen3-30B-A3B" in text
        assert "experts of " in text
        table, flags, _ = text.split("\n\n")
        assert max(map(len, table.splitlines())) <= 140
        common, *own = flags.splitlines()
        assert common.startswith("flags of llama.cpp: --ctx-size 16384 --parallel 4 --n-gpu-layers 999 ")
        assert next(line for line in own if "Qwen3-30B-A3B" in line).startswith(
            "  --batch-size 2048 --ubatch-size 2048 --n-cpu-moe 36: "
        )

    def test_says_which_models_whole_layers_on_the_host_would_serve(self, capsys: pytest.CaptureFixture[str]) -> None:
        catalog_of = ["plan", "--catalog", "--card", "tesla-p4", "--host-memory", "192GiB"]
        main(catalog_of)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("with --placement-layers auto (whole layers on the host, slower) also: ")
        main([*catalog_of, "--placement-layers", "auto"])
        text = capsys.readouterr().out
        for name in last.partition("also: ")[2].split(", "):
            (row,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
            assert "does not fit" not in row
        assert "with --placement-layers auto" not in text

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "--catalog", "--card", "tesla-p40", "--json"]) == ExitCode.OK
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) == len(shapes())
        assert {"name", "file_bytes", "fits", "engine_args", "expert_layers_on_host"} <= rows[0].keys()

    def test_without_a_card_the_host_is_planned(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = "plan --catalog --device cpu --host-memory 64GiB --engine llama.cpp --json"
        assert main(arguments.split()) == ExitCode.OK
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows["Qwen3-30B-A3B"]["fits"]
        assert {row["where"] for row in rows.values()} == {"host"}
        assert {row["card_bytes"] for row in rows.values()} == {64 * GIB}
        assert not rows["GLM-4.5-Air"]["fits"]

    def test_a_chosen_engine_is_the_only_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["plan", "--catalog", "--card", "tesla-p4", "--engine", "sglang", "--json"])
        captured = capsys.readouterr()
        rows = json.loads(captured.out)
        assert {row["engine"] for row in rows} == {"sglang"}
        assert len(rows) < len(shapes())
        assert "pascaline plan: sglang does not serve DeepSeek-V2-Lite, GLM-4.5-Air, " in captured.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--catalog", "--sweep", "context"], "--catalog: is set beside --sweep"),
            (["--catalog", "m.gguf"], "--catalog: plans many models, must not be set beside a model (m.gguf)"),
            (
                ["--catalog", "--quant", "Q8_0"],
                "--quant: the catalogue is planned as most files are published, in Q4_K_M",
            ),
            (["--measure-host", "--host-memory", "1GiB"], "--host-memory: --measure-host measures this host"),
            (["--catalog", "--host-memory", "192"], "'192' means 192 B, must be at least 1 MiB, such as 192 GiB"),
        ],
    )
    def test_what_does_not_go_together(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            code = main(["plan", *arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        assert code == ExitCode.CONFIGURATION
        assert message in capsys.readouterr().err
