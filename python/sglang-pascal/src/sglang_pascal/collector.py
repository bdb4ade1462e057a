"""Python's garbage collector in SGLang's processes: seldom, as their imports make a million objects that stay.

With Python's own thresholds the collector looks at these objects again and again: a fifth of the CPU time of SGLang's
imports, and later a pause of all of them in the middle of a decode step.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (50_000, 20, 100)
"""New objects until the youngest are looked at, and how often that is done until older ones are. 50,000 small objects
are some 10 MB."""
PYTHONS_OWN: Final = ((700, 10, 10), (2000, 10, 10), (2000, 10, 0), (2000, 5, 100))
"""Of Python 3.11 to 3.14."""


def collect_seldom() -> None:
    """Raise the thresholds, unless somebody has already chosen others; SGLang's --gc-threshold comes later and wins."""
    if gc.get_threshold() in PYTHONS_OWN:
        gc.set_threshold(*THRESHOLDS)


def keep_what_is_there() -> None:
    """Take all objects of now out of the collector's sight; a forked process then shares their pages for longer."""
    gc.collect()
    gc.freeze()
