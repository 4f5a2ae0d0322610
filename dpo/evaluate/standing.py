"""What is published now, as far as the gate needs it: which version, and how good it was.

Only the gate reads this, and it is never cached: what is published changes without any step's
inputs changing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo.errors import DpoError, ObjectMissing
from dpo.storage.manifest import MANIFEST
from dpo.storage.published import read_latest, read_version
from dpo.storage.runs import parse_run, policy_of_run, run_prefix
from dpo.storage.store import Store, open_store

_CARD = "README.md"
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Standing:
    """The published version under a name."""

    content_hash: str = ""
    """Empty where nothing is published, or where ``problem`` says why it is not known."""
    run_id: str = ""
    """The run that published it, where that is known."""
    evaluation: Mapping[str, Any] | None = None
    """The figures of that run; None where they cannot be read."""
    files: Mapping[str, str] | None = None
    """sha256 of its files by path."""
    policy: str = ""
    """Content hash of the policy that it was made of, where that is known."""
    problem: str = ""
    """Why it, or its figures, cannot be read; one line."""


def standing(url: str | None, name: str) -> Standing:
    """What is published under ``name`` in the store at ``url``; never raises for what is there."""
    if not url:
        return Standing(problem="publish.store is not set")
    try:
        store = open_store(url)
        latest = read_latest(store, name)
        if latest is None:
            return Standing()
        return _of_version(store, name, latest.content_hash)
    except ObjectMissing:
        # a bucket that publish is yet to make
        return Standing()
    except DpoError as error:
        return Standing(problem=f"{error.found} ({error.where})" if error.where else error.found)


def _of_version(store: Store, name: str, content_hash: str) -> Standing:
    version = read_version(store, f"{name}/{content_hash}")
    if version is None:
        return Standing(content_hash, problem=f"version {content_hash[:12]} is not complete")
    if version["content_hash"] != content_hash:
        problem = f"another version lies in the place of {content_hash[:12]}"
        return Standing(content_hash, problem=problem)
    files = {entry["path"]: entry["sha256"] for entry in version["files"]}
    run_id = str(version["run_id"]) or _run_of(store, content_hash)
    if not run_id:
        problem = "no run in the store says that it published it"
        return Standing(content_hash, files=files, problem=problem)
    policy = str(version.get("policy") or "")
    try:
        key = f"{run_prefix(run_id)}/{MANIFEST}"
        run = parse_run(store.read(key), store.url(key))
        policy = policy or _policy_published(run, content_hash)
        if policy and policy_of_run(run) not in (policy, ""):
            problem = (
                f"its run {run_id} was used again for another policy (evaluation.published=URL "
                "measures the version itself)"
            )
            return Standing(content_hash, run_id, None, files, policy, problem)
        return Standing(content_hash, run_id, dict(run["evaluation"]), files, policy)
    except (DpoError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = error.found if isinstance(error, DpoError) else repr(error)
        problem = f"the figures of its run {run_id} cannot be read: {found}"
        return Standing(content_hash, run_id, None, files, policy, problem)


def _policy_published(run: Mapping[str, Any], content_hash: str) -> str:
    """The policy of a version whose own manifest names none (format 1)."""
    if (run.get("published") or {}).get("content_hash") != content_hash:
        return ""
    return str((run.get("policy") or {}).get("content_hash") or "")


def _run_of(store: Store, content_hash: str) -> str:
    """The run that published a version whose manifest names none (format 1)."""
    for key in store.list("runs/"):
        if not key.endswith(f"/{MANIFEST}"):
            continue
        try:
            published = json.loads(store.read(key)).get("published") or {}
        except (ValueError, AttributeError, ObjectMissing):
            continue
        if published.get("content_hash") == content_hash:
            return key.split("/")[-2]
    return ""


def is_unchanged(policy: Mapping[str, Any], published: Standing) -> bool:
    """Whether the version was made of this policy, or is its files byte for byte.

    The card is written when a model is published and is no file of the policy.

    Args:
        policy: ``content_hash`` and ``files`` (sha256 by path) of the policy.
        published: What is published.
    """
    if published.policy and published.policy == policy.get("content_hash"):
        return True
    ours: Mapping[str, str] = policy.get("files") or {}
    theirs = {path: hash_ for path, hash_ in (published.files or {}).items() if path != _CARD}
    weights = {path for path in ours if path.endswith(_WEIGHTS)}
    if not weights or weights != {path for path in theirs if path.endswith(_WEIGHTS)}:
        return False
    return all(ours.get(path, hash_) == hash_ for path, hash_ in theirs.items())
