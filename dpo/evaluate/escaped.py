"""Texts of others in Markdown: they bring no markup of their own."""

from __future__ import annotations

import re


def cell(text: object) -> str:
    """A text that cannot leave its cell of a table."""
    plain = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
    # nor become a link, an image that is fetched, or emphasis
    return re.sub(r"([`*_\[\]])", r"\\\1", plain.replace("<", "&lt;"))


def fenced(text: str) -> str:
    """A code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
