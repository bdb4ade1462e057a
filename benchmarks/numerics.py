"""Measures how far quantised execution in SGLang is from float32, and whether a batch changes a sequence.

    python benchmarks/numerics.py MODEL.gguf [--device cuda] [--kv-cache-dtype int8] [--json FILE]

SGLang loads the model as it is served. The reference is transformers' model with every tensor dequantised to float32.
Compared are the logits after every token of a text (prefill), those of decode steps that are fed the same text, and the
tokens at temperature 0 of sequences alone and together. Exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_in_process import InProcessEngine
from sglang_pascal.checkpoint.prepare import open_prepared, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

ROOT = Path(__file__).parents[1]
WINDOW = 512
"""Tokens that a logit may see: longer than any block of the kernels, short enough for the CPU."""
MIN_TOP1 = 0.99
MAX_KL = 0.002
MAX_PERPLEXITY_CHANGE = 0.005


@dataclass
class Agreement:
    """Agreement of two series of logits for the same text."""

    tokens: int = 0
    top1: float = 0.0
    kl: float = 0.0
    perplexity: float = 0.0
    reference_perplexity: float = 0.0

    @property
    def perplexity_change(self) -> float:
        """Change relative to the reference."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def is_within_limits(self) -> bool:
        """Whether all limits of quantised execution are kept."""
        return self.top1 >= MIN_TOP1 and self.kl <= MAX_KL and abs(self.perplexity_change) <= MAX_PERPLEXITY_CHANGE

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: top-1 {self.top1:.4f} (>= {MIN_TOP1}), KL {self.kl:.6f} (<= {MAX_KL}), perplexity "
            f"{self.perplexity:.3f} against {self.reference_perplexity:.3f}: {100 * self.perplexity_change:+.3f} % "
            f"(+-{100 * MAX_PERPLEXITY_CHANGE} %)"
        )


def agreement(pairs: Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]) -> Agreement:
    """pairs: logits `[n, vocabulary]`, the reference's, and the token that follows each."""
    import torch

    n = same = 0
    kl = loss = reference_loss = 0.0
    for logits, reference, following in pairs:
        ours, theirs = logits.log_softmax(-1), reference.to(logits.device).log_softmax(-1)
        after = torch.tensor(following, device=logits.device)[:, None]
        n += len(following)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        kl += float((theirs.exp() * (theirs - ours)).sum())
        loss -= float(ours.gather(1, after).sum())
        reference_loss -= float(theirs.gather(1, after).sum())
    return Agreement(n, same / n, kl / n, math.exp(loss / n), math.exp(reference_loss / n))


@dataclass(frozen=True)
class Reference:
    """transformers' model of a file's weights in float32."""

    model: torch.nn.Module
    device: str

    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Return the logits `[len(ids), vocabulary]` after each token."""
        import torch

        with torch.no_grad():
            result: torch.Tensor = self.model(torch.tensor([ids], device=self.device)).logits[0].float()
        return result


def load_reference(folder: Path, device: str) -> Reference:
    """Return the model in a prepared folder, with every tensor dequantised."""
    import torch
    import transformers
    from sglang_pascal.checkpoint.dequantize import dequantized
    from sglang_pascal.checkpoint.weights import raw_tensors

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(dict(dequantized(raw_tensors(open_prepared(folder)), torch.float32)), strict=False)
    model.tie_weights()
    return Reference(model.to(device), device)


def prefill_pairs(engine: InProcessEngine, reference: Any, ids: list[int]) -> Iterator[Any]:
    """Yield logits after every token of the text, in windows."""
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[start : start + WINDOW + 1]
        if len(part) > 1:
            yield engine.all_logits(part[:-1]), reference(part[:-1]), part[1:]


def decode_pairs(engine: InProcessEngine, reference: Any, ids: list[int], batch: int, steps: int) -> Iterator[Any]:
    """Yield logits after each of `steps` decoded tokens of `batch` sequences, whose first tokens are a prompt of 32."""
    import torch

    length = 32 + steps
    rows = [ids[i * length : (i + 1) * length + 1] for i in range(batch)]
    _, state = engine.prefill([row[:32] for row in rows])
    device = engine.runner.device
    found = [
        engine.decode(torch.tensor([row[32 + step] for row in rows], device=device), state) for step in range(steps)
    ]
    engine.clear()
    together = torch.stack(found)
    for i, row in enumerate(rows):
        yield together[:, i], reference(row[:-1])[32:], row[33:]


def alone_and_together(engine: InProcessEngine, ids: list[int], batch: int, n_tokens: int) -> int:
    """Return how many of the sequences get the same tokens in both ways."""
    prompts = [ids[i * 50 : i * 50 + 20 + 7 * i] for i in range(batch)]
    together = engine.greedy(prompts, n_tokens)
    return sum(engine.greedy([prompt], n_tokens) == [tokens] for prompt, tokens in zip(prompts, together, strict=True))


def text_of(path: Path | None) -> str:
    """Return the text to predict: a file, or this repository's own documentation."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--attention-backend", default="pascal")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prefill-bits", choices=("8", "16"), default="16", help="of activations (default: 16)")
    parser.add_argument("--decode-bits", choices=("8", "16"), default="16", help="likewise, of decode steps")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="tokens of the text, for prefill (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=125, help="decode steps of each sequence (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences that are decoded together (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="default: this repository's docs")
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure and print; return 1 if a limit is exceeded."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        prepare(args.model, folder)
        return measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Do `main` with a prepared folder."""
    import transformers

    os.environ |= {"SGLANG_PASCAL_PREFILL_BITS": args.prefill_bits, "SGLANG_PASCAL_DECODE_BITS": args.decode_bits}
    flags = ["--device", args.device, "--quantization", "gguf", "--attention-backend", args.attention_backend]
    flags += ["--kv-cache-dtype", args.kv_cache_dtype, "--dtype", "float16" if args.device == "cuda" else "float32"]
    flags += ["--max-total-tokens", "8192", "--mem-fraction-static", "0.2"]
    engine = InProcessEngine(folder, *flags)
    reference = load_reference(folder, args.device)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text_of(args.text))["input_ids"]
    results: dict[str, Any] = {"model": args.model.name, "device": device_name(args.device), "flags": flags}
    results |= {"prefill_bits": args.prefill_bits, "decode_bits": args.decode_bits}
    ok = True
    start = time.monotonic()
    for name, pairs in (
        ("prefill", prefill_pairs(engine, reference, ids[: args.tokens + 1])),
        ("decode", decode_pairs(engine, reference, ids, args.batch, args.steps)),
    ):
        found = agreement(pairs)
        results[name] = asdict(found) | {"within_limits": found.is_within_limits}
        ok &= found.is_within_limits
        print(f"{name:8} {found}", flush=True)
    same = alone_and_together(engine, ids, args.batch, args.steps)
    results["alone_and_together"] = {"sequences": args.batch, "tokens": args.batch * args.steps, "identical": same}
    print(f"{same} of {args.batch} sequences of {args.steps} tokens are the same alone and together")
    results["seconds"] = round(time.monotonic() - start, 1)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if ok and same == args.batch else 1


def device_name(device: str) -> str:
    """Return the device's name for the record."""
    import platform

    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
