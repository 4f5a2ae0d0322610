"""Keeps transformers from drawing bars and printing notices into a step's own output."""

from __future__ import annotations

from functools import cache


@cache
def quiet() -> None:
    """Once per process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
