"""Runs that tests submit to the stand-in: their images, and what their steps would leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dpo.publish.version import Published
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
        hash_ = "ab" * 32
        model = Published("policy", hash_, f"{store}/policy/{hash_}", False, 7 * 2**20, 7)
        judged = {"approved": approved, "forced": False, "unchanged": False, "rules": []}
        write_run_manifest(
            open_store(store),
            run_id,
            verdict=judged,
            **({"published": asdict(model)} if approved else {}),
        )

    return write


def all_done(state: str = "SUCCEEDED") -> list[dict[str, Any]]:
    """The rows of every step, ended."""
    return [row for step in STEPS for row in task(step, state)]
