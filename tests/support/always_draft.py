"""An SGLang plugin for a test: every step is drafted for as far as it may be, whatever that costs.

While the file named by ALWAYS_DRAFT_WRONG exists, each draft is another token than the draft model's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

WRONG = "ALWAYS_DRAFT_WRONG"


def installed(folder: Path, wrong: Path) -> dict[str, str]:
    """Return the environment in which SGLang finds this plugin. folder: an empty one."""
    shutil.copy(__file__, folder)
    described = folder / "always_draft-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: always-draft\nVersion: 0\n")
    (described / "entry_points.txt").write_text("[sglang.srt.plugins]\nalways_draft = always_draft:register\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, WRONG: str(wrong)}


def register() -> None:
    """Replace what decides by cost."""
    from sglang_pascal.speculation import drafting
    from sglang_pascal.speculation.account import Accounts

    def widest(drafts, widths, most_rows, _pace):
        allowed = [width for width in widths if len(drafts) * width <= most_rows]
        return max(allowed, default=1) if any(draft is not None for draft in drafts) else 1

    drafting.choose_width = widest
    Accounts.allows = lambda _self, _n: True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang_pascal.speculation.draft_model.DraftModel.propose", _wrong_at_times, HookType.AROUND)


def _wrong_at_times(original, model, batch, step):
    drafts = original(model, batch, step)
    return (drafts + 1) % batch.model_config.vocab_size if Path(os.environ[WRONG]).exists() else drafts
