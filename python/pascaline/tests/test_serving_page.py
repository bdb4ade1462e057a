"""The agent's page: what its files may hold, what it shows, who may see it, and how many read it at once."""

from __future__ import annotations

import asyncio
import html.parser
import io
import json
import re
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pascaline.configuration import load
from pascaline.engines import ENGINES, Vitals
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading
from pascaline.serving.agent import create_app
from pascaline.serving.chat import MOST_BODY_BYTES, Question, request_of
from pascaline.serving.console import Console
from pascaline.serving.feed import Feed, TooManyReadersError
from pascaline.serving.health import ANSWERING, Health, State
from pascaline.serving.history import POINT_SECONDS, POINTS, History, Point
from pascaline.serving.notify import Notifier
from pascaline.serving.page import HEADERS, PATHS, WEB, Page, part, rendered
from pascaline.serving.page_gpus import gpu_states
from pascaline.serving.snapshot import RUNBOOK_SECTIONS, _kind, count, seconds, snapshot, span
from pascaline.serving.supervisor import Supervisor
from starlette.requests import Request

if TYPE_CHECKING:
    from fastapi import FastAPI

OPERATIONS = Path(__file__).parents[3] / "docs/operations.md"
MOST_BYTES = 60 * 2**10
FILES = ("page.html", "page.css", "page.js")
HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


class Collector(html.parser.HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    collector = Collector()
    collector.feed(text)
    return collector.tags


@pytest.fixture
def supervisor() -> Supervisor:
    configuration = load({"served_model_name": "emily"}, environment={})
    return Supervisor(configuration, Console(io.StringIO()), Notifier(None, None))


class Agent:
    """The agent's application, asked without a server."""

    def __init__(self, app: FastAPI, address: str = "127.0.0.1", client: str = "127.0.0.1") -> None:
        self._app = app
        self._address = address
        self._client = client

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=(self._client, 50000))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{self._address}:30001") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


@pytest.fixture
def agent(supervisor: Supervisor) -> Agent:
    return Agent(create_app(supervisor))


class TestFiles:
    def test_they_are_small(self) -> None:
        assert sorted(path.name for path in WEB.iterdir()) == sorted(FILES)
        assert sum((WEB / name).stat().st_size for name in FILES) < MOST_BYTES

    def test_nothing_is_fetched_from_elsewhere(self) -> None:
        fetched = [
            attributes.get("src") or attributes["href"]
            for tag, attributes in tags(part("page.html"))
            if "src" in attributes or (tag == "link")
        ]
        assert sorted(filter(None, fetched)) == ["data:,", "page.css", "page.js"]
        assert not re.search(r"url\(|@import|https?:", part("page.css"))
        assert re.findall(r"https?://[^\"'`$]+", part("page.js")) == ["http://www.w3.org/2000/svg"]

    def test_neither_script_nor_style_is_in_the_markup(self) -> None:
        for tag, attributes in tags(part("page.html")):
            assert tag != "style"
            assert tag != "script" or attributes.get("src")
            assert not [name for name in attributes if name == "style" or name.startswith("on")]

    def test_no_text_becomes_markup(self) -> None:
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|localStorage|sessionStorage|cookie"
        assert not re.search(forbidden, part("page.js"))

    def test_the_policy_is_strict(self) -> None:
        policy = HEADERS["Content-Security-Policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        allowed = {each.partition(" ")[2] for each in policy}
        assert allowed == {"'none'", "'self'", "data:", "'script'"}
        assert [each for each in policy if "data:" in each] == ["img-src data:"]


class TestSnapshot:
    def test_the_page_has_a_place_for_every_text_and_a_text_for_every_place(self, supervisor: Supervisor) -> None:
        shown = snapshot(supervisor, [], time.time())
        places = {attributes["data-text"] for _, attributes in tags(part("page.html")) if "data-text" in attributes}
        assert places == set(shown["texts"])
        rows = {attributes["data-rows"] for _, attributes in tags(part("page.html")) if "data-rows" in attributes}
        assert rows == set(shown["tables"])

    def test_it_is_readable_without_scripts_and_escaped(self, supervisor: Supervisor) -> None:
        supervisor.health = Health(State.STARTING, time.time() - 90, HOSTILE)
        supervisor.changes.append(supervisor.health)
        page = rendered(snapshot(supervisor, [], time.time()))
        assert "<img" not in page
        assert page.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") == 2
        assert "for 1 min 30 s, since " in page
        assert '<html lang="en" data-state="starting">' in page
        assert "<td>resolve</td><td>find the model and read its header</td><td>waits</td>" in page
        assert f"#{RUNBOOK_SECTIONS[State.STARTING]}" in page

    def test_every_state_that_is_not_ready_has_its_section(self) -> None:
        headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert set(RUNBOOK_SECTIONS.values()) <= anchors
        assert set(State) - set(RUNBOOK_SECTIONS) == {*ANSWERING, State.PLANNED, State.STOPPED}

    def test_stages_show_what_is_done_and_what_runs(self, supervisor: Supervisor) -> None:
        supervisor.stages["resolve"] = 0.04
        with supervisor._console.stage("verify") as stage:
            stage.progress(1, 4)
            rows = snapshot(supervisor, [], time.time())["tables"]["stages"]
        assert [row[2] for row in rows] == ["done", "waits", "runs", "waits", "waits"]
        assert (rows[0][3], rows[2][3]) == ("0.0 s", "█████···············  25% 0 s")

    def test_memory_shows_the_plan_and_what_the_engine_allocated(self, supervisor: Supervisor) -> None:
        parts = [
            {"key": "weights", "name": "weights", "bytes": 4 * 2**30},
            {"key": "kv_pool", "name": "KV cache", "bytes": 2**30},
            {"key": "none", "name": "nothing", "bytes": 0},
        ]
        plan = {"parts": parts, "total_bytes": 5 * 2**30, "card_bytes": 8 * 2**30, "kv_tokens": 16384}
        limits = {"card": "tesla-p4", "dtype": "float16", "context_length": 4096, "max_running_requests": 4}
        supervisor.plan = {**plan, **limits, "allocated": {"weights_bytes": 3 * 2**30}}
        shown = snapshot(supervisor, [], time.time())
        assert shown["tables"]["memory"] == [
            ["weights", "4.00 GiB", "3.00 GiB"],
            ["KV cache", "1.00 GiB", "-"],
            ["left free", "3.00 GiB", "-"],
        ]
        assert shown["parts"]["allocated"] == [["weights", 3 * 2**30]]
        assert shown["texts"]["memory"] == "5.00 GiB planned of 8.00 GiB"
        assert shown["texts"]["limits"] == "4,096 tokens of context, 4 requests at once"

    def test_it_stays_small_whatever_happened(self, supervisor: Supervisor) -> None:
        for number in range(1000):
            supervisor.history.points.append(Point(1.8e9 + number, 123.456, 0.123))
            supervisor._change(State.RESTARTING if number % 2 else State.STARTING, "x" * 200)
        assert len(json.dumps(snapshot(supervisor, [], time.time()))) < 16 * 2**10

    def test_busy_and_ready_are_no_news(self, supervisor: Supervisor) -> None:
        for state in (State.STARTING, State.READY, State.BUSY, State.READY, State.BUSY, State.RESTARTING):
            supervisor._change(state, "")
        assert [change.state for change in supervisor.changes] == ["planned", "starting", "ready", "restarting"]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3661, "1 h 1 min"), (90061, "1 d 1 h")]
)
def test_spans(length: float, expected: str) -> None:
    assert span(length) == expected


def test_units() -> None:
    assert [seconds(each) for each in (0.0421, 0.9994, 0.9996, 12.3)] == ["42 ms", "999 ms", "1.0 s", "12.3 s"]
    assert [count(each) for each in (7_241_732_096, 134_515_008, 12)] == ["7.24 B", "135 M", "12"]


class TestGpus:
    def test_only_those_of_the_instance_in_the_exporters_units(self) -> None:
        values: dict[str, Any] = {
            "nvmlDeviceGetName": "NVIDIA Tesla P4",
            "nvmlDeviceGetTemperature 0": 54,
            "nvmlDeviceGetPowerUsage": 49_300,
            "nvmlDeviceGetClockInfo 1": 1033,
            "nvmlDeviceGetMemoryInfo_v2": [8053063680, 76349440, 2071986176, 5904728064],
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4,
            "nvmlDeviceGetSupportedClocksThrottleReasons": 0x1FF,
        }
        devices = (
            DeviceReading(0, "GPU-a", DeviceStatus.OK, values=values),
            DeviceReading(1, "GPU-b", DeviceStatus.LOST, "NVML no longer counts it"),
            DeviceReading(2, "GPU-c", DeviceStatus.OK, values=values),
        )
        sound, lost = gpu_states(Reading(DriverStatus.OK, devices=devices), {"GPU-a", "GPU-b"})
        assert (sound.name, sound.temperature_celsius, sound.power_watts, sound.clock_hertz) == (
            "Tesla P4",
            54,
            49.3,
            1.033e9,
        )
        assert (sound.power_limit_watts, sound.utilization_percent) == (None, None)
        assert (sound.memory_used_bytes, sound.slowed_by) == (5904728064, ("sw_power_cap",))
        assert lost.trouble == "lost: NVML no longer counts it"

    def test_the_page_says_what_is_unknown(self, supervisor: Supervisor) -> None:
        reading = Reading(DriverStatus.OK, devices=(DeviceReading(0, "a", DeviceStatus.LOST, "no longer counted"),))
        [row] = snapshot(supervisor, gpu_states(reading, {"a"}), time.time())["tables"]["gpus"]
        assert row == ["0 GPU", "-", "-", "-", "-", "-", "lost: no longer counted"]


class TestHistory:
    def test_rates_and_means_of_each_five_seconds(self) -> None:
        history = History()
        history.add(100.0, Vitals(generated=10))
        history.add(101.0, Vitals(generated=30, ttft_seconds=1.0, ttft_count=2))
        history.add(100 + POINT_SECONDS, Vitals(generated=60, ttft_seconds=1.5, ttft_count=3))
        history.add(100 + 2 * POINT_SECONDS, Vitals(generated=60, ttft_seconds=1.5, ttft_count=3))
        assert list(history.points) == [Point(105.0, 10.0, 0.5), Point(110.0, 0.0, None)]

    def test_an_engine_that_begins_anew_gives_no_rate(self) -> None:
        history = History()
        history.add(0.0, Vitals(generated=1000))
        history.add(5.0, Vitals(generated=3))
        history.add(10.0, Vitals(generated=13))
        assert list(history.points) == [Point(10.0, 2.0, None)]
        history.forget_counters()
        history.add(20.0, Vitals(generated=500))
        assert len(history.points) == 1

    def test_a_clock_that_is_set_back_gives_no_rate(self) -> None:
        history = History()
        history.add(100.0, Vitals(generated=1))
        history.add(50.0, Vitals(generated=2))
        history.add(55.0, Vitals(generated=12))
        assert list(history.points) == [Point(55.0, 2.0, None)]

    def test_what_an_engine_does_not_report_is_unknown(self) -> None:
        history = History()
        for number in range(3):
            history.add(number * POINT_SECONDS, Vitals())
        assert list(history.points) == [Point(5.0, None, None), Point(10.0, None, None)]

    def test_it_keeps_ten_minutes(self) -> None:
        history = History()
        for number in range(2 * POINTS):
            history.add(number * POINT_SECONDS, Vitals(generated=number))
        assert len(history.points) == POINTS
        assert POINTS * POINT_SECONDS == 600


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_vitals_of_every_engine(engine: Any) -> None:
    series, name = engine.series, engine.series.generated.name
    label = "".join(f'{{{key}="{value}"}}' for key, value in series.generated.labels.items())
    lines = [f"{name}{label} 1", f"{series.kv_usage.name} 0.25"]
    if series.ttft:
        lines += [f"{series.ttft}_sum 2", f"{series.ttft}_count 3"]
    seconds, count = (2, 3) if series.ttft else (None, None)
    assert engine.vitals("\n".join([*lines, ""])) == Vitals(1, seconds, count, 0.25)
    assert engine.vitals("") == Vitals()
    assert engine.vitals(f"{name} broken") == Vitals()


class TestFeed:
    def test_one_snapshot_an_interval_for_ten_readers(self) -> None:
        made = 0

        async def make() -> bytes:
            nonlocal made
            made += 1
            return str(made).encode()

        async def main() -> list[list[bytes]]:
            feed = Feed(make, most=10, interval=0.05)

            async def read() -> list[bytes]:
                found: list[bytes] = []
                async with aclosing(feed.read()) as snapshots:
                    async for each in snapshots:
                        found.append(each)
                        if len(found) == 4:
                            return found
                return found

            read_by = await asyncio.gather(*(read() for _ in range(10)))
            assert feed.readers == 0
            assert feed._task is None
            return read_by

        read_by = asyncio.run(main())
        # Each gets one of its own at the beginning; the three after it are the same for all.
        assert len({tuple(found[1:]) for found in read_by}) == 1
        assert made == 10 + 3

    def test_there_is_a_limit(self) -> None:
        async def make() -> bytes:
            return b""

        async def main() -> None:
            feed = Feed(make, most=1)
            async with aclosing(feed.read()) as first:
                await anext(first)
                with pytest.raises(TooManyReadersError):
                    feed.admit()
            feed.admit()
            feed.close()
            with pytest.raises(TooManyReadersError):
                feed.admit()

        asyncio.run(main())

    def test_the_end_shows_the_last_state(self) -> None:
        state = "ready"

        async def make() -> bytes:
            return state.encode()

        async def main() -> list[bytes]:
            nonlocal state
            feed = Feed(make, most=1, interval=60)
            found = []
            async with aclosing(feed.read()) as snapshots:
                async for each in snapshots:
                    found.append(each)
                    state = "failed"
                    asyncio.get_running_loop().call_soon(feed.close)
            return found

        assert asyncio.run(main()) == [b"ready", b"failed"]

    def test_a_mistake_ends_the_readers_and_not_the_feed(self) -> None:
        async def main() -> None:
            broken = False

            async def make() -> bytes:
                if broken:
                    raise ZeroDivisionError
                return b"fine"

            feed = Feed(make, most=1, interval=0.01)
            async with aclosing(feed.read()) as snapshots:
                await anext(snapshots)
                broken = True
                with pytest.raises(ZeroDivisionError):
                    await anext(snapshots)
            broken = False
            async with aclosing(feed.read()) as snapshots:
                assert [await anext(snapshots), await anext(snapshots)] == [b"fine", b"fine"]

        asyncio.run(main())


class TestWhoMaySee:
    @pytest.mark.parametrize("path", sorted(PATHS - {"/chat", "/events"}))
    def test_headers_of_every_part(self, agent: Agent, path: str) -> None:
        answer = agent.get(path)
        assert answer.status_code == 200
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS

    @pytest.mark.parametrize("path", sorted(PATHS))
    def test_no_foreign_host_or_origin(self, agent: Agent, path: str) -> None:
        method = "POST" if path == "/chat" else "GET"
        for headers in (
            {"Host": "evil.example.org"},
            {"Origin": "http://evil.example.org"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            assert agent.request(method, path, headers=headers).status_code == 403, headers

    def test_a_link_from_elsewhere_may_open_it(self, agent: Agent) -> None:
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert agent.get("/", headers=headers).status_code == 200
        assert agent.post("/chat", headers=headers).status_code == 403
        assert agent.get("/", headers=headers | {"Host": "evil.example.org"}).status_code == 403

    def test_programs_see_the_rest_as_before(self, agent: Agent) -> None:
        assert agent.get("/livez", headers={"Host": "evil.example.org"}).status_code == 200
        assert "/chat" not in agent.get("/openapi.json").json()["paths"]

    def test_a_question_needs_the_key_or_this_host(self, supervisor: Supervisor, tmp_path: Path) -> None:
        app, question = create_app(supervisor), {"messages": [{"role": "user", "content": "?"}]}
        elsewhere = Agent(app, "10.0.0.2", client="10.0.0.3")
        assert elsewhere.post("/chat", json=question).status_code == 403
        (tmp_path / "key").write_text("sesame-open")
        supervisor.settings = supervisor.settings.model_copy(update={"api_key_file": tmp_path / "key"})
        assert elsewhere.post("/chat", json=question).status_code == 401
        answer = elsewhere.post("/chat", json=question, headers={"Authorization": "Bearer sesame-open"})
        assert (answer.status_code, answer.json()) == (503, {"detail": "the instance is planned: starting up"})


class TestQuestions:
    def test_what_is_asked(self) -> None:
        question = Question.model_validate({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5})
        rest = {"temperature": 0.7, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
        assert request_of(question, "emily", has_chat_template=True) == (
            "/v1/chat/completions",
            {"model": "emily", "messages": [{"role": "user", "content": "Hello"}], **rest},
        )
        assert request_of(question, "emily", has_chat_template=False) == (
            "/v1/completions",
            {"model": "emily", "prompt": "Hello", **rest},
        )

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ({}, "messages: Field required"),
            ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
            (
                {"messages": [{"role": "tool", "content": ""}]},
                "messages.0.role: Input should be 'system', 'user' or 'assistant'",
            ),
            (
                {"messages": [{"role": "user", "content": ""}], "max_tokens": 5000},
                "max_tokens: Input should be less than or equal to 4096",
            ),
            (
                {"messages": [{"role": "user", "content": ""}], "stream": False},
                "stream: Extra inputs are not permitted",
            ),
        ],
    )
    def test_what_may_not_be_asked(self, agent: Agent, body: dict[str, Any], reason: str) -> None:
        answer = agent.post("/chat", json=body)
        assert (answer.status_code, answer.json()) == (422, {"detail": reason})

    @pytest.mark.parametrize(
        ("role", "has_chat_template", "expected"),
        [
            ("generate", True, "chat"),
            ("generate", False, "completion"),
            ("embed", True, "embed"),
            ("rerank", False, "rerank"),
        ],
    )
    def test_what_can_be_asked_depends_on_the_role(self, role: Any, has_chat_template: bool, expected: str) -> None:
        assert _kind(role, has_chat_template=has_chat_template) == expected
        if role != "generate":
            assert f"  {role}: {{" in part("page.js")

    def test_a_conversation_has_a_limit(self, agent: Agent) -> None:
        answer = agent.post("/chat", content=b" " * (MOST_BODY_BYTES + 1))
        assert (answer.status_code, answer.json()) == (
            413,
            {"detail": "the conversation is longer than 262144 bytes; begin a new one"},
        )


def test_too_many_pages(supervisor: Supervisor) -> None:
    page = Page(supervisor, connections=4)

    async def main() -> None:
        async with aclosing(page.feed.read()) as first:
            await anext(first)
            answer = await page.events(Request({"type": "http", "state": {}}))
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")

    asyncio.run(main())
