"""An evaluation made of known numbers, with hostile texts."""

import numpy as np

from dpo.config.losses import DPOLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.evaluate.answers import answer_figures
from dpo.evaluate.findings import findings
from dpo.evaluate.heldout import HeldOut, figures, pair_values
from dpo.evaluate.kl import kl_figures
from dpo.modeling.generation import Answer
from tests.support.browser import HOSTILE, browser

__all__ = ["browser"]

UNBROKEN = "W" * 900


def log_probs(generator, n, shift):
    """n pairs of responses of 3 to 12 tokens; chosen ones gain ``shift`` a token."""
    rows = []
    for _ in range(n):
        lengths = generator.integers(3, 12, 2)
        values = [-generator.gamma(2, 1, length).astype(np.float32) for length in lengths]
        rows.append((values[0], values[1]))
    noise = [generator.normal(shift, 0.3, len(chosen)) for chosen, _ in rows]
    before = [PairLogProbs("test", "", *row) for row in rows]
    after = [
        PairLogProbs("test", "", (chosen + gain).astype(np.float32), rejected)
        for (chosen, rejected), gain in zip(rows, noise, strict=True)
    ]
    return before, after


def made_evaluation(shift=0.2, n=60, beta=0.1, seed=0):
    """Figures as the stage writes them, its samples, and the figures of each pair."""
    generator = np.random.default_rng(seed)
    before, after = log_probs(generator, n, shift)
    config = RunConfig(loss=DPOLoss(beta=beta))
    held_out = HeldOut(
        prompts=[f"prompt {i}" for i in range(n)],
        before=before,
        after=after,
        sources=[("hh", "<b>shp</b>")[i % 2] for i in range(n)],
        prompt_tokens=[int(x) for x in generator.integers(5, 90, n)],
    )
    result = figures(held_out, config)
    prompts = [f"p{i}" for i in range(6)]
    answers = {
        "sft": ([Answer([1], [1, 2, 3, 0], True)] * 6, ["a b c"] * 6),
        "policy": ([Answer([1], [1, 2, 3, 4, 5, 0], True)] * 6, ["a b d e f"] * 6),
    }
    kl_values = [generator.normal(-2, 1, 8).astype(np.float32) for _ in prompts]
    moved = [values - np.float32(0.1) for values in kl_values]
    result |= {
        "format_version": 2,
        "part": "all",
        "loss": config.loss.model_dump(mode="json"),
        "held_out": "pairs",
        "kl": kl_figures(prompts, kl_values, moved, n_bootstrap=100, seed=0),
        "answers": answer_figures(prompts, answers, n_bootstrap=100, seed=0),
    }
    result["findings"] = findings(result)
    texts = [
        ("plain words here", "plain other words here", 0.5),
        (HOSTILE, HOSTILE + " more", -0.25),
        ("same", "same", 0.0),
        (UNBROKEN, "short", 0.1),
        ("", "not empty", 0.2),
        ("عربي 日本語 🙂", "عربي 日本 🙂", -0.1),
    ]
    samples = [
        {
            "pair_id": f"{i:032x}",
            "dataset": ("hh", "<b>shp</b>")[i % 2],
            "prompt": HOSTILE if i == 1 else f"\n\nHuman: question {i}\n\nAssistant:",
            "chosen": HOSTILE if i == 1 else "good",
            "sft": sft,
            "policy": policy,
            "reward_change": change,
        }
        for i, (sft, policy, change) in enumerate(texts)
    ]
    pairs = {
        "pair_id": [str(i) for i in range(n)],
        "prompt": list(held_out.prompts),
        **pair_values(held_out, config),
    }
    return result, samples, pairs
