"""Prompt lookup: what it finds, what it costs, and how much of it is checked."""

from __future__ import annotations

import random

import pytest
from sglang_pascal.speculation.lookup import MAX_INDEXED, MAX_MATCH, MIN_MATCH, Match, NgramIndex
from sglang_pascal.speculation.policy import Acceptance, Draft, Pace, choose_width


def indexed(tokens, **options):
    found = NgramIndex(**options)
    found.extend(tokens)
    while found.index(1000):
        pass
    return found


class TestIndex:
    def test_the_longest_match_wins_over_a_later_one(self):
        text = [1, 2, 3, 4, 5, 90, 3, 4, 5, 91, 1, 2, 3, 4, 5]
        assert indexed(text).match() == Match(5, 5)

    def test_of_two_alike_the_later_one_wins(self):
        text = [3, 4, 5, 90, 3, 4, 5, 91, 3, 4, 5]
        found = indexed(text)
        assert found.match() == Match(3, 7)
        assert found.following(found.match(), 2) == [91, 3]

    @pytest.mark.parametrize("text", [[], [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 9, 2, 3], list(range(100))])
    def test_nothing_alike_is_no_match(self, text):
        assert indexed(text).match() is None

    def test_text_that_repeats_itself_goes_on(self):
        found = indexed([7, 8] * 4)
        assert found.following(found.match(), 5) == [7, 8, 7, 8, 7]

    def test_a_match_ends_at_the_longest_that_is_compared(self):
        text = list(range(100))
        assert indexed([*text, *text]).match() == Match(MAX_MATCH, 100)

    def test_tokens_come_one_at_a_time_or_all_at_once(self):
        text = [random.Random(3).randrange(4) for _ in range(400)]
        whole, grown = indexed(text), NgramIndex()
        for token in text:
            grown.extend([token])
            grown.index(1)
        assert grown.match() == whole.match() is not None

    def test_what_is_not_indexed_yet_is_not_found(self):
        found = NgramIndex()
        found.extend([1, 2, 3, 4] * 500)
        assert found.match() is None
        assert found.index(100) == 100
        assert found.match() is not None

    def test_memory_is_bounded_and_only_the_latest_text_is_found(self):
        found = NgramIndex()
        found.extend([1, 2, 3])
        found.extend(range(10, 10 + 2 * MAX_INDEXED))
        found.extend([1, 2, 3])
        while found.index(10_000):
            pass
        assert found.match() is None
        assert found.n_bytes <= 4 * len(found) + 8 * MAX_INDEXED
        found.extend([MAX_INDEXED + 20_000, MAX_INDEXED + 20_001, MAX_INDEXED + 20_002])
        found.index(10)
        assert found.following(found.match(), 1) == [MAX_INDEXED + 20_003]

    def test_a_short_request_has_a_small_index(self):
        assert indexed([1, 2, 3], expected_tokens=300).n_bytes == 4 * 3 + 8 * 512

    def test_a_text_longer_than_expected_is_found_at_its_end(self):
        found = indexed([*range(1000), 500, 501, 502], expected_tokens=64)
        assert found.match() is None
        found = indexed([*range(1000), 990, 991, 992], expected_tokens=64)
        assert found.match() == Match(3, 993)

    def test_every_match_is_one_by_comparison(self):
        """Against a search of the whole text, over texts of few different tokens."""
        random_ = random.Random(1)
        for _ in range(200):
            text = [random_.randrange(5) for _ in range(random_.randrange(4, 80))]
            match = indexed(text).match()
            ends = [end for end in range(MIN_MATCH, len(text)) if text[end - MIN_MATCH : end] == text[-MIN_MATCH:]]
            assert (match is not None) == bool(ends)
            if match:
                assert text[match.end - match.length : match.end] == text[len(text) - match.length :]


class TestPolicy:
    def draft(self, first=0.9, following=0.9, n=15):
        return Draft(n, 10, first, following)

    def test_nothing_is_checked_without_a_draft(self):
        assert choose_width([None, None], (1, 2, 4, 8), 16, Pace(0.02)) == 1

    def test_a_likely_draft_is_checked_as_wide_as_rows_are_free(self):
        assert choose_width([self.draft()], (1, 2, 4, 8), 16, Pace(0.02)) == 8
        assert choose_width([self.draft()] * 4, (1, 2, 4, 8), 16, Pace(0.02)) == 4
        assert choose_width([self.draft()] * 8, (1, 2, 4, 8), 16, Pace(0.02)) == 2
        assert choose_width([self.draft()] * 9, (1, 2, 4, 8), 16, Pace(0.02)) == 1

    def test_an_unlikely_draft_is_not_worth_its_rows(self):
        assert choose_width([self.draft(0.03)], (1, 2, 4, 8), 16, Pace(0.02)) == 1
        assert choose_width([self.draft(0.15, 0.2)], (1, 2, 4, 8), 16, Pace(0.2)) == 1

    def test_a_costly_row_makes_the_step_narrower(self):
        widths = [choose_width([self.draft(0.8, 0.8)], (1, 2, 4, 8), 16, Pace(cost)) for cost in (0.01, 0.1, 0.3, 0.9)]
        assert widths == sorted(widths, reverse=True)
        assert (widths[0], widths[-1]) == (8, 1)

    def test_one_request_with_a_draft_does_not_pay_for_many_without(self):
        assert choose_width([self.draft(0.5, 0.5), *[None] * 7], (1, 2), 16, Pace(0.1)) == 1

    def test_a_check_that_takes_long_on_this_device_is_left_out_and_tried_again(self):
        """What the host measures counts, not what a row should cost; but it is not believed for ever."""
        pace = Pace(0.02)
        assert choose_width([self.draft()] * 4, (1, 2, 4), 16, pace) == 4
        for _ in range(3):
            pace.note(4, 4, 10)
            pace.note(4, 2, 1.2)
        assert pace.cost(4, 4) == pytest.approx(10)
        assert choose_width([self.draft()] * 4, (1, 2, 4), 16, pace) == 2
        assert choose_width([self.draft()], (1, 2, 4, 8), 16, pace) == 8
        for _ in range(1024):
            pace.step(1)
        assert choose_width([self.draft()] * 4, (1, 2, 4), 16, pace) == 4

    def test_wrong_drafts_end_and_come_back(self):
        acceptance = Acceptance()
        before = acceptance.draft(7, 3).first
        for _ in range(5):
            acceptance.note(7, 3, 0)
        after = acceptance.draft(7, 3).first
        for _ in range(1000):
            acceptance.step()
        assert after < before / 2
        assert acceptance.draft(7, 3).first == pytest.approx(before, rel=0.05)

    def test_right_drafts_make_longer_ones_likely(self):
        acceptance = Acceptance()
        before = acceptance.draft(7, 3)
        for _ in range(5):
            acceptance.note(7, 3, 7)
        after = acceptance.draft(7, 3)
        assert after.first > before.first
        assert after.next > before.next

    def test_short_and_long_matches_have_records_of_their_own(self):
        acceptance = Acceptance()
        before = acceptance.draft(7, 20).first
        for _ in range(5):
            acceptance.note(7, 3, 0)
        assert acceptance.draft(7, 20).first == before

    def test_expected_tokens(self):
        draft = Draft(3, 10, 0.5, 0.5)
        assert [draft.expected(n) for n in (0, 1, 2, 3, 4)] == [0, 0.5, 0.75, 0.875, 0.875]
