"""Checkpoints as training leaves them, without training, and what is published of them."""

import json
import shutil

import torch

from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.publish.folder import gathered
from dpo.storage.manifest import content_hash, list_files, staged, write_manifest

# what vLLM opens of a model's folder: its loader, its tokenizer, its chat template
READ_BY_VLLM = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
}


def checkpoint(folder, fill=None, *, stage="preference", parents=None, data=None):
    """The output of a training step.

    Args:
        folder: Where to.
        fill: Writes weights, tokenizer and configuration; None copies the tiny model.
        stage: Which step.
        parents: Content hashes of its inputs.
        data: Settings of the ingest that its pairs come from.
    """
    with staged(folder) as partial:
        if fill:
            fill(partial)
        else:
            shutil.copytree(builtin("builtin:tiny"), partial, dirs_exist_ok=True)
        settings = {"loss": {"name": "dpo", "beta": 0.1}, "optimizer": "AdamW", "lr": 1e-5}
        record = {"config": settings, "examples": 8, "steps": 2, "data_fingerprint": "d" * 64}
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
        pairs = {"step": "ingest", "configuration": data, "parents": {}}
        write_manifest(partial, stage, inputs=parents, lineage={"e" * 64: pairs} if data else None)
    return folder


def settings(*overrides):
    return restrict(compose(["model=tiny", *overrides]).config, "publish")


def published(policy, target, *overrides):
    """The published files, as a folder of their own; and the version's hash."""
    with gathered(policy, settings(*overrides)) as (folder, files):
        shutil.copytree(folder, target)
        assert [(e.path, e.size, e.sha256) for e in list_files(target)] == [
            (e.path, e.size, e.sha256) for e in files
        ]
        return content_hash({entry.path: entry.sha256 for entry in files})


def logits(folder, load=None):
    from transformers import AutoModelForCausalLM

    model = (load or AutoModelForCausalLM.from_pretrained)(str(folder))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()
