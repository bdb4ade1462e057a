"""bitsandbytes' NF4 on a GPU: a Hugging Face folder of 16-bit weights, quantised by SGLang's loader while it loads."""

from __future__ import annotations

import importlib.util
from statistics import fmean

import pytest
import torch
import transformers
from support.hf_models import write_folder
from support.models import tiny

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of compute capability 6.0 or newer"),
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None,
        reason="bitsandbytes is not installed: pip install --no-deps bitsandbytes==0.49.2",
    ),
]
IDS = [(7 * number) % 380 + 3 for number in range(200)]


@pytest.fixture(scope="module")
def answers(run_on_gpu, tmp_path_factory):
    """Method -> (log-probabilities of the prompt's tokens, two equal greedy answers), on one random model."""
    folder = write_folder(tmp_path_factory.mktemp("hf"), tiny("llama"))
    found = {}
    for method, more in (("none", []), ("nf4", ["--quantization", "bitsandbytes", "--load-format", "bitsandbytes"])):
        options = ["--skip-tokenizer-init", "--context-length", "512", "--max-total-tokens", "2048"]
        options += ["--mem-fraction-static", "0.2", "--attention-backend", "pascal_torch", "--dtype", "float16"]
        log = tmp_path_factory.mktemp(method) / "engine.log"
        with run_on_gpu(folder, log, *options, *more) as engine:
            scored = engine.generate(IDS, 1, return_logprob=True, logprob_start_len=0)["meta_info"]
            texts = [engine.generate(IDS[:20], 16)["output_ids"] for _ in range(2)]
        found[method] = [entry[0] for entry in scored["input_token_logprobs"][1:]], texts
    return found | {"transformers": (by_transformers(folder), [])}


def by_transformers(folder):
    """Log-probabilities of the prompt's tokens by another program: transformers on the CPU, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        scored = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return scored[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()


def test_plain_weights_think_as_with_transformers(answers):
    """What NF4 is compared with is right itself: attention that computes nothing would still give probabilities."""
    plain, other = answers["none"][0], answers["transformers"][0]
    assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) < 0.05


def test_quantised_weights_think_nearly_as_the_others(answers):
    """Random weights: NF4's error is some hundredths (0.053 on the CPU); weights that were not loaded would be off by whole units."""
    plain, nf4 = (answers[method][0] for method in ("none", "nf4"))
    assert 0.001 < fmean(abs(a - b) for a, b in zip(plain, nf4, strict=True)) < 0.2


def test_decode_steps_answer_alike_each_time(answers):
    """Through the recorded graphs, one row at a time: bitsandbytes' own kernel, not its product of matrices."""
    first, second = answers["nf4"][1]
    assert first == second
    assert len(first) == 16
