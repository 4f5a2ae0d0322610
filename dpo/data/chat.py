"""Dialogue text into a model's chat template."""

from __future__ import annotations

import re
from typing import Any

from dpo.data.formats import Candidate, Message, RowError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_MARK = re.compile(r"<\|\w+\|>")
_WRITTEN_MARK = re.compile(r"</?[^<>\s]{1,60}>|<</?\w+>>|\[/?[A-Z_]{3,}\]")
_HEADING = re.compile(r"^\s*[^\s:][^:]{0,30}:\s*$")
_PROBE = "probe of the template"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def marks_of(tokenizer: Any) -> set[str]:
    """What a chat template writes around texts that could be taken for a turn's mark inside one.

    Words in brackets of its source and of a dialogue that it made (``<|im_start|>``, ``[INST]``,
    ``<start_of_turn>``), and headings at the start of a line (``### Assistant:``). A template that
    takes no such dialogue is left to those that are made of the data.
    """
    template = tokenizer.chat_template
    marks = set(_MARK.findall(template)) if isinstance(template, str) else set()
    for first in ([{"role": "system", "content": _PROBE}], []):
        messages = [*first]
        for role in ("user", "assistant", "user"):
            messages.append({"role": role, "content": _PROBE})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # nosec B112 - many templates take no system message
            continue
        for part in str(text).split(_PROBE):
            marks |= set(_WRITTEN_MARK.findall(part))
            marks |= {f"\n{line.strip()}" for line in part.split("\n") if _HEADING.search(line)}
    return marks


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
