"""docs/api.md is true: each feature of its table, asked with the `openai` package of a real SGLang under `pascaline serve`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sglang_pascal.cpu import recommended_cpu_settings
from support.instance import Instance, http, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import openai  # at run time by the tests: without them, no worker needs it to collect

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own"), pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
START_SECONDS = 400
REQUEST_SECONDS = 300
RUNNING, QUEUED = 4, 4
ROWS_ARE_INDEPENDENT = recommended_cpu_settings().dtype == "bfloat16"
"""Whether a CPU gives a row of a product the same bits beside any other rows: MKL's float32 products do not."""
KEY = "a-key-of-the-test"
MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 6}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("openai")
    (folder / "key").write_text(KEY)
    settings = {
        "device": "cpu",
        "context_length": 1024,
        "max_running_requests": RUNNING,
        "max_queued_requests": QUEUED,
        "served_model_name": MODEL,
        "api_key_file": folder / "key",
        "start_timeout": START_SECONDS,
        "stall_timeout": 300,
        # With float32, a test generation in the same batch changes the last bits of a sampled request.
        "probe_interval": 120,
    }
    with running(folder, **settings) as started:
        started.wait_for_state("ready", seconds=START_SECONDS)
        yield started


@pytest.fixture
def client(instance: Instance) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{instance.api_url}/v1", api_key=KEY, timeout=REQUEST_SECONDS, max_retries=0)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0} | options
    )


class TestWorks:
    def test_chat(self, client: openai.OpenAI) -> None:
        answer = chat(client)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
        assert answer.usage.completion_tokens > 0

    def test_a_stream_with_usage(self, client: openai.OpenAI) -> None:
        chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        assert chunks[-1].usage.completion_tokens > 0

    def test_a_completion(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=4, temperature=0)
        assert answer.choices[0].text

    def test_several_answers(self, client: openai.OpenAI) -> None:
        assert len(chat(client, n=2, temperature=1).choices) == 2

    def test_a_stop_string(self, client: openai.OpenAI) -> None:
        assert chat(client, stop=["France"]).choices[0].message.content == "The capital of "

    def test_log_probabilities(self, client: openai.OpenAI) -> None:
        [first, *_] = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
        assert first.token == "The"
        assert len(first.top_logprobs) == 3
        assert first.logprob == pytest.approx(first.top_logprobs[0].logprob)

    def test_a_json_schema(self, client: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
        answer = chat(client, response_format=wanted, max_tokens=48).choices[0].message.content
        assert set(json.loads(answer)) == {"city"}

    def test_the_same_seed_gives_the_same_text(self, client: openai.OpenAI) -> None:
        def text(seed: int) -> str:
            return str(chat(client, temperature=1.5, seed=seed, max_tokens=24).choices[0].message.content)

        if not ROWS_ARE_INDEPENDENT:
            text(1)  # a prompt from the cache has other last bits than one that is computed
        first = text(1)
        assert text(1) == first
        assert {text(seed) for seed in range(2, 6)} != {first}

    def test_a_seed_beside_min_p_and_beside_a_request_without(self, client: openai.OpenAI) -> None:
        """One batch: all are answered, and the text of the seed is the one that it has alone."""
        from concurrent.futures import ThreadPoolExecutor

        options: list[dict[str, Any]] = [{"seed": 7}, {"extra_body": {"min_p": 0.1}}, {"seed": 7}, {}]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda more: chat(client, temperature=1.5, max_tokens=24, **more), options))
        texts = [answer.choices[0].message.content for answer in answers]
        assert all(texts)
        if ROWS_ARE_INDEPENDENT:
            alone = chat(client, temperature=1.5, max_tokens=24, seed=7).choices[0].message.content
            assert texts[0] == texts[2] == alone

    def test_top_p_of_zero_is_greedy(self, client: openai.OpenAI) -> None:
        assert chat(client, temperature=1, top_p=0).choices[0].message.content == ANSWER

    def test_top_k_of_one_is_greedy(self, client: openai.OpenAI) -> None:
        answer = chat(client, temperature=1.5, extra_body={"top_k": 1})
        assert answer.choices[0].message.content == ANSWER

    @pytest.mark.parametrize(
        "penalty",
        [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 1.5}}],
        ids=["frequency", "presence", "repetition"],
    )
    def test_a_penalty_lowers_what_a_list_repeats(self, client: openai.OpenAI, penalty: dict[str, Any]) -> None:
        question = [{"role": "user", "content": "List ten fruits."}]
        plain, other = (
            chat(client, messages=question, max_tokens=40, logprobs=True, **options).choices[0].logprobs.content
            for options in ({}, penalty)
        )
        pairs = zip(plain, other, strict=False)
        assert any(a.token != b.token or abs(a.logprob - b.logprob) > 0.01 for a, b in pairs)

    def test_a_logit_bias(self, client: openai.OpenAI) -> None:
        """Token 2 is the end of a turn: with the largest bias it is the first token."""
        answer = chat(client, logit_bias={"2": 100})
        assert (answer.choices[0].message.content or "", answer.choices[0].finish_reason) == ("", "stop")

    @pytest.mark.parametrize(
        ("grammar", "pattern"),
        [({"regex": "[0-9]{3}"}, "[0-9]{3}"), ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no")],
        ids=["regex", "ebnf"],
    )
    def test_a_grammar(self, client: openai.OpenAI, grammar: dict[str, str], pattern: str) -> None:
        assert re.fullmatch(pattern, chat(client, extra_body=grammar).choices[0].message.content)

    def test_a_json_object(self, client: openai.OpenAI) -> None:
        question = [{"role": "user", "content": 'Answer with {"city": "Paris"}.'}]
        answer = chat(client, messages=question, response_format={"type": "json_object"}, max_tokens=60).choices[0]
        assert answer.message.content.startswith("{")
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)

    def test_the_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL


def test_what_is_ignored(client: openai.OpenAI) -> None:
    answer = chat(client, user="somebody", metadata={"a": "b"}, store=False, service_tier="auto")
    assert answer.choices[0].message.content == ANSWER


NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLS = pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])


class TestToolCalls:
    """The built-in model's template has no tools: a call that is demanded obeys the tool's schema all the same."""

    @CALLS
    def test_a_call(self, client: openai.OpenAI, choice: Any) -> None:
        answer = chat(client, tools=[WEATHER, OTHER_TOOL], tool_choice=choice, max_tokens=60).choices[0]
        [call] = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content or "") == ("tool_calls", "")
        assert call.type == "function"
        assert call.id
        arguments = json.loads(call.function.arguments)
        if choice is NAMED:
            assert call.function.name == "get_weather"
        assert set(arguments) == {"city" if call.function.name == "get_weather" else "zone"}

    @CALLS
    def test_a_streamed_call(self, client: openai.OpenAI, choice: Any) -> None:
        whole = chat(client, tools=[WEATHER], tool_choice=choice, max_tokens=60).choices[0].message.tool_calls[0]
        chunks = list(chat(client, tools=[WEATHER], tool_choice=choice, max_tokens=60, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        pieces = [call for delta in deltas for call in delta.tool_calls or ()]
        assert [piece.function.name for piece in pieces if piece.function.name] == ["get_weather"]
        assert {piece.index for piece in pieces} == {0}
        assert "".join(delta.content or "" for delta in deltas) == ""
        arguments = "".join(piece.function.arguments or "" for piece in pieces)
        assert json.loads(arguments) == json.loads(whole.function.arguments)
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"

    def test_no_call_if_none_is_wanted(self, client: openai.OpenAI) -> None:
        answer = chat(client, tools=[WEATHER], tool_choice="none").choices[0]
        assert (answer.message.content, answer.message.tool_calls) == (ANSWER, None)

    def test_the_agent_says_that_there_is_no_parser(self, instance: Instance) -> None:
        nothing = {"tool_call_parser": None, "reasoning_parser": None}
        headers = {"Authorization": f"Bearer {KEY}"}
        assert instance.agent("/health", headers=headers).json["parsers"] == nothing
        assert instance.agent("/plan", headers=headers).json["parsers"] == nothing
        assert "plan: no parser of tool calls, no parser of reasoning" in instance.text


class TestErrors:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda client: chat(client, model="gpt-4"),
            lambda client: client.completions.create(model="gpt-4", prompt="a"),
            lambda client: client.models.retrieve("gpt-4"),
        ],
        ids=["chat", "completions", "retrieve"],
    )
    def test_another_model_is_not_found(self, client: openai.OpenAI, ask: Callable[[openai.OpenAI], Any]) -> None:
        import openai

        with pytest.raises(openai.NotFoundError) as caught:
            ask(client)
        assert caught.value.code == "model_not_found"
        assert "'gpt-4' does not exist" in str(caught.value)

    @pytest.mark.parametrize("key", ["wrong", ""])
    def test_a_wrong_or_missing_key(self, instance: Instance, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = instance.api("/v1/models", headers=headers)
        assert answer.status == 401
        assert answer.json["error"]["code"] == "invalid_api_key"

    def test_a_body_that_is_not_json(self, instance: Instance) -> None:
        import urllib.error
        import urllib.request

        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{instance.api_url}/v1/chat/completions", b'{"model": ', headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=REQUEST_SECONDS)
        with caught.value as answer:
            error = json.load(answer)["error"]
        assert caught.value.code == 400
        assert error["message"].startswith("the body is not JSON: ")

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ({"messages": []}, "essages"),
            ({"temperature": -1}, "temperature"),
            ({"top_p": 2}, "top_p"),
            ({"messages": [{"role": "user", "content": "word " * 3000}]}, "1024"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"tools": [WEATHER]}, "set tool_call_parser"),
            ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f' not found"),
        ],
    )
    def test_a_bad_request_names_what_is_wrong(self, client: openai.OpenAI, options: dict[str, Any], part: str) -> None:
        import openai

        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **options)
        assert part in caught.value.body["message"]  # type: ignore[index]
        assert not re.search(r"/(usr|home|work|opt|root|tmp)/", str(caught.value))

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}},
        ],
        ids=["image", "audio", "file"],
    )
    def test_what_is_not_text_is_refused(self, client: openai.OpenAI, part: dict[str, Any]) -> None:
        import openai

        content = [{"type": "text", "text": "What is this?"}, part]
        with pytest.raises(openai.BadRequestError):
            chat(client, messages=[{"role": "user", "content": content}])

    def test_a_full_queue(self, client: openai.OpenAI) -> None:
        """Before a stream begins; the accepted requests are answered."""
        from concurrent.futures import ThreadPoolExecutor

        import openai

        def ask(_: int) -> int:
            try:
                chunks = list(chat(client, max_tokens=32, stream=True, extra_body={"ignore_eos": True}))
            except openai.InternalServerError as refused:
                return refused.status_code
            return 200 if chunks[-1].choices[0].finish_reason == "length" else 0

        asked = 4 * (RUNNING + QUEUED)
        with ThreadPoolExecutor(asked) as pool:
            statuses = list(pool.map(ask, range(asked)))
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= RUNNING

    def test_embeddings(self, client: openai.OpenAI) -> None:
        import openai

        with pytest.raises(openai.BadRequestError, match="this server generates text and embeds none"):
            client.embeddings.create(model=MODEL, input="a")

    def test_a_path_that_is_not_there(self, instance: Instance) -> None:
        answer = http(f"{instance.api_url}/v1/nothing", headers={"Authorization": f"Bearer {KEY}"})
        assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")


def test_the_page_has_a_row_for_each_feature() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| (works|refused|ignored|differs) \|", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 15
