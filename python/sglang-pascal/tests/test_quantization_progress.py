"""Progress: a bar on a terminal, ten lines in a log. And with how many bits activations are multiplied."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
from sglang_pascal.names import DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE
from sglang_pascal.quantization import precision
from sglang_pascal.quantization.precision import activations_are_16_bit
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


@pytest.mark.imports_sglang
class TestPrecision:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        precision.activation_bits.cache_clear()
        for variable in (DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        yield
        precision.activation_bits.cache_clear()

    @staticmethod
    def are_16_bit_in(**backend: bool) -> bool:
        """Within a forward pass of a backend with these attributes."""
        # Here, so that SGLang is imported by one worker and not while each collects the tests.
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        with forward_context(ForwardContext(SimpleNamespace(**backend))):
            return activations_are_16_bit()

    def test_everything_has_16_bits_unless_told_not(self):
        assert [activations_are_16_bit(), self.are_16_bit_in(is_decode=True), self.are_16_bit_in(is_decode=False)] == [
            True
        ] * 3

    @pytest.mark.parametrize(("variable", "is_decode"), [(DECODE_BITS_VARIABLE, True), (PREFILL_BITS_VARIABLE, False)])
    def test_each_phase_has_its_own_variable(self, monkeypatch, variable, is_decode):
        monkeypatch.setenv(variable, "8")
        assert not self.are_16_bit_in(is_decode=is_decode)
        assert self.are_16_bit_in(is_decode=not is_decode)

    def test_a_pass_without_one_of_our_backends_counts_as_a_decode_step(self, monkeypatch):
        monkeypatch.setenv(DECODE_BITS_VARIABLE, "8")
        assert not activations_are_16_bit()
        assert not self.are_16_bit_in()

    @pytest.mark.parametrize("variable", [DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE])
    def test_another_number_is_refused(self, monkeypatch, variable):
        monkeypatch.setenv(variable, "12")
        with pytest.raises(precision.PluginError) as error:
            precision.activation_bits(variable)
        assert str(error.value) == f"{variable} is '12', must be 8 or 16; unset it for 16"
