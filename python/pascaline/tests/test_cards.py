"""The table of cards: complete, plausible, and found by the names that the driver gives."""

from __future__ import annotations

import pytest
from pascaline.cards import card_for_device, card_names, load_card, unknown_name

GPUS = [name for name in card_names() if name != "cpu"]
CORES_OF_A_MULTIPROCESSOR = {"6.0": 64, "6.1": 128}
"""CUDA C++ programming guide, appendix on compute capabilities."""
MEMORY_BUS = {
    "tesla-p4": (256, 6.0),
    "tesla-p40": (384, 7.2),
    "tesla-p6": (256, 6.0),
    "tesla-p100": (3072, 1.43),
    "tesla-p100-16gb": (4096, 1.43),
    "tesla-p100-sxm2": (4096, 1.43),
    "gtx-1050": (128, 7.0),
    "gtx-1050-ti": (128, 7.0),
    "gtx-1060-3gb": (192, 8.0),
    "gtx-1060-6gb": (192, 8.0),
    "gtx-1070": (256, 8.0),
    "gtx-1070-ti": (256, 8.0),
    "gtx-1080": (256, 10.0),
    "gtx-1080-ti": (352, 11.0),
    "titan-x-pascal": (384, 10.0),
    "titan-xp": (384, 11.4),
    "quadro-p2000": (160, 7.0),
    "quadro-p2200": (160, 10.0),
    "quadro-p4000": (256, 7.6),
    "quadro-p5000": (256, 9.0),
    "quadro-p6000": (384, 9.0),
    "quadro-gp100": (4096, 1.4),
    "mx150": (64, 6.0),
    "mx350": (64, 7.0),
}
"""Width of the memory bus (bits) and data rate of a pin (Gbit/s), from NVIDIA's specifications of each card."""
FP32_TERAFLOPS = {
    "tesla-p4": 5.5,
    "tesla-p40": 12.0,
    "tesla-p6": 6.2,
    "tesla-p100": 9.3,
    "tesla-p100-16gb": 9.3,
    "tesla-p100-sxm2": 10.6,
    "gtx-1080": 9.0,
    "titan-x-pascal": 11.0,
    "quadro-p2000": 3.0,
    "quadro-p2200": 3.8,
    "quadro-p4000": 5.3,
    "quadro-p5000": 8.9,
    "quadro-gp100": 10.3,
}
"""Peak at the boost clock, from the data sheets that state one."""


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
def test_the_bandwidth_is_that_of_the_memory_bus(name: str) -> None:
    bits, gigabits_per_second = MEMORY_BUS[name]
    expected = bits * gigabits_per_second * 1e9 / 8
    assert load_card(name).number("bandwidth_bytes_per_second") == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("name", "teraflops"), FP32_TERAFLOPS.items())
def test_the_boost_clock_gives_the_peak_of_the_data_sheet(name: str, teraflops: float) -> None:
    """A core does one multiply-add, two operations, per clock."""
    card = load_card(name)
    boost = "max_clock_hertz" if name == "tesla-p40" else "boost_clock_hertz"
    assert 2 * card.number("cores") * card.number(boost) == pytest.approx(teraflops * 1e12, rel=0.03)


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


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("P4", "tesla-p4"),
        ("NVIDIA GeForce GTX 1080 Ti", "gtx-1080-ti"),
        ("1080ti", "gtx-1080-ti"),
        ("GTX 1060 3 GB", "gtx-1060-3gb"),
        ("gtx 1060", "gtx-1060-3gb or gtx-1060-6gb"),
        ("P100 12GB", "tesla-p100"),
        ("TITAN X", "titan-x-pascal"),
    ],
)
def test_a_name_that_people_use_leads_to_the_card(name: str, suggested: str) -> None:
    assert unknown_name(name) == f"card: unknown card {name!r}, did you mean {suggested}?"


@pytest.mark.parametrize("name", ["tesla-t4", "", 7, "nvidia"])
def test_any_other_name_is_answered_by_the_list(name: object) -> None:
    assert unknown_name(name) == f"card: unknown card {name!r}, must be one of: {', '.join(card_names())}"


def test_every_gpu_starts_from_the_same_settings() -> None:
    assert {tuple(sorted(load_card(name).settings.items())) for name in GPUS} == {
        tuple(sorted(load_card("tesla-p4").settings.items()))
    }
