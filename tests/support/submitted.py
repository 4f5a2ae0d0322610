"""Runs that tests submit to the stand-in: their images, and what their steps would leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo.storage.runs import write_run_manifest
from dpo.storage.store import open_store
from tests.support.kfp_backend import STEPS
from tests.support.workflow import task

IMAGES = [
    *("--deploy", "images.data=registry.test/data:1"),
    *("--deploy", "images.train=registry.test/train:1"),
]


def verdict(store: str, approved: bool) -> Callable[[str], None]:
    """What gate and publish leave in the store."""

    def write(run_id: str) -> None:
        published: dict[str, Any] = {"published": {"name": "policy", "content_hash": "ab" * 32}}
        write_run_manifest(
            open_store(store),
            run_id,
            verdict={"approved": approved, "rules": []},
            **(published if approved else {}),
        )

    return write


def all_done(state: str = "SUCCEEDED") -> list[dict[str, Any]]:
    """The rows of every step, ended."""
    return [row for step in STEPS for row in task(step, state)]
