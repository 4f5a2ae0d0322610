"""Dialogue text into a model's chat template."""

from __future__ import annotations

import re
from typing import Any

from dpo.data.formats import Candidate, Message, RowError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(prompt: str) -> tuple[Message, ...]:
    """Turns of a prompt: ``\\n\\nHuman: ...\\n\\nAssistant: ...``, or one user turn for other text.

    Raises:
        RowError: roles out of order, or text before the first turn.
    """
    parts = _TURN.split(prompt)
    if len(parts) == 1:
        return (Message("user", prompt.strip()),)
    if parts[0].strip():
        raise RowError(
            "text_before_first_turn", "the dialogue begins with text of no role", "prompt"
        )
    found = [
        Message(_ROLES[role], text.strip())
        for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    # the prompt ends with the assistant's mark, whose turn is the response
    if found[-1].role == "assistant" and not found[-1].content:
        found.pop()
    for number, turn in enumerate(found):
        if turn.role != ("user", "assistant")[number % 2] or not turn.content:
            raise RowError(
                "roles_out_of_order",
                "turns must alternate, beginning and ending with the human, and none be empty",
                "prompt",
            )
    return tuple(found)


def to_chat(candidate: Candidate, tokenizer: Any) -> Candidate:
    """The candidate with its prompt through the tokenizer's chat template, responses stripped.

    Raises:
        RowError: the dialogue does not fit a template, or the template refuses it.
    """
    messages = candidate.messages or turns(candidate.prompt)
    try:
        prompt = tokenizer.apply_chat_template(
            [message._asdict() for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # a template is a program that comes with the model, and may raise what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RowError(
            "chat_template_refuses",
            f"the model's chat template does not take this dialogue: {reason}",
            "prompt",
        ) from None
    target = candidate.sft_target
    return candidate._replace(
        prompt=prompt,
        chosen=candidate.chosen.strip(),
        rejected=candidate.rejected.strip(),
        sft_target=target.strip() if target is not None else None,
        messages=messages,
    )
