"""The doctor on recorded hosts: nothing is found on a healthy one, and on each broken one exactly what is broken."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from pascaline.doctor import examine
from pascaline.doctor.checks import ALL_CHECKS
from pascaline.doctor.checks.cases import CASES
from pascaline.doctor.collect import Question, collect
from pascaline.doctor.findings_report import redact, to_json, to_text, user_names, write_report
from pascaline.doctor.verdicts import Finding, Verdict
from support.hosts import recorded_host

BROKEN = tomllib.loads((Path(__file__).parent / "broken_hosts.toml").read_text())


def findings_of(folder: Path, changes: dict | None = None, question: Question | None = None) -> dict[str, Finding]:
    machine = recorded_host(folder, changes)
    return {finding.check: finding for finding in examine(collect(machine, question or Question()))}


def shown(text: str, expected: str) -> str:
    """The expected text if it matches with any text for each …, otherwise the text itself."""
    return expected if re.fullmatch(".*".join(map(re.escape, expected.split("…"))), text) else text


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    return findings_of(tmp_path_factory.mktemp("healthy") / "host")


class TestHealthyHost:
    def test_nothing_is_found(self, healthy: dict[str, Finding]) -> None:
        """A host that serves has no finding that asks for anything."""
        asked = {name: f.evidence for name, f in healthy.items() if f.verdict not in (Verdict.OK, Verdict.SKIPPED)}
        assert asked == {}

    def test_next_to_everything_is_judged(self, healthy: dict[str, Finding]) -> None:
        """What is skipped on a host with one GPU and a running instance is what cannot be asked there."""
        skipped = {name: f.evidence for name, f in healthy.items() if f.verdict is Verdict.SKIPPED}
        assert skipped == {"glibc": "the package brings its own", "env-device-order": "all GPUs are of the same model"}

    def test_evidence_names_what_was_seen(self, healthy: dict[str, Finding]) -> None:
        """Each finding can be followed without running the check again."""
        assert healthy["driver-branch"].evidence == "driver 580.105.08, branch R580"
        assert healthy["plan-memory"].evidence.endswith("(tesla-p4, 4096 tokens of context, 16384 in the KV pool)")
        assert healthy["disk-speed"].evidence.startswith("1500 MB/s: 0 s for ")
        assert healthy["gpu-processes"].evidence == "GPU 0 (Tesla P4): 1 process(es), all ours"


class TestBrokenHosts:
    @pytest.mark.parametrize("name", BROKEN)
    def test_what_is_broken_is_found(self, name: str, healthy: dict[str, Finding], tmp_path: Path) -> None:
        """The findings that differ from the healthy host's are exactly the expected, with their whole evidence."""
        case = BROKEN[name]
        found = findings_of(tmp_path / "host", case)
        changed = {
            check: f"{finding.verdict.value}: {finding.evidence}"
            for check, finding in found.items()
            if check not in CASES and finding.verdict is not healthy[check].verdict
        }
        told = {check: text for check, text in changed.items() if not text.startswith("skipped: ")}
        expected = {
            check: text.replace("@ROOT@", str(tmp_path / "host/root")) for check, text in case["expect"].items()
        }
        assert {check: shown(text, expected.get(check, "")) for check, text in told.items()} == expected
        assert len(changed) - len(told) == case.get("skips", 0)

    def test_all_nodes_of_a_divided_socket_are_named(self, tmp_path: Path) -> None:
        """They are what numaNode takes; processes on any of them are beside the card."""
        found = findings_of(tmp_path / "host", BROKEN["divided-socket"])["numa-distance"]
        assert found.verdict is Verdict.OK
        assert found.evidence.endswith("NUMA node 0 (its socket has nodes 0, 1), as are the CPUs of its processes")

    def test_every_check_is_seen_to_find_something(self) -> None:
        """No check is without a host that it finds broken, but for those whose finding is only seen elsewhere."""
        found = {check for case in BROKEN.values() for check, text in case["expect"].items()}
        assert {check.id for check in ALL_CHECKS} - found == ELSEWHERE

    def test_each_case_of_the_guide_is_found(self, tmp_path: Path) -> None:
        """A cause of one of the guide's three cases is also that case, with the cause's remedy."""
        for case, name, cause in (
            ("case-out-of-memory", "cuda-oom-in-journal", "gpu-oom-history"),
            ("case-slow", "too-hot", "throttling"),
            ("case-model-loading", "model-truncated", "model-format"),
        ):
            found = findings_of(tmp_path / name, BROKEN[name])
            assert found[case].verdict is Verdict.FAILURE
            assert f"{cause}: {found[cause].evidence}" in found[case].evidence
            assert found[case].remedy == found[cause].remedy


ELSEWHERE = {
    "disk-space",  # a recorded folder lies on this machine's disk: test_checks.py
    "glibc",  # the recorded host is NixOS, whose package brings its own: test_checks.py
    "env-device-order",  # needs a second, different card: test_checks.py
}


class TestOutput:
    def test_remedies_are_options_on_nixos_and_commands_elsewhere(self, tmp_path: Path) -> None:
        """The same finding is mended in the way of the host's system."""
        machine = recorded_host(tmp_path / "host", BROKEN["persistence-off"])
        findings = examine(collect(machine, Question()))
        head = "! persistence: off: GPU 0 (Tesla P4)\n    → switch persistence on: without it each start of a program waits seconds for the card\n"
        assert head + "      hardware.pascaline.driver.persistence = true;\n" in to_text(findings, is_nixos=True)
        assert head + "      systemctl enable --now nvidia-persistenced || nvidia-smi -pm 1\n" in to_text(
            findings, is_nixos=False
        )

    def test_json_has_every_finding(self, healthy: dict[str, Finding]) -> None:
        """--json is complete, whatever the terminal shows."""
        document = json.loads(json.dumps(to_json(list(healthy.values()), Verdict.OK)))
        assert [finding["check"] for finding in document["findings"]] == list(healthy)
        assert (document["version"], document["verdict"]) == (1, "ok")

    def test_report_holds_evidence_and_no_secrets(self, tmp_path: Path) -> None:
        """What identifies the user, the host or a key is nowhere in the file; what explains the fault is."""
        secrets = {
            "commands/journalctl-unit": {
                "INFO    pascaline: resolve": "INFO    engine: --api-key sk-123456789abcdef Authorization: Bearer abc.def\n"
                "INFO    engine: api_key='hunter2' HF_TOKEN=hf_abcdefghijklmnop from 192.168.7.9 and fe80::1ff:fe23:4567:890a\n"
                "INFO    engine: https://bob:swordfish@models.example.org/m.gguf?sig=deadbeef /home/alice/m.gguf mail bob@example.org\n"
                "INFO    pascaline: resolve"
            }
        }
        secrets["commands/systemctl-show"] = {"HOME=": "MY_API_KEY=topsecret HOME="}
        machine = recorded_host(tmp_path / "host", {"edits": secrets})
        findings = examine(collect(machine, Question()))
        write_report(tmp_path / "report.txt", findings, machine.transcript)
        text = (tmp_path / "report.txt").read_text()
        leaked = (
            "sk-12 abc.def hunter2 hf_abc 192.168.7 fe80 bob swordfish deadbeef alice 0320000000004 GPU-00000000-0000"
        )
        assert [secret for secret in leaked.split() if secret in text] == []
        assert "driver-branch: driver 580.105.08, branch R580" in text
        assert "127.0.0.1" in text
        assert "CUDA_VISIBLE_DEVICES=0" in text
        assert '"context_length": 4096' in text

    def test_values_of_variables_that_are_none_of_the_engines_stay_out(self, tmp_path: Path) -> None:
        """No pattern finds a secret in DB_URL or DSN, so only the name of such a variable is reported."""
        machine = recorded_host(tmp_path / "host", {})
        environment = {"DSN": "correct horse", "CUDA_CACHE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        machine.environment = environment
        findings = examine(collect(machine, Question("emily.toml")))
        write_report(tmp_path / "report.txt", findings, machine.transcript)
        text = (tmp_path / "report.txt").read_text()
        assert "horse" not in text
        assert "CUDA_CACHE_DISABLE=1\nHF_HUB_OFFLINE=1\n(set, and not the engine's: DSN)\n" in text


class TestRedact:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("API_KEY=abc next", "API_KEY=(secret) next"),
            ('"api_key": "a b", "port": 1', '"api_key": (secret), "port": 1'),
            ("--api-key abc --port 1", "--api-key (secret) --port 1"),
            ("max_total_tokens=4096", "max_total_tokens=4096"),
            ("api_key_file = /run/key", "api_key_file = /run/key"),
            ("from 10.0.0.7:443", "from (address):443"),
            ("on 127.0.0.1:30000 and ::1", "on 127.0.0.1:30000 and ::1"),
            ("driver 580.105.08.01", "driver 580.105.08.01"),
            ("mac aa:bb:cc:dd:ee:ff", "mac (mac)"),
            ("at 12:34:56 on 0000:3b:00.0", "at 12:34:56 on 0000:3b:00.0"),
            ("node7 said node71", "(host) said node71"),
            ("/srv/carol/model", "~/model"),
            ("libkeyutils.so.1 (libc6)", "libkeyutils.so.1 (libc6)"),
            ("nas.corp.example:/models /srv/models nfs4 ro", "(host):/models /srv/models nfs4 ro"),
            (
                "//nas/models /srv/models cifs ro,username=bob 0 0",
                "//(host)/models /srv/models cifs ro,username=(user) 0 0",
            ),
            ("/dev/vda /srv/models ext4 rw", "/dev/vda /srv/models ext4 rw"),
            ("MYSQL_PWD=abc PASSPHRASE=abc GH_PAT=abc", "MYSQL_PWD=(secret) PASSPHRASE=(secret) GH_PAT=(secret)"),
            ("CACHE_PATH=/tmp PWD=/tmp", "CACHE_PATH=/tmp PWD=/tmp"),
            ("Authorization: Basic dXNlcjpw", "Authorization: Basic (secret)"),
            ("github_pat_11ABCDEFG0 AKIAIOSFODNN7EXAMPLE", "(secret) (secret)"),
            ("0: 0100007F:7530 0702A8C0:01BB 0A", "0: 0100007F:7530 (address):01BB 0A"),
            ("0: 00000000000000000000000001000000:7530", "0: 00000000000000000000000001000000:7530"),
            ("0: 000080FE00000000FF1F0002785634FE:0016", "0: (address):0016"),
            (
                "USER=carol uid=1000(carol) /media/carol/x carolina",
                "USER=(user) uid=1000((user)) /media/(user)/x carolina",
            ),
        ],
    )
    def test_rules(self, text: str, expected: str) -> None:
        """Each kind of secret goes, and what only looks like one stays."""
        assert redact(text, host_name="node7", home="/srv/carol", users=["carol"]) == expected

    def test_a_full_host_name_goes_and_its_first_part_too(self) -> None:
        """The kernel's log and the journal write `node7` where the host calls itself node7.example.org."""
        text = redact("node7.example.org says\nNov 26 node7 kernel: x", host_name="node7.example.org", users=[])
        assert text == "(host) says\nNov 26 (host) kernel: x"

    def test_the_person_is_known_behind_sudo_and_accounts_of_the_system_are_nobody(self) -> None:
        """`sudo pascaline doctor --report` is the usual way to a report."""
        names = user_names({"USER": "root", "LOGNAME": "daemon", "SUDO_USER": "a-person-of-no-passwd"})
        assert "a-person-of-no-passwd" in names
        assert not {"root", "daemon"} & set(names)
