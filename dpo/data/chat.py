"""Dialogue text into a model's chat template."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dpo.data.formats import Candidate, RowError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(prompt: str) -> list[dict[str, str]]:
    """Turns of a prompt: ``\\n\\nHuman: ...\\n\\nAssistant: ...``, or one user turn for other text.

    Raises:
        RowError: roles out of order, or text before the first turn.
    """
    parts = _TURN.split(prompt)
    if len(parts) == 1:
        return [{"role": "user", "content": prompt.strip()}]
    if parts[0].strip():
        raise RowError(
            "text_before_first_turn", "the dialogue begins with text of no role", "prompt"
        )
    turns = [
        {"role": _ROLES[role], "content": text.strip()}
        for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    # the prompt ends with the assistant's mark, whose turn is the response
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    for number, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[number % 2] or not turn["content"]:
            raise RowError(
                "roles_out_of_order",
                "turns must alternate, beginning and ending with the human, and none be empty",
                "prompt",
            )
    return turns


def to_chat(candidate: Candidate, tokenizer: Any) -> Candidate:
    """The candidate with its prompt through the tokenizer's chat template, responses stripped.

    Raises:
        RowError: the dialogue does not fit a template.
    """
    prompt = tokenizer.apply_chat_template(
        messages(candidate.prompt), tokenize=False, add_generation_prompt=True
    )
    target = candidate.sft_target
    return replace(
        candidate,
        prompt=prompt,
        chosen=candidate.chosen.strip(),
        rejected=candidate.rejected.strip(),
        sft_target=target.strip() if target is not None else None,
    )
