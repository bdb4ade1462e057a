"""A page of Prometheus' text format: its sums, and no exception but the one for whatever is malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.engines import ENGINES
from pascaline.engines.base import sum_of_series
from pascaline.engines.exposition import MalformedPageError, Samples

GAUGE = 'sglang:num_running_reqs{model_name="m"} '
LLAMA = "llamacpp:requests_processing "
BAD_VALUES = ["abc", "", "+Inf", "-Inf", "Inf", "1e999", "-1", "9" * 5000, "1_0", "0x10", "1e300", "1,5", "1 2 3", "٣"]


def test_sums_by_label() -> None:
    samples = Samples('a{mode="x",l="\\"}"} 1\na{mode="y"} 2.5 1700000000\nb 4\n# a 9\n\nab 100\n', {"a", "b", "c"})
    assert (samples.sum("a"), samples.sum("a", 'mode="x"'), samples.sum("c")) == (3.5, 1.0, None)
    assert samples.total("a", "b", "c") == 7.5


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize(("engine", "start"), [("sglang", GAUGE), ("llama.cpp", LLAMA)])
def test_a_value_that_no_engine_counts(engine: str, start: str, value: str) -> None:
    page = f"{start}{value}\n"
    assert ENGINES[engine].progress(page) is None
    assert ENGINES[engine].allocated(page) == {}
    assert sum_of_series(page, start.partition("{")[0].strip()) is None


@pytest.mark.parametrize(
    "page",
    [
        GAUGE,
        GAUGE + "1",
        GAUGE + "1\n" + GAUGE + "2\n",
        'sglang:num_running_reqs{model_name="m 1\n',
        'sglang:num_running_reqs{model_name="m"\n',
        "sglang:num_running_reqs\n",
        "sglang:num_running_reqs{} {} 1\n",
        GAUGE + "1\n" + 'sglang:realtime_tokens_total{mode="dec\n',
    ],
)
def test_what_is_no_page(page: str) -> None:
    with pytest.raises(MalformedPageError):
        Samples(page, {"sglang:num_running_reqs", "sglang:realtime_tokens_total"})
    assert ENGINES["sglang"].progress(page) is None


def test_lines_of_other_series_may_be_anything() -> None:
    progress = ENGINES["sglang"].progress("x{ abc\nsglang:num_running_reqs_more +Inf\n" + GAUGE + "2\n")
    assert progress is not None
    assert progress.running == 2


@given(
    st.lists(st.sampled_from([GAUGE, LLAMA, "1", "\n", "{", "}", '"', "\\", "NaN", " ", "1e9", "\0", "é"])).map("".join)
)
def test_nothing_else_is_ever_raised(page: str) -> None:
    for engine in ENGINES.values():
        progress = engine.progress(page)
        assert progress is None or progress.running >= 0
        engine.allocated(page)
