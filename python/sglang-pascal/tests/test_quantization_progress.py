"""Progress: a bar on a terminal, ten lines in a log."""

from __future__ import annotations

import io
import logging

import pytest
from sglang_pascal.quantization import precision
from sglang_pascal.quantization.precision import PREFILL_BITS_VARIABLE, is_wide, prefill_bits
from sglang_pascal.quantization.progress import LoadingProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_per_tenth(caplog):
    with caplog.at_level(logging.INFO), LoadingProgress(1000, io.StringIO()) as progress:
        for _ in range(100):
            progress.add(10)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0].startswith("loading weights:  10 % of 0.00 GB, ")
    assert lines[-1].startswith("loading weights: 100 % of 0.00 GB, ")


def test_large_tensors_skip_tenths(caplog):
    with caplog.at_level(logging.INFO), LoadingProgress(100, io.StringIO()) as progress:
        progress.add(5)
        progress.add(60)
        progress.add(35)
    assert len(caplog.records) == 2


def test_a_terminal_gets_a_bar_that_ends_with_its_line():
    stream = Terminal()
    with LoadingProgress(200, stream) as progress:
        progress.add(100)
        progress.add(100)
    first, *_, last = stream.getvalue().split("\r")[1:]
    assert first.startswith("[" + "#" * 16 + "." * 16 + "] loading weights:  50 %")
    assert last.startswith("[" + "#" * 32 + "] loading weights: 100 %")
    assert last.endswith("\n")


def test_an_empty_file_divides_by_nothing():
    assert LoadingProgress(0, io.StringIO()).text().startswith("loading weights:   0 % of 0.00 GB")


class TestPrecision:
    @pytest.fixture(autouse=True)
    def fresh(self):
        prefill_bits.cache_clear()
        yield
        prefill_bits.cache_clear()

    def test_everything_is_wide_unless_told_not(self, monkeypatch):
        monkeypatch.delenv(PREFILL_BITS_VARIABLE, raising=False)
        assert [is_wide(n) for n in (1, 16, 17, 4096)] == [True] * 4

    def test_eight_bits_are_for_more_rows_than_a_decode_step_has(self, monkeypatch):
        monkeypatch.setenv(PREFILL_BITS_VARIABLE, "8")
        assert [is_wide(n) for n in (1, 16, 17, 4096)] == [True, True, False, False]

    def test_another_number_is_refused(self, monkeypatch):
        monkeypatch.setenv(PREFILL_BITS_VARIABLE, "12")
        with pytest.raises(precision.PluginError) as error:
            is_wide(17)
        assert str(error.value) == "SGLANG_PASCAL_PREFILL_BITS is '12', must be 8 or 16; unset it for 16"
