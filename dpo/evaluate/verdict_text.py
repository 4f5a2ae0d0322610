"""The gate's verdict in words, and in the report's two forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from dpo.evaluate.escaped import cell

MARK = "<!-- verdict -->"
"""Where the verdict goes in a report."""

_HTML = Markup(
    '<section class="lead {tone}" aria-label="Verdict of the gate"><p><span class="tag">{word}.'
    "</span> {text}</p><ul>{rules}</ul></section>"
)
_RULE = Markup("<li>{mark} {text}</li>")


def summary(verdict: Mapping[str, Any]) -> tuple[str, str]:
    """One word and one sentence."""
    failed = sum(not rule["passed"] for rule in verdict["rules"])
    of = f"{failed} of {len(verdict['rules'])} rules failed"
    if verdict["forced"]:
        return "Forced", f"The gate approves because gate.force is set, although {of}."
    if verdict.get("unchanged"):
        return "Unchanged", "This model is published already, byte for byte; the rules are shown."
    if verdict["approved"]:
        return "Approved", "The gate approves this model for publication: it passes every rule."
    return "Refused", f"The gate refuses this model: {of}. It is not published."


def with_verdict(report: str, verdict: Mapping[str, Any]) -> str:
    """A report, HTML or Markdown, with the verdict at its mark; unchanged where it has none."""
    word, text = summary(verdict)
    if report.lstrip().startswith("<!doctype html>"):
        rules = Markup("").join(
            _RULE.format(mark="✓" if rule["passed"] else "✗", text=rule["explanation"])
            for rule in verdict["rules"]
        )
        tone = "good" if verdict["approved"] and not verdict["forced"] else "bad"
        shown = str(_HTML.format(tone=tone, word=word, text=text, rules=rules))
    else:
        lines = [
            f"- {'✓' if rule['passed'] else '✗'} {cell(rule['explanation'])}"
            for rule in verdict["rules"]
        ]
        shown = "\n".join([f"**{word}.** {text}", "", *lines])
    return report.replace(MARK, shown, 1)
