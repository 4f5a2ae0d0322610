"""Answers to prompts: batched, with a key/value cache, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """One answer to each prompt, all in one batch padded on the left.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue; a chat template has been applied already where there is one.
        max_new_tokens: Longest answer, in tokens.
        max_prompt_length: Prompts are cut to their last so many tokens.
        temperature: 0 is greedy.
        top_p: Nucleus sampling, for temperatures above 0.
        seed: Of the sampling; the global random state is left as it was.
    """
    if not prompts:
        return []
    encoded = [
        tokenizer(prompt, add_special_tokens=False)["input_ids"][-max_prompt_length:]
        for prompt in prompts
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, encoded))
    ids = torch.full((len(encoded), longest), pad, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
            **sampling,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts
