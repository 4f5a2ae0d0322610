"""The chat template that is published, and what the card says of it."""

from __future__ import annotations

from pathlib import Path

FILE = "chat_template.jinja"
DIALOGUE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '\\n\\nAssistant: ' + message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '\\n\\nHuman: ' + message['content'] }}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
"""Of tokenizers that have none: the form of the raw dialogues that they were trained on."""
_DIALOGUE_WRITES = """\
The tokenizer's chat template writes
dialogues as `Human:` and `Assistant:`."""
_AS_THEY_STAND = """\
The training took each prompt as it stands in the data, with
these headings or without."""
_OTHER = """\
The tokenizer's chat template is the base model's, and
the training did not use it: its prompts were plain text, with the turns of dialogues begun by
`Human:` and `Assistant:`, each after an empty line. The figures are of prompts in that form."""
_CHAT = "The training data went through the\ntokenizer's chat template."


def sentence(model: Path, prompt_format: str) -> str:
    """What a reader must know of the template: what it writes, and whether the training used it.

    Args:
        model: Folder of what is published.
        prompt_format: Of the training data; empty where it was not recorded.
    """
    own = model / FILE
    if own.is_file() and own.read_text(encoding="utf-8") == DIALOGUE:
        used = {"chat": _CHAT, "raw": _AS_THEY_STAND}.get(prompt_format, "")
        return f"{_DIALOGUE_WRITES} {used}".rstrip()
    return {"chat": _CHAT, "raw": _OTHER}.get(prompt_format, "The tokenizer has a chat template.")
