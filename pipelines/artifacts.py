"""Outputs of local runs: found by their manifests, and the cache kept free of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError
from dpo.storage.manifest import MANIFEST, Manifest, read_manifest


class Artifacts:
    """The complete step outputs under kfp.local's pipeline root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of_run(self, started: float) -> dict[str, Path]:
        """Output folder of each step of the run that began at ``started`` (seconds since epoch).

        The gate is never cached, so its verdict is of this run; from there the content hashes that
        each manifest names as its inputs lead back to the outputs that were served from the cache.
        """
        found: dict[str, Path] = {}
        manifests = self._manifests()
        recent = [
            (folder, manifest)
            for folder, manifest in manifests.items()
            if manifest.stage in ("gate", "publish")
            and (folder / MANIFEST).stat().st_mtime >= started
        ]
        waiting = [hash_ for _, manifest in recent for hash_ in manifest.inputs.values()]
        found.update({manifest.stage: folder for folder, manifest in recent})
        newest_first = sorted(
            manifests.items(), key=lambda item: (item[0] / MANIFEST).stat().st_mtime, reverse=True
        )
        while waiting:
            wanted = waiting.pop()
            for folder, manifest in newest_first:
                if manifest.content_hash == wanted and manifest.stage not in found:
                    found[manifest.stage] = folder
                    waiting.extend(manifest.inputs.values())
                    break
        return found

    def _manifests(self) -> dict[Path, Manifest]:
        found = {}
        # <pipeline>-<time>/<task>/<output>/manifest.json
        for path in self.root.glob(f"*/*/*/{MANIFEST}"):
            try:
                found[path.parent] = read_manifest(path.parent, verify=False)
            except ArtifactError:
                continue
        return found


def drop_broken_cache_entries(cache: Path) -> None:
    """Forget cached outputs whose folder is incomplete, so that their step runs again.

    kfp only asks whether the path exists; a folder is whole when its manifest says so.
    """
    for entry in cache.glob("*.json"):
        try:
            outputs = json.loads(entry.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entry.unlink(missing_ok=True)
            continue
        if not all(_is_whole(output) for output in outputs.values()):
            entry.unlink(missing_ok=True)


def _is_whole(output: Any) -> bool:
    if not isinstance(output, dict) or "uri" not in output:
        return True
    folder = Path(output["uri"])
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    try:
        manifest = read_manifest(folder, verify=False)
    except ArtifactError:
        return False
    return all(
        (folder / file.path).is_file() and (folder / file.path).stat().st_size == file.size
        for file in manifest.files
    )
