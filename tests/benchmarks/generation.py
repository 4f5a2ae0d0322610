"""How much faster batched answers are than ``generate`` called prompt by prompt.

    python -m tests.benchmarks.generation [--model smollm2] [--prompts 32] [--new-tokens 64]
        [--temperature 1 --top-p 0.9]

Both answer the same held-out prompts of the packaged preference data, greedily unless a temperature
is given, with a key/value cache, on one thread for each core (or OMP_NUM_THREADS). transformers'
``generate`` is called once a prompt; ours answers in batches. Each runs once to warm up and then
alternately; the medians are compared. Prints one JSON line; exit code 1 when the ratio is below
``--at-least`` (3) or greedy answers differ (sampled ones do: each draws its own numbers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.parquet import read_pairs
from dpo.data.stage import run_ingest
from dpo.modeling.generation import answer, encode
from dpo.modeling.load import load_for_training
from dpo.modeling.obtain import obtain


def prompts_of(config: object, tokenizer: object, n: int) -> list[list[int]]:
    """Token ids of the first n different held-out prompts."""
    with tempfile.TemporaryDirectory() as folder:
        run_ingest(restrict(config, "ingest"), Path(folder, "pairs"))
        rows = read_pairs(Path(folder, "pairs"), "test").rows
    texts = list(dict.fromkeys(row.prompt for row in rows))[:n]
    return [encode(tokenizer, text, config.max_prompt_length) for text in texts]


@torch.no_grad()
def one_by_one(
    model: object,
    tokenizer: object,
    prompts: list[list[int]],
    n: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list:
    """transformers' ``generate``, a prompt at a time."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=bool(temperature),
            **sampling,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def main() -> int:
    """Measure; returns the exit code."""
    this = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    this.add_argument("--model", default="smollm2")
    this.add_argument("--prompts", type=int, default=32)
    this.add_argument("--new-tokens", type=int, default=64)
    this.add_argument("--batch", type=int, default=16)
    this.add_argument("--rounds", type=int, default=3)
    this.add_argument("--temperature", type=float, default=0.0)
    this.add_argument("--top-p", type=float, default=1.0)
    this.add_argument("--at-least", type=float, default=3.0)
    options = this.parse_args()
    how = {"temperature": options.temperature, "top_p": options.top_p}
    settings = [f"model={options.model}", "max_length=256", "max_prompt_length=128"]
    config = compose([*settings, "datasets=[hh_sample]"]).config
    obtain(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_for_training(config.model, None, device=device)
    prompts = prompts_of(config, tokenizer, options.prompts)
    seconds: dict[str, list[float]] = {"one_by_one": [], "batched": []}
    same = 0
    for number in range(options.rounds + 1):
        began = time.perf_counter()
        theirs = one_by_one(model, tokenizer, prompts, options.new_tokens, **how)
        middle = time.perf_counter()
        ours = answer(
            model,
            tokenizer,
            prompts,
            max_new_tokens=options.new_tokens,
            batch_size=options.batch,
            **how,
        )
        ended = time.perf_counter()
        same = sum(a == b.ids for a, b in zip(theirs, ours, strict=True))
        if number:
            seconds["one_by_one"].append(middle - began)
            seconds["batched"].append(ended - middle)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["one_by_one"] / medians["batched"]
    print(
        json.dumps(
            {
                "benchmark": "generation",
                "model": options.model,
                "device": device,
                "threads": torch.get_num_threads(),
                "prompts": len(prompts),
                "new_tokens": options.new_tokens,
                "batch": options.batch,
                **how,
                "seconds_one_by_one": round(medians["one_by_one"], 2),
                "seconds_batched": round(medians["batched"], 2),
                "ratio": round(ratio, 2),
                "same_answers": same,
            }
        )
    )
    # float32 sums of another order may exchange two tokens of almost equal chance, rarely
    alike = options.temperature > 0 or same >= 0.9 * len(prompts)
    return 0 if ratio >= options.at_least and alike else 1


if __name__ == "__main__":
    sys.exit(main())
