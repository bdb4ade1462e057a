"""What a model is for, by its file; which engine serves it in that role; and how a server of each role is probed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.cards import load_card
from pascaline.engines import ENGINES
from pascaline.engines.plan_request import PlanRequest
from pascaline.engines.served import refusal_of_all
from pascaline.models.reader import read_model
from pascaline.models.roles import own_role
from pascaline.models.spec import ModelSpec
from pascaline.planning import make_plan, table
from pascaline.serving.engine_api import TRIALS
from pascaline.settings import Settings
from support.hf_models import write_folder
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.settings import Role

SGLANG, LLAMA_CPP = ENGINES["sglang"], ENGINES["llama.cpp"]


def qwen(tmp_path: Path, pooling: int | None) -> ModelSpec:
    metadata: dict[str, Any] = {} if pooling is None else {"qwen3.pooling_type": pooling}
    return read_model(write_gguf(tmp_path / "m.gguf", tiny("qwen3"), "Q8_0", sparse=True, metadata=metadata))


def bert(pooling: str | None = "mean") -> ModelSpec:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "head_dim": 16}
    return ModelSpec(
        format="gguf",
        files=("m.gguf",),
        architecture="bert",
        num_kv_heads=0,
        v_head_dim=16,
        vocab_size=100,
        context_length=512,
        pooling=pooling,
        causal=False,
        **sizes,  # type: ignore[arg-type]
    )


class TestTheFile:
    @pytest.mark.parametrize(
        ("number", "pooling", "role"),
        [
            (None, None, "generate"),
            (0, None, "generate"),
            (1, "mean", "embed"),
            (2, "cls", "embed"),
            (3, "last", "embed"),
            (4, "rank", "rerank"),
        ],
    )
    def test_a_gguf_file(self, tmp_path: Path, number: int | None, pooling: str | None, role: Role) -> None:
        spec = qwen(tmp_path, number)
        assert (spec.pooling, spec.causal, own_role(spec)) == (pooling, True, role)

    def test_an_unknown_pooling_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match=r"'qwen3.pooling_type' is 9, must be below 5"):
            qwen(tmp_path, 9)

    @pytest.mark.parametrize(
        ("config", "pooling"),
        [
            ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
            ({"pooling_mode_mean_tokens": True}, "mean"),
            ({"pooling_mode_cls_token": True}, "cls"),
        ],
    )
    def test_a_folder(self, tmp_path: Path, config: dict[str, bool], pooling: str) -> None:
        folder = write_folder(tmp_path / "m", tiny("qwen3"))
        assert read_model(folder).pooling is None
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(config))
        assert (read_model(folder).pooling, own_role(read_model(folder))) == (pooling, "embed")

    @pytest.mark.parametrize("config", [{}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}])
    def test_a_folder_with_no_single_pooling(self, tmp_path: Path, config: dict[str, bool]) -> None:
        folder = write_folder(tmp_path / "m", tiny("qwen3"))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(config))
        with pytest.raises(Exception, match="it names no single pooling of mean, cls and last token"):
            read_model(folder)


def refusal(spec: ModelSpec, role: Role, engine: str = "sglang") -> str:
    return ENGINES[engine].judge_as(spec, role).sentence


class TestRefusals:
    def test_an_embedding_model_does_not_generate(self, tmp_path: Path) -> None:
        spec = qwen(tmp_path, 3)
        assert refusal(spec, "generate") == (
            "it is an embedding model (pooling last); set role to embed, or take a model for role generate"
        )
        assert refusal(spec, "embed") == ""
        assert SGLANG.judge_as(spec).sentence == ""

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("role", ["embed", "rerank"])
    def test_a_generating_model_does_not_embed(self, tmp_path: Path, role: Role, engine: str) -> None:
        assert refusal(qwen(tmp_path, None), role, engine) == (
            "it generates text: nothing in it says how to pool an embedding (qwen3.pooling_type); set role to generate, "
            f"or take a model for role {role}"
        )

    def test_an_encoder_is_llama_cpps(self) -> None:
        assert refusal(bert(), "embed") == (
            "bert is an encoder, and SGLang embeds with causal models here; set engine to llama.cpp, which serves it "
            "from a GGUF file"
        )
        assert LLAMA_CPP.refuses_role(bert(), "embed") is None
        assert refusal(bert(None), "generate").startswith("it is an embedding model; set role to embed")

    def test_another_pooling_is_llama_cpps(self, tmp_path: Path) -> None:
        assert refusal_of_all(qwen(tmp_path, 1)) is None
        assert refusal(qwen(tmp_path, 1), "embed").startswith(
            "its vectors are pooled by mean, and SGLang takes that of the last token here; set engine to llama.cpp"
        )

    def test_a_reranker_is_llama_cpps(self, tmp_path: Path) -> None:
        assert refusal(qwen(tmp_path, 4), "rerank").startswith(
            "SGLang is not set up for reranking models here; set eng"
        )
        assert SGLANG.problems(Settings(role="rerank")) == [
            ("role", "'rerank' is not served by SGLang here, must be generate or embed, or engine be llama.cpp")
        ]
        assert LLAMA_CPP.problems(Settings(role="rerank", engine="llama.cpp")) == []


class TestPlan:
    def request(self, **changes: Any) -> PlanRequest:
        return PlanRequest(**({"card_bytes": 8 * 2**30, "context_length": 512, "role": "embed"} | changes))

    def test_the_pool_holds_one_context_and_no_answers(self, tmp_path: Path) -> None:
        spec, card = qwen(tmp_path, 3), load_card("tesla-p4")
        embeds = make_plan(spec, card, self.request())
        generates = make_plan(spec, card, self.request(role="generate"))
        assert (embeds.kv_tokens, generates.kv_tokens) == (512, 4 * 512)
        assert (embeds.part("logits"), embeds.part("graphs")) == (0, 0)
        assert generates.part("graphs") > 0
        assert embeds.notes[0] == (
            "role embed: the KV cache holds the prompts that are computed at once, 512 tokens; a step computes 512 of "
            "them, and no answer grows in it"
        )
        assert embeds.to_json()["role"] == "embed"
        assert embeds.to_json()["tokens_per_second"] is None
        assert "sglang embed, context 512" in table(embeds)
        assert "one request" not in table(embeds)

    def test_an_encoder_needs_whole_prompts_and_no_pool(self) -> None:
        plan = make_plan(bert(), load_card("tesla-p4"), self.request(engine="llama.cpp", whole_prompts=True))
        assert plan.kv_bytes == 0
        assert plan.fits
        arguments = list(plan.engine_args)
        assert [arguments[arguments.index(flag) + 1] for flag in ("--batch-size", "--ubatch-size")] == ["512", "512"]


VECTOR = {"data": [{"embedding": [0.5, -1, 0]}]}
SCORE = {"results": [{"index": 0, "relevance_score": -2.5}]}
TOKEN = {"usage": {"completion_tokens": 1}}


@pytest.mark.parametrize(
    ("role", "answer", "succeeded"),
    [
        ("embed", VECTOR, True),
        ("embed", {"data": [{"embedding": [0, 0]}]}, False),
        ("embed", {"data": [{"embedding": []}]}, False),
        ("embed", {"data": [{"embedding": [None]}]}, False),
        ("embed", {"data": [{"embedding": [True]}]}, False),
        ("embed", {"data": []}, False),
        ("embed", {"data": {}}, False),
        ("embed", TOKEN, False),
        ("rerank", SCORE, True),
        ("rerank", {"results": [{}]}, False),
        ("rerank", {"results": [{"relevance_score": None}]}, False),
        ("rerank", VECTOR, False),
        ("generate", TOKEN, True),
        ("generate", VECTOR, False),
    ],
)
def test_a_probe_needs_a_result_of_its_role(role: Role, answer: Any, succeeded: bool) -> None:
    assert TRIALS[role].succeeded(json.dumps(answer).encode()) is succeeded


@pytest.mark.parametrize("role", TRIALS)
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"data": [NaN]}', b'{"data": [{"embedding": [NaN]}]}'])
def test_a_probe_survives_any_answer(role: Role, content: bytes) -> None:
    assert TRIALS[role].succeeded(content) is False
