"""An instance plans before it starts: what does not fit is refused with a way out, or started where that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pascaline.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.instance import Instance

    Serve = Callable[..., Instance]

# The tiny model stores 4 layers x 4 heads x 2 x 32 values, of 2 or 4 bytes each as this CPU computes: 2 or 4 KiB a token.
TOO_SMALL: dict[str, Any] = {"kv_cache.max_bytes": "64 KiB"}
SENTENCE = "kv_cache.max_bytes: 64.00 KiB holds "


class TestRefusal:
    def test_nothing_is_started_and_the_table_says_why(self, serve: Serve) -> None:
        instance = serve(**TOO_SMALL, context_length=512)
        assert instance.wait() == ExitCode.DOES_NOT_FIT, instance.text
        first, _, rest = instance.error.partition("\n")
        assert first.startswith(f"the plan does not fit: {SENTENCE}")
        assert "cannot serve a 512-token request" in first
        assert "  K KV cache " in rest
        assert "nearest that fit:\n  1. kv_cache.max_bytes " in rest
        assert "starting" not in instance.states
        assert "load …" not in instance.text

    def test_its_reason_is_one_line(self, serve: Serve) -> None:
        """Health and the journal show the sentence; the table stands once, at the end."""
        instance = serve(**TOO_SMALL, context_length=512)
        assert instance.wait() == ExitCode.DOES_NOT_FIT
        assert instance.text.count("nearest that fit:") == 1

    def test_the_first_way_out_works(self, serve: Serve) -> None:
        refused = serve(**TOO_SMALL, context_length=512)
        assert refused.wait() == ExitCode.DOES_NOT_FIT
        offered = refused.error.partition("1. kv_cache.max_bytes ")[2].partition(":")[0]
        serve(**{"kv_cache.max_bytes": offered}, context_length=512).wait_for_state("ready")


class TestOvercommit:
    def test_it_starts_and_says_so(self, serve: Serve) -> None:
        instance = serve(**TOO_SMALL, context_length=512, allow_overcommit=True)
        instance.wait_for_state("ready")
        assert f"WARNING pascaline: allow_overcommit: {SENTENCE}" in instance.text
        assert instance.agent("/plan").json["fits"] is False


class TestPlanned:
    def test_planned_beside_allocated(self, serve: Serve) -> None:
        instance = serve(context_length=512, max_running_requests=2)
        instance.wait_for_line("is ready after")
        plan = instance.agent("/plan").json
        assert plan["fits"] is True
        assert plan["allocated"]["kv_tokens"] == plan["kv_tokens"] == 1024
        assert instance.metric("pascaline_plan_total_bytes") == plan["total_bytes"]
        assert instance.metric("pascaline_plan_weights_bytes") == plan["weights_bytes"]
        assert instance.metric("pascaline_plan_kv_tokens") == instance.metric("pascaline_engine_kv_tokens") == 1024
