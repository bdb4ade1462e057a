"""The garbage collector's thresholds in SGLang's processes."""

from __future__ import annotations

import gc

import pytest
from sglang_pascal import collector


@pytest.fixture(autouse=True)
def restored():
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


@pytest.mark.parametrize("own", collector.PYTHONS_OWN)
def test_pythons_own_thresholds_are_raised(own):
    gc.set_threshold(*own)
    collector.collect_seldom()
    assert gc.get_threshold() == collector.THRESHOLDS


def test_thresholds_that_somebody_chose_stay():
    gc.set_threshold(123, 4, 5)
    collector.collect_seldom()
    assert gc.get_threshold() == (123, 4, 5)


def test_what_is_there_is_not_looked_at_again():
    collector.keep_what_is_there()
    assert gc.get_freeze_count() > 1000
