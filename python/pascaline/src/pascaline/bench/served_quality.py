"""Quality of a model as SGLang serves it, from the log-probabilities that it returns for a prompt.

This measures the engine's own arithmetic, and types that no other tool reads (bitsandbytes). Windows and scored tokens
are those of llama-perplexity. SGLang returns the likeliest tokens of each place, not the whole vocabulary, so the
divergence treats all other tokens as one outcome: it is at most the true one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pascaline.bench.llama_tools import WINDOW_TOKENS
from pascaline.bench.server import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pascaline.bench.stream import Endpoint

TOP_TOKENS = 32
"""Number of likeliest tokens to ask for at each place."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A server's log-probabilities for a text, token by token."""

    logprobs: list[float]
    """Log-probability of the token that follows."""
    tops: list[dict[int, float]]
    """Log-probabilities of the likeliest tokens, likeliest first."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-fmean(self.logprobs))

    def save(self, path: Path) -> None:
        """Write what `load_scores` reads."""
        path.write_text(json.dumps({"logprobs": self.logprobs, "tops": [list(top.items()) for top in self.tops]}))


def load_scores(path: Path) -> Scores:
    """Read scores back."""
    document = json.loads(path.read_text())
    return Scores(document["logprobs"], [dict(map(tuple, top)) for top in document["tops"]])


def score_server(
    endpoint: Endpoint, tokens: Sequence[int], chunks: int, on_chunk: Callable[[int], None]
) -> Scores | None:
    """Return the scores of the first `chunks` windows of a text; None for a server that gives no log-probabilities."""
    logprobs: list[float] = []
    tops: list[dict[int, float]] = []
    for number in range(chunks):
        window = list(tokens[number * WINDOW_TOKENS : (number + 1) * WINDOW_TOKENS])
        if len(window) < WINDOW_TOKENS:
            break
        found = _score_window(endpoint, window)
        if found is None:
            return None
        logprobs += found.logprobs
        tops += found.tops
        on_chunk(number + 1)
    return Scores(logprobs, tops) if logprobs else None


def compare_scores(reference: Scores, other: Scores) -> dict[str, float]:
    """Return a lower bound of the divergence (nats per token), and the share of equal top tokens."""
    pairs = list(zip(reference.tops, other.tops, strict=True))
    return {
        "served_kl_least": fmean(_divergence(p, q) for p, q in pairs),
        "served_same_top": fmean(next(iter(p)) == next(iter(q)) for p, q in pairs),
    }


def _score_window(endpoint: Endpoint, window: list[int]) -> Scores | None:
    body = {
        "input_ids": window,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": WINDOW_TOKENS // 2,
        "top_logprobs_num": TOP_TOKENS,
    }
    status, answer = ask(endpoint, "/generate", body)
    facts: Any = answer.get("meta_info") if status == 200 and isinstance(answer, dict) else None
    if not facts or not facts.get("input_token_logprobs") or not facts.get("input_top_logprobs"):
        return None
    # The first token has no log-probability: nothing was scored before it.
    scored = [
        (entry[0], top)
        for entry, top in zip(facts["input_token_logprobs"], facts["input_top_logprobs"], strict=True)
        if entry[0] is not None and top
    ]
    tops = [{token: value for value, token, *_ in sorted(top, key=lambda each: -each[0])} for _, top in scored]
    return Scores([value for value, _ in scored], tops)


def _divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """KL divergence over the tokens that both name; all others count as one outcome."""
    common = p.keys() & q.keys()
    pairs = [(math.exp(p[token]), math.exp(q[token])) for token in common]
    pairs.append((max(0.0, 1 - sum(a for a, _ in pairs)), max(0.0, 1 - sum(b for _, b in pairs))))
    return sum(a * math.log(a / b) for a, b in pairs if a > 0 and b > 0)
