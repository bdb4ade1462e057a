"""SGLang on a GPU: the builtin GGUF with weights quantised in device memory, our kernels, recorded decode steps."""

from __future__ import annotations

import concurrent.futures
import re

import pytest
import torch
import transformers

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of compute capability 6.0 or newer"),
]
STORY = "Once upon a time, in a village by the sea, there lived an old fisherman who"


def test_the_answer_makes_sense(gpu_engine):
    answer = gpu_engine.chat("What is the capital of France?")["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_weights_stay_quantised_and_decode_steps_are_recorded(gpu_engine):
    log = gpu_engine.log.read_text()
    assert "weights held: Q4_1 210, Q8_0 1" in log
    assert "'attention_backend': 'pascal'" in log
    assert "'dtype': 'float16'" in log
    assert re.search(r"Capturing batches \(bs=1 ", log)


def test_eight_requests_at_once_get_what_each_gets_alone(gpu_engine):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpu_engine.folder)
    prompts = [tokenizer(f"{number}. {STORY}" + " and" * number)["input_ids"] for number in range(8)]
    alone = [gpu_engine.generate(ids, 125)["output_ids"] for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda ids: gpu_engine.generate(ids, 125)["output_ids"], prompts))
    assert together == alone


def test_four_requests_of_the_whole_context_are_served(gpu_engine):
    prompts = [[(7 * number + 13 * i) % 40000 + 300 for i in range(4000)] for number in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ids: gpu_engine.generate(ids, 90), prompts))
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [4000] * 4
    assert [len(answer["output_ids"]) for answer in answers] == [90] * 4


def test_a_cached_prefix_gives_the_same_tokens(gpu_engine):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpu_engine.folder)
    ids = tokenizer("Cache me if you can: " + STORY * 20)["input_ids"]
    first, second = gpu_engine.generate(ids, 12), gpu_engine.generate(ids, 12)
    assert second["meta_info"]["cached_tokens"] >= len(ids) - 1
    assert first["output_ids"] == second["output_ids"]


def test_a_schema_is_obeyed(gpu_engine):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = gpu_engine.chat("Answer as JSON.", response_format=response_format)
    assert answer["choices"][0]["message"]["content"] in (
        '{"ok": true}',
        '{"ok": false}',
        '{"ok":true}',
        '{"ok":false}',
    )


def test_none_of_that_compiles_a_triton_kernel(gpu_engine):
    """Triton's compiler does not know Pascal: whatever it makes here would fail there."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    sampled = gpu_engine.chat(
        "Tell me a story.", temperature=1.0, top_p=0.9, logprobs=True, top_logprobs=3, max_tokens=8
    )
    assert len(sampled["choices"][0]["logprobs"]["content"]) == 8
    gpu_engine.chat("Answer as JSON.", response_format=response_format, temperature=0.7, top_k=20)
    asked = gpu_engine.client.post(
        "/generate",
        json={
            "input_ids": [5, 6, 7, 8],
            "sampling_params": {"temperature": 0, "max_new_tokens": 4},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
        },
    )
    assert asked.status_code == 200
    assert list((gpu_engine.folder.parent / "triton").rglob("*.cubin")) == []
