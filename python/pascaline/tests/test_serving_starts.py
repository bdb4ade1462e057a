"""The count of starts, from one run of an instance to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pascaline.serving.starts import FILE_NAME, Starts

if TYPE_CHECKING:
    from pathlib import Path


def test_it_goes_on_until_the_instance_serves(tmp_path: Path) -> None:
    environment = {"STATE_DIRECTORY": f"{tmp_path}:/another"}
    assert [Starts.from_environment(environment).begin() for _ in range(3)] == [1, 2, 3]
    Starts.from_environment(environment).settle()
    assert Starts.from_environment(environment).count() == 0
    assert Starts.from_environment(environment).begin() == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_without_a_folder_only_this_start_is_known() -> None:
    starts = Starts.from_environment({})
    assert [starts.begin(), starts.begin()] == [1, 1]
    starts.settle()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"starts": "x"}', '{"starts": true}', '{"starts": -1}', '{"starts": 1e9}', "[" * 9999],
)
def test_a_damaged_file_counts_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert Starts(tmp_path / FILE_NAME).begin() == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Starts(tmp_path / "none" / FILE_NAME).begin()
