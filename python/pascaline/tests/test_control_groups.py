"""CPUs and memory of a process follow from the affinity mask and from every control group around it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from pascaline.control_groups import group_folders, memory_limit, oom_kills, usable_cpus

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def groups(tmp_path: Path, text: str, **files: str) -> tuple[Path, Path]:
    """Write /proc/self/cgroup and files of the hierarchy, `__` standing for a slash and `_` for a dot."""
    cgroup, root = tmp_path / "cgroup", tmp_path / "fs"
    cgroup.write_text(text)
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return cgroup, root


@pytest.mark.usefixtures("eight_cpus")
class TestUsableCpus:
    def test_without_a_quota_those_of_the_affinity_mask(self, tmp_path: Path) -> None:
        assert usable_cpus(*groups(tmp_path, "0::/a/b\n", **{"a__b__cpu-max": "max 100000"})) == 8

    @pytest.mark.parametrize(
        ("quota", "cpus"),
        [("300000", 3), ("250000", 2), ("199999", 1), ("50000", 1), ("1", 1), ("0", 1), ("9000000", 8)],
    )
    def test_whole_cpus_of_the_quota(self, tmp_path: Path, quota: str, cpus: int) -> None:
        assert usable_cpus(*groups(tmp_path, "0::/a\n", **{"a__cpu-max": f"{quota} 100000"})) == cpus

    def test_the_tightest_of_all_groups(self, tmp_path: Path) -> None:
        files = {"a__cpu-max": "200000 100000", "a__b__cpu-max": "400000 100000"}
        assert usable_cpus(*groups(tmp_path, "0::/a/b\n", **files)) == 2

    def test_in_a_container_the_root_is_its_own_group(self, tmp_path: Path) -> None:
        assert usable_cpus(*groups(tmp_path, "0::/\n", **{"cpu-max": "200000 100000"})) == 2

    @pytest.mark.parametrize(("quota", "cpus"), [("150000", 1), ("400000", 4), ("-1", 8)])
    def test_version_1(self, tmp_path: Path, quota: str, cpus: int) -> None:
        files = {"cpu__a__cpu-cfs_quota_us": quota, "cpu__a__cpu-cfs_period_us": "100000"}
        assert usable_cpus(*groups(tmp_path, "3:cpu,cpuacct:/a\n2:memory:/x\n0::/\n", **files)) == cpus

    def test_version_1_in_a_container_names_a_folder_that_only_the_host_has(self, tmp_path: Path) -> None:
        files = {"cpu__cpu-cfs_quota_us": "200000", "cpu__cpu-cfs_period_us": "100000"}
        assert usable_cpus(*groups(tmp_path, "3:cpu:/docker/0123\n", **files)) == 2

    @pytest.mark.parametrize("text", ["", "nonsense\n", "0::\n", "1:cpu\n"])
    def test_what_cannot_be_read_is_no_quota(self, tmp_path: Path, text: str) -> None:
        assert usable_cpus(*groups(tmp_path, text)) == 8

    @pytest.mark.parametrize("content", ["", "max", "300000", "many 100000", "300000 0"])
    def test_a_malformed_quota_is_none(self, tmp_path: Path, content: str) -> None:
        assert usable_cpus(*groups(tmp_path, "0::/a\n", **{"a__cpu-max": content})) == 8

    def test_no_file_at_all(self, tmp_path: Path) -> None:
        assert usable_cpus(tmp_path / "none", tmp_path) == 8


def test_folders_are_listed_innermost_first(tmp_path: Path) -> None:
    cgroup, root = groups(tmp_path, "2:memory:/x\n3:cpu:/y\n0::/a/b\n")
    assert group_folders("memory", cgroup, root) == [
        *(root / "memory/x", root / "memory"),
        *(root / "a/b", root / "a", root),
    ]


def test_this_host_has_a_cpu() -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


class TestMemory:
    def test_kills_of_its_own_group(self, tmp_path: Path) -> None:
        files = {"a__memory-events": "low 0\nhigh 3\nmax 9\noom 2\noom_kill 1", "memory-events": "oom_kill 5"}
        assert oom_kills(*groups(tmp_path, "0::/a\n", **files)) == 1

    def test_version_1(self, tmp_path: Path) -> None:
        files = {"memory__a__memory-oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4"}
        assert oom_kills(*groups(tmp_path, "4:memory:/a\n0::/\n", **files)) == 4

    @pytest.mark.parametrize("content", ["", "oom_kill", "oom_kill many", "oom 1"])
    def test_what_cannot_be_read_is_unknown(self, tmp_path: Path, content: str) -> None:
        assert oom_kills(*groups(tmp_path, "0::/a\n", **{"a__memory-events": content})) is None

    def test_a_parents_kills_are_not_its_own(self, tmp_path: Path) -> None:
        assert oom_kills(*groups(tmp_path, "0::/a/b\n", **{"a__memory-events": "oom_kill 7"})) is None

    def test_the_lowest_limit(self, tmp_path: Path) -> None:
        files = {"a__memory-max": "8589934592", "a__b__memory-max": "max"}
        assert memory_limit(*groups(tmp_path, "0::/a/b\n", **files)) == 8 << 30

    @pytest.mark.parametrize("content", ["max", "9223372036854771712", ""])
    def test_no_limit(self, tmp_path: Path, content: str) -> None:
        files = {"a__memory-max": content, "memory__a__memory-limit_in_bytes": content}
        assert memory_limit(*groups(tmp_path, "4:memory:/a\n0::/a\n", **files)) is None
