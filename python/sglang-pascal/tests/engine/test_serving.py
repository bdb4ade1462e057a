"""The real SGLang, unmodified, serves the builtin GGUF through the plugin on the CPU."""

from __future__ import annotations

import concurrent.futures
import json

import httpx
import pytest
import torch
import transformers
from sglang_pascal.checkpoint.dequantize import dequantized
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.weights import raw_tensors

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own"), pytest.mark.timeout(1200)]

PROMPTS = [
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
]
LONG_PROMPT = " ".join(f"Item {number} costs {number * 7 % 100} coins." for number in range(60))
"""Several chunks of 128 tokens."""


@pytest.fixture(scope="module")
def reference(engine, builtin_gguf):
    """transformers with the same dequantised weights."""
    config = transformers.AutoConfig.from_pretrained(engine.folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(dict(dequantized(raw_tensors(GgufFile(builtin_gguf)), torch.float32)), strict=False)
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(engine):
    return transformers.AutoTokenizer.from_pretrained(engine.folder)


def test_the_log_shows_our_backend_and_no_failed_hook(engine):
    log = engine.log.read_text()
    assert "'attention_backend': 'pascal'" in log
    assert "Failed to apply hooks" not in log
    assert "Failed to execute general plugin" not in log


def test_the_answer_makes_sense(engine):
    answer = engine.chat("What is the capital of France?")["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_streaming_gives_the_same_text_in_pieces(engine):
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "stream": True,
    }
    with engine.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == "The capital of France is Paris."
    assert sum(map(bool, pieces)) > 3


def greedy(model, ids, n_tokens):
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=2
        )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", [*PROMPTS, LONG_PROMPT])
def test_greedy_tokens_are_those_of_transformers(engine, reference, tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    assert engine.generate(ids, 16)["output_ids"] == greedy(reference, ids, 16)


def test_log_probabilities_are_those_of_transformers(engine, reference, tokenizer):
    ids = tokenizer(PROMPTS[2])["input_ids"]
    answer = engine.generate(ids, 1, return_logprob=True, logprob_start_len=0)
    found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logits[position, token].item() for position, token in enumerate(ids[1:])]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-3, rtol=0)


def test_a_cached_prefix_gives_the_same_tokens(engine, tokenizer):
    ids = tokenizer("Cache me if you can: " + LONG_PROMPT)["input_ids"]
    first, second = engine.generate(ids, 12), engine.generate(ids, 12)
    assert first["meta_info"]["cached_tokens"] < 32
    assert second["meta_info"]["cached_tokens"] >= len(ids) - 1
    assert first["output_ids"] == second["output_ids"]


def test_eight_requests_at_once_get_what_each_gets_alone(engine, tokenizer):
    prompts = [tokenizer(f"{number}. {PROMPTS[number % 3]}" + " and" * number)["input_ids"] for number in range(8)]
    alone = [engine.generate(ids, 12)["output_ids"] for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda ids: engine.generate(ids, 12)["output_ids"], prompts))
    assert together == alone


def test_json_schema_is_obeyed_without_endless_white_space(engine):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
        "required": ["city", "is_capital"],
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = engine.chat("Describe Paris as JSON.", response_format=response_format, max_tokens=64)
    content = json.loads(answer["choices"][0]["message"]["content"])
    assert set(content) == {"city", "is_capital"}
    assert isinstance(content["is_capital"], bool)


def test_metrics_count_tokens(engine):
    engine.chat("Hi")
    text = httpx.get(f"{engine.url}/metrics").text
    assert "sglang:realtime_tokens_total{" in text
    assert 'model_name="smollm2"' in text
