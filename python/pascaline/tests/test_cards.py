"""The table of cards: complete, plausible, and found by the names that the driver gives."""

from __future__ import annotations

import pytest
from pascaline.cards import card_for_device, card_names, load_card

GPUS = [name for name in card_names() if name != "cpu"]
CORES_OF_A_MULTIPROCESSOR = {"6.0": 64, "6.1": 128}
"""CUDA C++ programming guide, appendix on compute capabilities."""


@pytest.mark.parametrize("name", GPUS)
def test_every_card_has_every_fact_with_a_source(name: str) -> None:
    card = load_card(name)
    needed = {
        *("memory_bytes", "bandwidth_bytes_per_second", "multiprocessors", "cores"),
        *("boost_clock_hertz", "power_limit_watts"),
    }
    assert needed <= card.facts.keys()
    assert all(fact.source for fact in card.facts.values())


@pytest.mark.parametrize("name", GPUS)
def test_the_cores_are_those_of_the_multiprocessors(name: str) -> None:
    card = load_card(name)
    assert card.compute_capability is not None
    per = CORES_OF_A_MULTIPROCESSOR[card.compute_capability]
    assert card.number("cores") == per * card.number("multiprocessors")


@pytest.mark.parametrize("name", GPUS)
def test_the_driver_reports_a_little_less_than_whole_gigabytes(name: str) -> None:
    """Nothing, ECC (6.25 % of a Tesla P4 and P40) or what the driver keeps."""
    gibibytes = load_card(name).memory_bytes / 2**30
    nominal = min((2, 3, 4, 5, 6, 8, 11, 12, 16, 24), key=lambda size: abs(size - gibibytes))
    assert 0.92 * nominal < gibibytes < nominal


def test_no_name_of_the_driver_belongs_to_two_cards() -> None:
    names = [name for card in GPUS for name in load_card(card).nvml_names]
    assert len(names) == len(set(names))
    assert all(card_for_device(name) is not None for name in names)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("Tesla P100-PCIE-16GB", "tesla-p100-16gb"),
        ("GeForce GTX 1060 3GB", "gtx-1060-3gb"),
        ("TITAN X (Pascal)", "titan-x-pascal"),
        ("Quadro P5000", "quadro-p5000"),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_found_by_the_drivers_name(device: str, card: str | None) -> None:
    found = card_for_device(device)
    assert (found.name if found else None) == card


def test_every_gpu_starts_from_the_same_settings() -> None:
    assert {tuple(sorted(load_card(name).settings.items())) for name in GPUS} == {
        tuple(sorted(load_card("tesla-p4").settings.items()))
    }
