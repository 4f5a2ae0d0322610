"""A progress bar in a notebook, by IPython's display alone (no widgets)."""

from __future__ import annotations

import sys
from html import escape
from typing import Any


def in_notebook() -> bool:
    """Whether the code runs in a cell of a Jupyter notebook; imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class NotebookBar:
    """One line of output that is drawn anew."""

    def __init__(self, step: str, unit: str, total: int | None) -> None:
        self._labels = (step, unit)
        self._total = total
        self._handle: Any = None
        self._note = ""

    def show(self, done: int, note: str) -> None:
        """Draw the bar at ``done`` with ``note`` beside it."""
        from IPython.display import HTML, display

        # the end has no figures of its own
        self._note = note or self._note
        step, unit = map(escape, self._labels)
        of = f"/{self._total}" if self._total else ""
        bar = f"<progress value='{done}' max='{self._total or max(done, 1)}'></progress>"
        content = HTML(f"<code>{step} {bar} {done}{of} {unit}&nbsp; {escape(self._note)}</code>")
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)
