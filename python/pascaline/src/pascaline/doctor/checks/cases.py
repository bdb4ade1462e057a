"""The guide's three troubleshooting cases. Each is answered by the checks that find its causes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GROUP = "The guide's cases"

CASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "case-out-of-memory": (
        "Out of memory",
        (
            "plan-memory",
            "plan-headroom",
            "kv-pool",
            "gpu-oom-history",
            "gpu-processes",
            "display",
            "oom-history",
            "host-memory",
            "cgroup-memory",
        ),
    ),
    "case-slow": (
        "Slow performance",
        (
            "gpu-utilization",
            "throttling",
            "temperature",
            "cooling",
            "power-limit",
            "application-clocks",
            "pcie-width",
            "env-launch-blocking",
            "env-cache-disable",
            "ptx-cache",
            "model-types",
            "cpu-fallback",
            "cgroup-cpu",
            "cpu-governor",
            "disk-speed",
            "queue",
        ),
    ),
    "case-model-loading": (
        "Model loading errors",
        (
            "model-format",
            "model-architecture",
            "model-checksum",
            "model-tokenizer",
            "model-chat-template",
            "model-context",
            "libcuda",
            "uvm",
            "driver-cuda",
            "torch-architectures",
            "library-architectures",
            "engine",
            "bitsandbytes",
        ),
    ),
}
"""Case -> (the guide's heading, checks that find its causes)."""


def judge_cases(findings: Sequence[Finding]) -> list[Finding]:
    """Return one finding per case: its worst cause, with the evidence of all causes."""
    by_id = {finding.check: finding for finding in findings}
    return [_judge(case, title, [by_id[name] for name in names]) for case, (title, names) in CASES.items()]


def _judge(case: str, title: str, findings: list[Finding]) -> Finding:
    title = f"{title}: no known cause is present"
    causes = [finding for finding in findings if finding.verdict.severity >= Verdict.WARNING.severity]
    if causes:
        worst = max(causes, key=lambda finding: finding.verdict.severity)
        words = "; ".join(f"{finding.check}: {finding.evidence}" for finding in causes)
        return Finding(case, title, worst.verdict, words, worst.remedy)
    judged = sum(finding.verdict is not Verdict.SKIPPED for finding in findings)
    verdict = Verdict.OK if judged else Verdict.SKIPPED
    return Finding(case, title, verdict, f"{judged} of {len(findings)} causes were checked, and none was found")
