"""The race against llama.cpp: its programs' output, the table and the page. No GPU: nvidia-smi and both programs are scripts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support.models import tiny, write_gguf

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def benchmark(name: str, monkeypatch):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def race(monkeypatch):
    return benchmark("race", monkeypatch)


@pytest.fixture
def race_shares(monkeypatch):
    return benchmark("race_shares", monkeypatch)


@pytest.fixture
def programs(tmp_path):
    """nvidia-smi, and both programs of llama.cpp with what they print, as scripts; and a file in place of a model."""

    def script(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
        path.chmod(0o755)
        return path

    script("nvidia-smi", "echo 'Tesla P4, 580.95, 6.1'")
    rows = [
        {"n_prompt": 512, "n_gen": 0, "flash_attn": 0, "avg_ts": 400.0},
        {"n_prompt": 512, "n_gen": 0, "flash_attn": 1, "avg_ts": 430.0},
        {"n_prompt": 0, "n_gen": 128, "flash_attn": 1, "avg_ts": 20.0},
    ]
    script("llama-bench", f"echo 'ggml_cuda_init: found 1 CUDA devices' >&2; echo '{json.dumps(rows)}'")
    script(
        "llama-batched-bench",
        'if [ "$1" = --version ]; then echo "version: 5000 (abc)" >&2; exit; fi',
        'case "$*" in *"-fa on"*) speed=30;; *) speed=25;; esac',
        'echo "main: n_kv_max = 4096"',
        'echo "{\\"pp\\": 256, \\"tg\\": 64, \\"pl\\": 1, \\"speed_tg\\": $speed}"',
        'echo "{\\"pp\\": 256, \\"tg\\": 64, \\"pl\\": 8, \\"speed_tg\\": 80}"',
    )
    write_gguf(tmp_path / "m.gguf", tiny("llama", hidden_size=2048, num_hidden_layers=1), "Q4_0", sparse=True)
    return tmp_path


def arguments(programs: Path) -> list[str]:
    return [
        *(str(programs / "m.gguf"), "--llama-bench", str(programs / "llama-bench"), "--output", str(programs / "out")),
        *("--llama-batched-bench", str(programs / "llama-batched-bench"), "--prompts", "512", "--requests", "1,8"),
    ]


def test_both_are_run_and_the_ratios_are_written(race, programs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    ours = {
        16: {"prompt": {512: 300.0}, "decode": {1: 33.0, 8: 200.0}},
        8: {"prompt": {512: 645.0}, "decode": {1: 34.0, 8: 240.0}},
    }
    monkeypatch.setattr(race, "run_ours", lambda args: (ours, ""))
    assert race.main(arguments(programs)) == 0
    page = capsys.readouterr().out
    assert (programs / "out" / "race-tesla-p4-m.md").read_text() == page
    sentence = "With activations of 8 bits 3 of 3 rows are faster than llama.cpp: from 1.13 times its speed (1 request)"
    assert page.index(sentence) < page.index("](race-tesla-p4-m.svg)") < page.index("| prompt of 512")
    assert "With activations of 16 bits 2 of 3 rows" in page
    picture = (programs / "out" / "race-tesla-p4-m.svg").read_text()
    assert picture.startswith("<svg")
    assert picture.count("<rect") >= 6, "a bar for each ratio"
    assert "| prompt of 512 | 300 | 645 | 430 | 0.70 | 1.50 | 8 bits | 1.50 |" in page, "the faster of both settings"
    assert "| 1 request | 33 | 34 | 30 | 1.10 | 1.13 | 16 bits | 1.10 |" in page
    assert "| 8 requests | 200 | 240 | 80 | 2.50 | 3.00 | 8 bits | 3.00 |" in page
    assert "version: " not in page
    assert "5000 (abc)" in page
    assert "no Pascal card" not in page
    content = json.loads((programs / "out" / "race-tesla-p4-m.json").read_text())
    assert content["rows"][0] == {
        "what": "prompt",
        "n": 512,
        "ours": {"16": 300.0, "8": 645.0},
        "llama_cpp": 430.0,
        "default_bits": 8,
    }
    assert content["notes"] == []
    assert any("-npl 1,8" in command for command in content["commands"])
    assert not any(str(programs) in command for command in content["commands"]), "a folder of this machine on the page"


def test_another_card_is_said_to_be_none_of_pascal(race):
    facts = {
        "card": "X",
        "model": "m",
        "date": "d",
        "driver": "1",
        "llama_cpp": "b",
        "is_pascal": False,
        "commands": [],
    }
    assert "**This is no Pascal card.**" in race.as_markdown([], [16], facts)


def test_what_was_not_measured_has_no_ratio(race):
    rows = race.table({8: {"prompt": {512: 10.0}, "decode": {}}}, {"prompt": {}}, {"prompt": [512], "decode": [4]})
    assert [(row.ours, row.llama_cpp, row.ratio(8)) for row in rows] == [({8: 10.0}, None, None), ({}, None, None)]


def test_a_failure_of_llama_bench_is_written_beside_what_was_measured(race, programs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (programs / "llama-bench").write_text("#!/bin/sh\necho 'error: failed to load model' >&2\nexit 1\n")
    monkeypatch.setattr(
        race, "run_ours", lambda args: ({bits: {"prompt": {}, "decode": {1: 60.0}} for bits in (16, 8)}, "")
    )
    assert race.main(arguments(programs)) == 0
    page = capsys.readouterr().out
    assert "ended with exit code 1:\nerror: failed to load model" in page
    assert "| 1 request | 60 | 60 | 30 | 2.00 | 2.00 | 16 bits | 2.00 |" in page


def test_a_failure_of_ours_leaves_the_others_figures(race, programs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(race, "run_ours", lambda args: ({}, "engine_speed.py ended with exit code 1:\nno memory"))
    assert race.main(arguments(programs)) == 10
    captured = capsys.readouterr()
    assert captured.err == "race: error: engine_speed.py ended with exit code 1:\nno memory\n"
    assert "| 1 request |  |  | 30 |  |  | 16 bits |  |" in captured.out


def test_requests_that_fail_with_graphs_are_run_without(race, programs, monkeypatch, capsys):
    """Those after them are run with graphs again."""
    (programs / "llama-batched-bench").write_text(
        """#!/bin/sh
echo "$PASCAL_GRAPHS|$GGML_CUDA_DISABLE_GRAPHS|$*" >> "${0%/*}/calls"
for word; do [ "$before" != -npl ] || sizes=$(echo "$word" | tr , ' '); before=$word; done
for n in $sizes; do
  if [ "$n" = 24 ] && [ -z "$GGML_CUDA_DISABLE_GRAPHS" ]; then echo "CUDA error" >&2; exit 134; fi
  echo "{\\"pl\\": $n, \\"speed_tg\\": $((100 + n))}"
done
"""
    )
    args = race.parse([*arguments(programs)[:-1], "16,24,32", "--llama-env", "PASCAL_GRAPHS=1"])
    notes: list[str] = []
    assert race.decode_speeds(args, "on", notes) == {16: 116.0, 24: 124.0, 32: 132.0}
    calls = (programs / "calls").read_text().splitlines()
    assert [call.partition("|-m")[0] for call in calls] == ["1|", "|1", "1|"]
    assert [call.partition("-npl ")[2].split()[0] for call in calls] == ["16,24,32", "24", "32"]
    assert "exit code 134" in notes[0]
    assert notes[1] == "24 requests: run without CUDA graphs"


@pytest.mark.parametrize(("text", "code"), [("PASCAL_GRAPHS", 2), ("PASCAL_GRAPHS=1", None)])
def test_a_variable_needs_a_value(race, programs, text, code):
    words = [*arguments(programs), "--llama-env", text]
    if code is None:
        assert race.parse(words).llama_env == {"PASCAL_GRAPHS": "1"}
    else:
        with pytest.raises(SystemExit) as caught:
            race.parse(words)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "code", "message"), [("model", 2, "there is no file"), ("program", 8, "cannot be started")]
)
def test_what_is_missing_is_named(race, programs, monkeypatch, capsys, change, code, message):
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (programs / {"model": "m.gguf", "program": "llama-batched-bench"}[change]).unlink()
    with pytest.raises(SystemExit) as caught:
        race.main(arguments(programs))
    assert caught.value.code == code
    assert message in capsys.readouterr().err


class TestShares:
    """The planner's shares are llama.cpp's, times what the race found."""

    def row(self, what: str, n: int, ours: float | None, theirs: float | None, bits: int = 8) -> dict:
        other = {"16": 1.0} if bits == 8 else {"8": 1.0}
        return {"what": what, "n": n, "ours": other | {str(bits): ours}, "llama_cpp": theirs, "default_bits": bits}

    def test_each_kind_has_its_rows(self, race_shares):
        rows = [
            self.row("prompt", 512, 440.0, 400.0),
            self.row("prompt", 8192, 900.0, 100.0),
            self.row("decode", 1, 30.0, 20.0, bits=16),
            self.row("decode", 4, 60.0, 40.0),
            self.row("decode", 16, 400.0, 100.0),
            self.row("decode", 8, None, 50.0),
        ]
        found = race_shares.ratios(rows)
        assert found["large_batch"] == [pytest.approx(1.1)]
        assert found["bandwidth"] == [1.5]
        assert found["small_batch"] == []  # one request has no speed of 8 bits here

    def test_small_batches_are_compared_in_8_bits(self, race_shares):
        def both(n: int, ours: float, theirs: float) -> dict:
            return {
                "what": "decode",
                "n": n,
                "ours": {"16": 0.9 * ours, "8": ours},
                "llama_cpp": theirs,
                "default_bits": 16,
            }

        found = race_shares.ratios([both(1, 30.0, 20.0), both(4, 60.0, 40.0)])
        assert found["bandwidth"] == [pytest.approx(0.9 * 1.5)]
        assert found["small_batch"] == [pytest.approx((4 / 40 - 1 / 20) / (4 / 60 - 1 / 30))]

    def test_a_step_that_takes_no_longer_than_one_request_says_nothing(self, race_shares):
        rows = [self.row("decode", 1, 30.0, 20.0), self.row("decode", 2, 61.0, 30.0)]
        assert race_shares.ratios(rows)["small_batch"] == []

    def test_the_range_covers_both_races(self, race_shares):
        races = [{"card": "", "model": "", "rows": [self.row("decode", 1, ours, 20.0)]} for ours in (20.0, 80.0)]
        share, base = race_shares.shares(races), race_shares.calibration("llama.cpp").bandwidth
        assert set(share) == {"bandwidth"}
        assert share["bandwidth"].by_llama_cpp == pytest.approx(2 * base)
        assert share["bandwidth"].direct is None
        assert (share["bandwidth"].low, share["bandwidth"].high) == (pytest.approx(base), pytest.approx(4 * base))

    def test_direct_shares_are_of_the_cards_dp4a_rate(self, race_shares):
        rows = [
            self.row("prompt", 512, 4500.0, 1.0),
            self.row("decode", 1, 250.0, 1.0),
            self.row("decode", 8, 1400.0, 1.0),
        ]
        found = race_shares.directly({"card": "NVIDIA H200", "model": "llama-3.1-8b.gguf", "rows": rows})
        peak, layers, head = 132 * 64 * 4 * 1.98e9, 6.98e9, 128256 * 4096
        assert found["large_batch"] == [pytest.approx(layers * 4500 / peak, rel=1e-3)]
        assert found["small_batch"] == [pytest.approx(8 * (layers + head) / (8 / 1400 - 1 / 250) / peak, rel=1e-3)]
        assert race_shares.directly({"card": "Tesla P4", "model": "llama-3.1-8b.gguf", "rows": rows}) == {}

    def test_what_the_planner_has_does_not_contradict_the_races(self, race_shares, capsys):
        assert race_shares.main([]) == 0
        assert capsys.readouterr().out.count("\n") == 5

    def test_a_planner_beyond_the_range_is_reported(self, race_shares, tmp_path, capsys):
        path = tmp_path / "race.json"
        path.write_text(json.dumps({"card": "", "model": "", "rows": [self.row("decode", 1, 2000.0, 20.0)]}))
        assert race_shares.main([str(path)]) == 1
        assert "| bandwidth |" in capsys.readouterr().out

    def test_without_a_race_it_says_so(self, race_shares, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(race_shares, "RESULTS", tmp_path)
        assert race_shares.main([]) == 2
        assert capsys.readouterr().err == f"race_shares: error: {tmp_path} has no race; run benchmarks/race.py first\n"
