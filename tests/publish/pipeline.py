"""Runs of the whole pipeline with no training, for what is published of them."""

import json
import shutil

from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.publish.runs import record_verdict
from dpo.publish.stage import run_publish
from dpo.storage import provenance
from dpo.storage.manifest import read_manifest, staged, write_manifest


def output(folder, stage, files, **manifest):
    with staged(folder) as partial:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content), encoding="utf-8")
        write_manifest(partial, stage, **manifest)
    return read_manifest(folder)


def source(path=None, **values):
    return {"format": "custom", "path": path, **values}


class Pipeline:
    """Runs of ingest, SFT, reference, preference, evaluate, gate and publish, with no training."""

    def __init__(self, folder, root):
        self.folder, self.root = folder, root

    def run(self, run_id, data, *, store=None, weight=0, base="", approved=True):
        """One run; ``base`` is the fingerprint of the model that SFT starts from."""
        place, store = self.folder / run_id, store or self.root
        settings = {"datasets": ["novalto"], "sources": {"novalto": data}}
        prints = {"novalto": f"etag:{run_id}"}
        pairs = output(
            place / "pairs",
            "ingest",
            {"rows.json": run_id},
            settings=settings,
            details={"sources": prints},
            code="c" * 64,
        )
        provenance.note({"model": base})
        sft = output(
            place / "sft", "sft", {"w.json": [run_id, 1]}, inputs={"pairs": pairs.content_hash}
        )
        provenance.note({})
        policy = self._policy(place, pairs, sft, weight)
        figures = {"evaluation.json": {"n_pairs": 1}, "report.html": "<p>", "samples.json": []}
        judged = output(
            place / "evaluation", "evaluate", figures, inputs={"policy": policy.content_hash}
        )
        output(
            place / "verdict",
            "gate",
            {"verdict.json": {"approved": approved}},
            inputs={"evaluation": judged.content_hash},
            details={"approved": approved},
        )
        config = compose([f"publish.store='{store}'", "model=tiny"]).config
        paths = {"evaluation": place / "evaluation", "verdict": place / "verdict"}
        record_verdict(restrict(config, "gate").publish, run_id, **paths)
        if not approved:
            return None
        run_publish(
            restrict(config, "publish"),
            place / "out",
            policy=place / "policy",
            run_id=run_id,
            **paths,
        )
        return json.loads((place / "out/published.json").read_text())

    def _policy(self, place, pairs, sft, weight):
        with staged(place / "policy") as partial:
            shutil.copytree(builtin("builtin:tiny"), partial, dirs_exist_ok=True)
            data = bytearray((partial / "model.safetensors").read_bytes())
            data[-1] = weight
            (partial / "model.safetensors").write_bytes(data)
            loss = {"name": "dpo", "beta": 0.1}
            record = {
                "config": {"loss": loss, "optimizer": "AdamW", "lr": 1e-5},
                **{"examples": 8, "steps": 2, "data_fingerprint": pairs.content_hash},
            }
            (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
            inputs = {"pairs": pairs.content_hash, "base": sft.content_hash}
            write_manifest(partial, "preference", inputs=inputs)
        return read_manifest(place / "policy")
