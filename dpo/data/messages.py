"""Message lists: OpenAI form (``role``, ``content``) and ShareGPT form (``from``, ``value``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.formats import ASSISTANT, HUMAN, Candidate, Message, RowError
from dpo.data.media import holds, refuse_media

SYSTEM = "\n\nSystem:"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_TOOLS = ("tool", "function", "function_call", "observation")
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_HEADINGS = {"system": SYSTEM, "user": HUMAN, "assistant": ASSISTANT}


Messages = tuple[Message, ...]


def is_message(value: object) -> bool:
    """Whether a value has the keys of a message."""
    if not isinstance(value, Mapping):
        return False
    # a call of a tool may come without a content
    said = "content" in value or any(value.get(key) for key in _CALLS)
    return ("role" in value and said) or {"from", "value"} <= set(value)


def read_message(value: Any, field: str) -> Message:
    """A message of either form.

    Raises:
        RowError: other keys, an unknown role, or content that is no text.
    """
    if not is_message(value):
        raise RowError(
            "wrong_type",
            f"{field}: a message is {{role, content}} or {{from, value}}",
            field,
        )
    said = value["role"] if "role" in value else value["from"]
    content = value["content"] if "content" in value else value.get("value")
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if said in _TOOLS or any(value.get(key) for key in _CALLS):
        raise RowError(
            "tool_message",
            f"{field}: calls of tools and their results are no text of a dialogue: leave these "
            "turns out, or write what they say into the turn before",
            field,
        )
    if role is None:
        raise RowError(
            "unknown_role",
            f"{field}: the role {said!r} is not one of {', '.join(sorted(_ROLES))}",
            field,
        )
    refuse_media(value)
    if isinstance(content, list):
        content = _joined(content, field)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise RowError(
            "wrong_type", f"{field}: the content of a message must be a text, found a {kind}", field
        )
    return Message(role, content)


def _joined(parts: Sequence[Any], field: str) -> str:
    """The text of OpenAI's content parts, ``[{"type": "text", "text": ...}, ...]``."""
    for part in parts:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not is_text or part.get("type") not in _TEXT_PARTS:
            raise RowError(
                "wrong_type",
                f"{field}: each part of a message must be text, without images or reasoning",
                field,
            )
        refuse_media(part)
    return "".join(part["text"] for part in parts)


def refuse_reasoning(answer: Mapping[str, Any], field: str) -> None:
    """An answer is its content alone: what was thought before it must stand there as well.

    Templates leave it out of earlier turns by themselves.

    Raises:
        RowError: it stands in a field of its own.
    """
    if name := next((name for name in _REASONING if holds(answer.get(name))), ""):
        raise RowError(
            "reasoning_apart",
            f"{field}: {name} holds what was thought before the answer, and only content is "
            "learned from: write it into content as the model's template does "
            "(<think>...</think>), or leave the field out",
            field,
        )


def read_messages(value: Any, field: str) -> Messages:
    """A list of messages.

    Raises:
        RowError: not a list, or a message that cannot be read.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError("wrong_type", f"{field} must be a list of messages", field)
    return tuple(read_message(item, field) for item in value)


def check_order(prompt: Messages, field: str) -> None:
    """A prompt is: at most one system message, then user and assistant in turn, user last.

    Raises:
        RowError: another order, or no user message.
    """
    turns = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    wanted = [("user", "assistant")[index % 2] for index in range(len(turns))]
    if not turns or [turn.role for turn in turns] != wanted or turns[-1].role != "user":
        found = ", ".join(message.role for message in prompt) or "none"
        raise RowError(
            "roles_out_of_order",
            f"{field}: user and assistant must take turns, a user message last (a system message "
            f"may come first); found {found}",
            field,
        )


def as_text(prompt: Messages) -> str:
    """A dialogue in the form of Anthropic's data, open for the assistant's answer."""
    return turns_as_text(prompt) + ASSISTANT


def turns_as_text(turns: Messages) -> str:
    """Turns in the form of Anthropic's data, without a system message that says nothing."""
    said = (turn for turn in turns if turn.role != "system" or turn.content.strip())
    return "".join(f"{_HEADINGS[turn.role]} {turn.content}" for turn in said)


def candidate(
    prompt: Messages, chosen: str, rejected: str, *, split: str | None = None
) -> Candidate:
    """A pair whose prompt is a list of messages.

    Raises:
        RowError: the roles of the prompt are out of order.
    """
    check_order(prompt, "prompt")
    return Candidate(
        as_text(prompt), f" {chosen.strip()}", f" {rejected.strip()}", split=split, messages=prompt
    )
