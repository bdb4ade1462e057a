"""A tiny model of every kind, served by SGLang with the plugin and by llama-server from the same file.

Both must cut texts into the same tokens, stop at the same tokens, and give the same log-probabilities, or both refuse the
file. `support.differential.table` lists the models, and with its reason each row in which llama.cpp is not the judge.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
from support.differential import llama_side
from support.differential.run import LENGTHS, POSITIONS, Outcome, prompt, relative_difference, serve_all
from support.differential.table import EXACT, STRUCTURES, TABLE, Row
from support.differential.table import POSITIONS as POSITION_ROWS
from support.differential.texts import NASTY
from support.differential.tiny import write
from support.instance import running

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FEATURES: Final = {row.name for row in (*STRUCTURES, *POSITION_ROWS)}
"""Rows whose values show whether a feature acts; the vocabulary does not change values."""
SLOW: Final = "the rest of the tiny models that both engines serve: a second each"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not llama_side.is_installed(),
        reason="llama-server is not on PATH (Debian: llama.cpp-tools)",
    ),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What came of the rows that are asked for, all served by one process of SGLang."""
    asked = {item.callspec.params["row"].name for item in request.session.items if _is_of_a_row(item)}
    return serve_all([row for row in TABLE if row.name in asked], tmp_path_factory.mktemp("tiny"))


def _is_of_a_row(item: pytest.Item) -> bool:
    return item.path.name == __file__.rpartition("/")[2] and "row" in getattr(item, "callspec", item).__dict__.get(
        "params", {}
    )


def parameters(rows: Iterable[Row]) -> list[object]:
    return [
        pytest.param(
            row,
            id=row.name.replace(" ", "-"),
            marks=() if row.fast else pytest.mark.slow(SLOW),
        )
        for row in rows
    ]


@pytest.mark.parametrize("row", parameters(TABLE))
def test_both_engines_agree(row: Row, outcomes: dict[str, Outcome]) -> None:
    found = outcomes[row.name]
    assert found.verdict == row.outcome, f"{found.error[-2000:]}{found.refusal}\n{found.theirs.error}"
    if found.verdict == "agree":
        compare(row, found, outcomes)


def compare(row: Row, found: Outcome, outcomes: dict[str, Outcome]) -> None:
    cut = zip(NASTY, found.ids, found.theirs.ids, strict=True)
    differ = {text: (ours, theirs) for text, ours, theirs in cut if ours != theirs}
    assert differ.keys() == set(row.texts), differ
    assert set(found.theirs.end_ids) - set(found.end_ids) == set(row.ends)
    assert set(found.end_ids) <= set(found.theirs.end_ids)
    if not row.wrong:
        assert found.difference <= row.tolerance
    elif row.wrong in outcomes:
        assert found.theirs.logprobs == outcomes[row.wrong].theirs.logprobs
        assert found.difference > row.tolerance


def test_every_feature_acts(outcomes: dict[str, Outcome]) -> None:
    """Rows that say the same have the same values, and no other two have: nothing in the table is without effect."""
    rows = {row.name: row for row in TABLE if row.name in outcomes and outcomes[row.name].verdict == "agree"}
    for row in rows.values():
        if row.same_as in rows:
            same = outcomes[row.same_as].logprobs
            assert (
                max(relative_difference(outcomes[row.name].logprobs[n], same[n]) for n in POSITIONS) < row.tolerance
            ), row
    last = {row.name: np.array(outcomes[row.name].logprobs[max(POSITIONS)]) for row in rows.values() if not row.same_as}
    for one, other in itertools.combinations(FEATURES & last.keys(), 2):
        if last[one].shape == last[other].shape:
            assert relative_difference(last[one], last[other]) > 2 * max(rows[one].tolerance, rows[other].tolerance), (
                one,
                other,
            )


WHOLE_SERVERS: Final = ("BPE of another family under qwen2", "gemma3")
"""Rows that differ from the one that a mere folder of their model type would give."""
START_SECONDS: Final = 400


@pytest.mark.slow("a real server for each of two tiny models")
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE if row.name in WHOLE_SERVERS])
def test_a_whole_server_gives_what_the_one_process_gives(
    row: Row, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    """Scheduler, detokenizer and HTTP change neither tokens nor log-probabilities."""
    model = write(tmp_path / "model.gguf", row.model)
    settings = {"model": model, "device": "cpu", "dtype": "float32", "context_length": 256, "max_running_requests": 4}
    with running(tmp_path, cache_dir=tmp_path / "cache", start_timeout=START_SECONDS, **settings) as instance:
        instance.wait_for_state("ready", seconds=START_SECONDS)
        texts = [text for text in NASTY if text.strip()]
        asked = {"sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True}
        cut = instance.api("/generate", asked | {"text": texts, "logprob_start_len": 0}, timeout=START_SECONDS).json
        rows = len(row.model.vocabulary["tokens"])
        given = {"input_ids": [prompt()[:length] for length in LENGTHS], "top_logprobs_num": rows}
        answers = instance.api("/generate", asked | given, timeout=START_SECONDS).json
    for text, answer in zip(texts, cut, strict=True):
        ids = [entry[1] for entry in answer["meta_info"]["input_token_logprobs"]]
        assert ids == outcomes[row.name].ids[NASTY.index(text)], text
    for length, answer in zip(LENGTHS, answers, strict=True):
        found = {entry[1]: entry[0] for entry in answer["meta_info"]["output_top_logprobs"][0]}
        assert relative_difference([found[n] for n in range(rows)], outcomes[row.name].logprobs[length]) < EXACT
