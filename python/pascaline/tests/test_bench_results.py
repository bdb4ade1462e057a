"""Figures, results files, comparisons, charts and reports, from runs with known numbers."""

from __future__ import annotations

import errno
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.bench import speculation
from pascaline.bench.claims import GUIDE_CLAIMS, claims_for, guide_applies
from pascaline.bench.compare import compare, comparison_table
from pascaline.bench.experiment import Experiment, batch_points
from pascaline.bench.html_report import render, write_report
from pascaline.bench.load import Record
from pascaline.bench.metrics import METRICS, metrics_of_run, summarize
from pascaline.bench.result_charts import charts
from pascaline.bench.results import SCHEMA, Results, create_or_resume, load
from pascaline.bench.results_table import folded, results_table
from pascaline.bench.run_result import Run, Sample
from pascaline.bench.stream import Endpoint
from pascaline.bench.svg_chart import MAX_TICKS, WIDTH, Chart, Mark, Series, line_chart, number, pareto_front, ticks
from pascaline.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

EXPERIMENT = Experiment(
    kind="batch", points=batch_points([1, 4], "128", "128", None), repeats=3, seed=1, timeout=60.0
).to_json()


def record(ttft: float = 0.5, tokens: int = 11, gap: float = 0.1, error: str | None = None) -> Record:
    if error:
        return Record(started=0.0, prompt_tokens=100, error=error)
    gaps = [gap] * (tokens - 1)
    return Record(
        started=0.0, prompt_tokens=100, output_tokens=tokens, ttft=ttft, e2e=ttft + sum(gaps), itl=gaps, late=0.001
    )


def run_of(*records: Record, seconds: float = 10.0, samples: tuple[Sample, ...] = ()) -> Run:
    return Run(seed="1", started=1e9, seconds=seconds, cpu_seconds=0.05, records=list(records), samples=list(samples))


def test_figures_of_a_run_are_what_their_names_say() -> None:
    samples = (
        Sample(0.0, gpu_memory_bytes=4e9, gpu_utilization_ratio=0.5, power_watts=40.0),
        Sample(0.5, gpu_memory_bytes=5e9, gpu_utilization_ratio=1.0, power_watts=60.0),
    )
    found = metrics_of_run(run_of(record(), record(ttft=1.5), record(error="refused"), samples=samples))
    assert found == pytest.approx(
        {
            "generator_cpu_ratio": 0.005,
            "late_seconds": 0.001,
            "error_ratio": 1 / 3,
            "output_throughput": 2.2,
            "input_throughput": 20.0,
            "request_throughput": 0.2,
            "gpu_memory_bytes": 5e9,
            "gpu_utilization_ratio": 0.75,
            "power_watts": 50.0,
            "tokens_per_joule": 22 / 500,
            **dict.fromkeys(("itl_p50", "itl_p90", "itl_p99", "tpot_p50", "tpot_p90", "tpot_p99"), 0.1),
            "ttft_p50": 1.0,
            "ttft_p90": 1.4,
            "ttft_p99": 1.49,
            "e2e_p50": 2.0,
            "e2e_p90": 2.4,
            "e2e_p99": 2.49,
        }
    )


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, {}),
        ({"drafted": 0.0, "accepted": 0.0, "checks": 0.0, "won": 0.0}, {}),
        ({"drafted": 8.0, "accepted": 6.0}, {"accepted_ratio": 0.75}),
        (
            {"drafted": 8.0, "accepted": 6.0, "checks": 2.0, "won": -0.5},
            {"accepted_ratio": 0.75, "accept_length": 4.0, "won_seconds": -0.5},
        ),
    ],
)
def test_figures_of_speculation(figures: dict[str, float], expected: dict[str, float]) -> None:
    found = metrics_of_run(replace(run_of(record()), speculation=figures))
    assert {key: found[key] for key in ("accepted_ratio", "accept_length", "won_seconds") if key in found} == expected


PAGE = """\
sglang_pascal:spec_drafted_tokens_total{kind="greedy"} 70
sglang_pascal:spec_drafted_tokens_total{kind="sampled"} 7.0
sglang_pascal:spec_accepted_tokens_total{kind="greedy"} 60
sglang_pascal:spec_checks_total{kind="greedy"} 11
sglang_pascal:spec_won_seconds -1.5
"""


def test_speculation_is_read_from_the_engine_s_page(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(200, PAGE), (404, ""), (200, "{")]
    monkeypatch.setattr(speculation, "page", lambda _endpoint, _path: answers.pop(0))
    endpoint = Endpoint("http://127.0.0.1:1")
    found = speculation.read_speculation(endpoint, "sglang")
    assert found == {"drafted": 77.0, "accepted": 60.0, "checks": 11.0, "won": -1.5}
    assert speculation.difference({"drafted": 70.0, "won": 1.0}, found)["drafted"] == 7.0
    assert speculation.difference({"won": 1.0}, found)["won"] == -2.5
    assert speculation.read_speculation(endpoint, "sglang") == {}
    assert speculation.read_speculation(endpoint, "sglang") == {}
    assert speculation.read_speculation(endpoint, "unknown") == {}


def test_what_was_not_read_is_absent_and_not_zero() -> None:
    found = metrics_of_run(run_of(record(error="refused")))
    assert found == pytest.approx({"generator_cpu_ratio": 0.005, "late_seconds": 0.0, "error_ratio": 1.0})


def test_a_summary_has_a_value_an_interval_and_the_runs_of_each_figure() -> None:
    summary = summarize([run_of(record(), seconds=10.0), run_of(record(), seconds=11.0)])
    throughput = summary["output_throughput"]
    assert throughput["runs"] == pytest.approx([1.1, 1.0])
    assert throughput["value"] == pytest.approx(1.05)
    assert throughput["low"] < 1.0 < 1.1 < throughput["high"]
    assert summary["ttft_p50"] == {"value": 0.5, "low": 0.5, "high": 0.5, "runs": [0.5, 0.5]}
    assert summary.keys() <= METRICS.keys()


times = st.floats(0, 1e4).map(lambda value: round(value, 6))


@given(st.lists(st.builds(Record, times, st.integers(0, 9), st.integers(0, 9), itl=st.lists(times)), max_size=4))
def test_runs_survive_json(records: list[Record]) -> None:
    run = run_of(*records, samples=(Sample(0.25, host_memory_bytes=1e9),))
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


# --- the file ---------------------------------------------------------------------------------------------------------


def results_in(folder: Path, *values: tuple[str, float], experiment: dict[str, Any] | None = None) -> Results:
    """Results whose runs take a given number of seconds."""
    results = create_or_resume(folder, "batch", experiment or EXPERIMENT)
    results.document["machine"] = {"cpu": "Test CPU", "pascaline": "0", "driver": "580.1", "gpus": ["Tesla P4"]}
    model = {"name": "tiny", "parameters": 7_241_732_096}
    server = {"model": "tiny", "engine": "sglang", "engine_version": "0.5.23"}
    results.document["instance"] = {"server": server, "model": model}
    for name, seconds in values:
        results.add_run(name, run_of(record(), record(), seconds=seconds))
    return results


def test_every_run_is_on_disk_at_once_and_found_again(tmp_path: Path) -> None:
    results = results_in(tmp_path / "a", ("batch 1", 10.0))
    again = create_or_resume(tmp_path / "a", "batch", EXPERIMENT)
    assert again.document == results.document
    assert again.runs("batch 1") == results.runs("batch 1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]


def test_a_full_disk_costs_neither_the_runs_before_nor_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_in(tmp_path, ("batch 1", 10.0))
    before = results.path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pascaline.bench.results.json.dump", full)
    with pytest.raises(StorageError) as caught:
        results.add_run("batch 1", run_of(record()))
    assert str(caught.value) == f"failed to write {results.path}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert results.path.read_text() == before


def test_results_of_another_experiment_are_not_gone_on_with(tmp_path: Path) -> None:
    results_in(tmp_path, ("batch 1", 10.0))
    with pytest.raises(ConfigurationError) as caught:
        create_or_resume(tmp_path, "batch", EXPERIMENT | {"seed": 2, "repeats": 9})
    assert str(caught.value) == (
        f"--output: {tmp_path} holds results of another experiment (repeats, seed differ); "
        "name another folder, or repeat the command that started them"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "failed to read {path}: No such file or directory"),
        (
            "{",
            "failed to read {path}: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("[]", "{path}: schema of the results must be 1, got None"),
        ('{"schema": 99}', "{path}: schema of the results must be 1, got 99"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value) == message.format(path=path)


# --- comparison -------------------------------------------------------------------------------------------------------


def document_of(folder: Path, *seconds: float) -> dict[str, Any]:
    return results_in(folder, *(("batch 1", value) for value in seconds)).document


def verdicts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
    return {row["figure"]: row["verdict"] for row in compare(first, second)["rows"]}


def test_a_clear_difference_is_called_better_or_worse(tmp_path: Path) -> None:
    slow = document_of(tmp_path / "slow", 10.0, 10.1, 9.9, 10.0)
    fast = document_of(tmp_path / "fast", 5.0, 5.1, 4.9, 5.0)
    assert verdicts(slow, fast)["output_throughput"] == "B is better"
    assert verdicts(fast, slow)["output_throughput"] == "B is worse"
    assert verdicts(slow, fast)["ttft_p50"] == "no significant difference"


def test_noise_is_called_noise(tmp_path: Path) -> None:
    first = document_of(tmp_path / "a", 10.0, 12.0, 9.0)
    second = document_of(tmp_path / "b", 11.0, 9.5, 10.5)
    assert set(verdicts(first, second).values()) == {"no significant difference"}


def test_one_run_is_called_too_few(tmp_path: Path) -> None:
    found = verdicts(document_of(tmp_path / "a", 10.0), document_of(tmp_path / "b", 5.0))
    assert set(found.values()) == {"unknown: one run cannot show what is chance; use --repeats 3 or more"}


def test_what_else_differs_is_said_above_the_table(tmp_path: Path) -> None:
    first, second = document_of(tmp_path / "a", 10.0, 10.1), document_of(tmp_path / "b", 5.0, 5.1)
    second["machine"]["driver"] = "535.2"
    assert comparison_table(compare(first, second)).splitlines()[0] == "not alike: driver: 580.1 and 535.2"


def test_other_requests_under_the_same_name_are_said_above_the_table(tmp_path: Path) -> None:
    """`batch 1` of short prompts and of long ones differ by their load, not by what was measured."""
    first, second = document_of(tmp_path / "a", 10.0, 10.1), document_of(tmp_path / "b", 5.0, 5.1)
    second["experiment"] = json.loads(json.dumps(second["experiment"]))
    second["experiment"]["points"][0] |= {"prompt_tokens": "2048", "arrival": "fixed"}
    second["instance"] = second["instance"] | {"settings": {"kv_cache.dtype": "int8"}}
    assert compare(first, second)["unlike"] == [
        "settings given: None and {'kv_cache.dtype': 'int8'}",
        "prompt tokens: 128 and 2048 (batch 1)",
        "arrival: poisson and fixed (batch 1)",
    ]
    assert compare(first, first)["unlike"] == []


def test_results_without_a_common_point_or_kind_are_not_compared(tmp_path: Path) -> None:
    first = results_in(tmp_path / "a", ("batch 1", 10.0)).document
    second = results_in(tmp_path / "b", ("batch 4", 10.0)).document
    with pytest.raises(ConfigurationError) as caught:
        compare(first, second)
    assert str(caught.value) == "the results share no point: one has batch 1, the other batch 4"
    with pytest.raises(ConfigurationError) as caught:
        compare(first, second | {"kind": "serve"})
    assert str(caught.value) == "results of bench batch cannot be compared with those of bench serve"


# --- pictures ---------------------------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_reach_the_value(high: float) -> None:
    found = ticks(0.0, high)
    assert found[0] == 0.0
    assert found[-1] >= high * (1 - 1e-6)
    assert found[-2] < high
    assert 2 <= len(found) <= MAX_TICKS + 1


@given(st.floats(1e-6, 1e9))
def test_numbers_keep_three_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.006)
    assert "e" not in number(value)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, unique=True))
def test_nothing_beats_a_point_of_the_pareto_front(points: list[tuple[int, int]]) -> None:
    marks = [Mark(x, y) for x, y in points]

    def better(a: Mark, b: Mark) -> bool:
        return a.x <= b.x and a.y >= b.y

    front = pareto_front(marks, better)
    assert front
    assert all(any(better(each, mark) for each in front) for mark in marks)
    assert not any(better(a, b) for a in front for b in front if a is not b)


def test_rows_line_up_and_reasons_follow_the_first_table() -> None:
    rows, reasons = [["", "a", "bb"], ["x", "100", "2"], ["yy", "3", "4"]], [["z", "skipped: too long"]]
    whole = ["      a  bb", "x   100   2", "yy    3   4", "z   skipped: too long"]
    assert folded(rows, reasons) == [whole]
    assert folded(rows, reasons, width=8) == [
        ["      a", "x   100", "yy    3", "z   skipped: too long"],
        ["    bb", "x    2", "yy   4"],
    ]
    assert folded(rows, [], width=1) == [["      a", "x   100", "yy    3"], ["    bb", "x    2", "yy   4"]]
    assert folded([[""]], reasons) == [["z  skipped: too long"]]


def test_table_shows_values_with_half_their_interval(tmp_path: Path) -> None:
    document = document_of(tmp_path, 10.0, 10.0)
    document["points"].append({"name": "batch 4", "runs": [], "summary": {}, "skipped": "too wide"})
    assert results_table(document).splitlines() == [
        "         tok/s out  tok/s in  req/s  TTFT ms p50  TTFT p90  TTFT p99",
        "batch 1  2.2 ± 0.0      20.0   0.20  500.0 ± 0.0     500.0     500.0",
        "batch 4  skipped: too wide",
        "",
        "          ITL ms p50  ITL p90  ITL p99  E2E ms p50  E2E p90  E2E p99  guide",
        "batch 1  100.0 ± 0.0    100.0    100.0      1500.0   1500.0   1500.0    3.0",
    ]
    assert len(results_table(document, width=1000).splitlines()) == 3
    assert max(map(len, results_table(document, width=40).splitlines())) <= 40


def test_long_latencies_are_in_seconds_and_no_interval_goes_below_zero(tmp_path: Path) -> None:
    document = document_of(tmp_path, 10.0, 10.0)
    document["points"][0]["summary"]["e2e_p50"] = {"value": 12.3456, "low": -1.0, "high": 20.0, "runs": []}
    page = render(document)
    assert "<td>E2E p50, s</td><td>12.35<br><small>0.00 … 20.00</small></td>" in page
    assert "<td>TTFT p50, ms</td>" in page
    latency = next(chart for chart in charts(document) if "Latency of requests" in chart)
    assert ">s</text>" in latency
    assert "E2E p50: 12.3" in latency
    assert "E2E p50, s" in next(chart for chart in charts(document) if "Throughput against latency" in chart)


@pytest.mark.parametrize(
    ("gpus", "model", "expected"),
    [
        (["Tesla P4"], {"parameters": 7.2e9}, True),
        (["NVIDIA Tesla P4"], {"parameters": 6.7e9}, True),
        (["Tesla P4"], {"parameters": 1.1e9}, False),
        (["Tesla P40"], {"parameters": 7.2e9}, False),
        ([], {"parameters": 7.2e9}, False),
        (["Tesla P4"], {}, False),
    ],
)
def test_the_guide_speaks_of_a_7b_model_on_a_p4(
    tmp_path: Path, gpus: list[str], model: dict[str, float], expected: bool
) -> None:
    document = document_of(tmp_path, 10.0, 10.0)
    document["machine"]["gpus"], document["instance"]["model"] = gpus, model
    assert guide_applies(document) is expected
    assert any("guide" in chart for chart in charts(document)) is expected
    assert ("guide" in results_table(document)) is expected
    assert ("guide expects" in render(document)) is False


@pytest.mark.parametrize("length", [1, 22, 40, 70])
def test_the_names_of_a_legend_and_the_axis_stay_inside_the_picture(length: int) -> None:
    series = [Series("n" * length, [Mark(x, 1.0) for x in (0.0, 123_456.0)]) for _ in range(4)]
    for text in ET.fromstring(line_chart(Chart("t", "x", "y", series))).iter("{http://www.w3.org/2000/svg}text"):
        wide = 7 * len(text.text or "")
        left = float(text.attrib["x"]) - {"end": wide, "middle": wide / 2}.get(text.get("text-anchor", ""), 0)
        assert left >= 0
        assert left + wide <= WIDTH, text.text


def test_report_is_one_whole_page_that_needs_nothing_else(tmp_path: Path) -> None:
    results = results_in(tmp_path, *(("batch 1", 10.0),) * 3, *(("batch 4", 5.0),) * 3)
    results.document["reference"] = {
        "points": {
            "batch 1": {
                "roofline": {"output_throughput": 40.0},
                "plan": {"output_throughput": 20.0, "gpu_memory_bytes": 5e9},
            }
        },
        "note": None,
    }
    page = write_report(results).read_text()
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
    assert "<script" not in page
    for word in (
        "guide&#x27;s claim (7B, P4)",
        "plan&#x27;s estimate",
        "roofline of the card",
        "Pareto front",
        "580.1",
    ):
        assert word in page, word
    row = re.search(r"<tr><td>batch 1</td><td>2.2</td>.*?</tr>", page)
    assert row
    assert row[0] == ("<tr><td>batch 1</td><td>2.2</td><td>3.0</td><td>20.0</td><td>40.0</td><td>6%</td></tr>")


def test_several_results_are_one_page(tmp_path: Path) -> None:
    """Batch sweep, context sweep and types are measured apart and read together."""
    batch = results_in(tmp_path / "a", ("batch 1", 10.0), ("batch 4", 5.0)).document
    context = results_in(tmp_path / "b", ("batch 1", 10.0)).document | {"kind": "context"}
    page = render(batch, context)
    assert page.count("<html") == page.count("</html>") == 1
    assert re.findall("<h1>(.*?)</h1>", page) == ["Batch sweep: tiny", "Context sweep: tiny"]
    assert "<title>Batch sweep: tiny; Context sweep: tiny</title>" in page
    assert page.count("<svg") == len(charts(batch)) + len(charts(context))


def test_every_chart_is_well_formed_and_names_what_it_shows(tmp_path: Path) -> None:
    document = results_in(tmp_path, ("batch 1", 10.0), ("batch 4", 5.0)).document
    titles = []
    for chart in charts(document):
        root = ET.fromstring(chart)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        titles.append(root.get("aria-label"))
    assert titles == ["Throughput", "Latency of requests", "Inter-token latency", "Throughput against latency"]


def test_report_shows_what_the_guide_expects_of_four_requests(tmp_path: Path) -> None:
    """Row 13: the load time of the instance that was started, and figures at batch 4."""
    results = results_in(tmp_path, *(("batch 1", 10.0),) * 3, *(("batch 4", 5.0),) * 3)
    page = render(results.document)
    assert "<tr><td>output throughput at batch 4, tok/s</td><td>4.4</td><td>8.0</td></tr>" in page
    assert "<tr><td>TTFT p50 at batch 4, ms</td><td>500.0</td><td>200.0</td></tr>" in page
    assert "from start to ready" not in page
    results.document["instance"] |= {"start_seconds": 12.5}
    page = render(results.document)
    assert "<tr><td>from start to ready, s</td><td>12.5</td><td>10.0</td></tr>" in page
    assert "The guide does not say which latency its 200 ms are." in page
    results.document["points"], results.document["instance"] = results.document["points"][:1], {}
    assert "guide expects" not in render(results.document)


def test_speeds_of_types_stand_beside_claim_plan_and_roofline(tmp_path: Path) -> None:
    document = document_of(tmp_path, 10.0, 10.0)
    summary = document["points"][0]["summary"]
    names = ("F16", "Q4_K_M")
    document |= {
        "kind": "quant",
        "types": [{"name": name, "file_bytes": 2e8, "kl_mean": 0.1, "perplexity": 20.0} for name in names],
        "points": [{"name": f"{name} batch 1", "runs": [], "summary": summary, "skipped": None} for name in names],
        "reference": {
            "points": {"F16 batch 1": {"plan": {"output_throughput": 9.0}, "roofline": {"output_throughput": 15.0}}}
        },
    }
    *_, speed = charts(document)
    root = ET.fromstring(speed)
    tips = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert tips == [
        *("batch 1: 2.2", "batch 1: 2.2"),
        "guide's claim (7B, P4): 10",
        "plan's estimate, batch 1: 9",
        "roofline of the card, batch 1: 15",
    ]


@pytest.mark.parametrize("x", [0.1, 5.0, 9.9])
def test_labels_of_marks_stay_inside_the_picture(x: float) -> None:
    """At 12 pixels a character is some 7 wide."""
    label = "10 requests/s"
    chart = ET.fromstring(line_chart(Chart("t", "x", "y", [Series("s", [Mark(x, 1.0, label=label), Mark(10.0, 2.0)])])))
    text = next(each for each in chart.iter("{http://www.w3.org/2000/svg}text") if each.text == label)
    left = float(text.attrib["x"]) - (7 * len(label) if text.get("text-anchor") == "end" else 0)
    assert left >= 0
    assert left + 7 * len(label) <= WIDTH


def test_report_of_an_interrupted_benchmark_says_so(tmp_path: Path) -> None:
    document = results_in(tmp_path, ("batch 1", 10.0)).document
    assert "Interrupted: only the finished runs are shown." in render(document)
    assert "Interrupted" not in render(document | {"complete": True})


def test_names_from_outside_are_text_and_never_markup(tmp_path: Path) -> None:
    document = results_in(tmp_path, ("batch 1", 10.0)).document
    document["instance"]["server"]["model"] = "<script>alert(1)</script>"
    assert "<script" not in render(document)


def test_claims_are_the_guides() -> None:
    """Rows 3, 5 and 13 of what the guide says."""
    assert claims_for("batch", "output_throughput") == {1: 3, 2: 5, 4: 8, 8: 10}
    assert claims_for("quant", "output_throughput") == {"Q8_0": 5, "Q6_K": 7, "Q4_K_M": 10}
    assert all(claim.key in METRICS for claim in GUIDE_CLAIMS)


def test_schema_is_part_of_the_file(tmp_path: Path) -> None:
    results_in(tmp_path, ("batch 1", 10.0))
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == SCHEMA
