"""The model card. It holds nothing that differs between equal runs: no path, time or run id.

It is checked here, for the check of ``huggingface_hub`` asks the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.config.places import BUILTIN_PREFIX
from dpo.errors import ArtifactError
from dpo.publish import licences, template
from dpo.publish.adapter import read_config
from dpo.storage.given_model import TRAINED
from dpo.storage.lineage import SFT_CHECKPOINT
from dpo.storage.manifest import Manifest
from dpo.storage.model_folder import is_adapter

FILE = "README.md"
# the rules of huggingface_hub's validate_repo_id
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.)|.*\.git$)(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECTIONS = ("Use", "Data", "Training", "Figures", "Licence", "Intended use", "Limits")
_NEEDED = ("library_name", "pipeline_tag", "license", "tags")
_FORBIDDEN = {
    "an absolute path": re.compile(r"(?:^|[\s`(\"'])(?:/[\w.-]+){2,}|[A-Za-z]:\\\\|file://"),
    "an image": re.compile(r"!\[|<img"),
}
_USE = """\
`AutoModelForCausalLM.from_pretrained(folder)` of transformers loads it, and so does vLLM
(`vllm serve folder`)."""
_LIMITS = (
    "Trained on preferences of people, it may repeat their mistakes and be wrong or offensive. "
    "Measure it on your own data before you rely on it."
)

# what the publishers of data sets state
_DATA = {
    "hh": ("Anthropic/hh-rlhf", "MIT"),
    "hh_sample": ("Anthropic/hh-rlhf, 1,900 of its pairs", "MIT"),
    "shp": ("stanfordnlp/SHP", "Reddit's terms"),
    "se": ("StackExchange preferences", "CC BY-SA 4.0"),
}
_PLACES = {
    "hh": "Anthropic/hh-rlhf",
    "hh_sample": "builtin:hh-harmless",
    "shp": "stanfordnlp/SHP",
    "se": "HuggingFaceH4/stack-exchange-preferences",
}
"""Where the shipped configuration has them from: a file of such a name is somebody's own."""


def model_card(
    policy: Path, manifest: Manifest, name: str, base: str, license_: str, model: Path | None = None
) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        policy: Checkpoint of the preference stage.
        manifest: Its manifest.
        name: Name under which it is published.
        base: Hub id of the base model or the name of a built-in one; any other is one's own.
        license_: Licence of the model; empty takes the base model's where it is known.
        model: Folder of what is published, where that is another.
    """
    if manifest.stage not in TRAINED:
        return _bare_card(manifest, name, license_, model or policy)
    run = json.loads((policy / "run.json").read_text(encoding="utf-8"))
    config = run["config"]
    loss = config["loss"]
    licence = licences.metadata(license_, base)
    sft = manifest.inputs.get("base", "")
    prompts = str(_ingest(manifest).get("prompt_format", ""))
    alone = is_adapter(model or policy)
    metadata: dict[str, Any] = {
        "library_name": "peft" if alone else "transformers",
        "pipeline_tag": "text-generation",
        **licence,
        "tags": ["preference-fine-tuning", loss["name"]],
    }
    # an adapter of an SFT model is none of the hub's: whoever followed the name would load another
    if _HUB_ID.fullmatch(base) and not (alone and sft):
        metadata["base_model"] = base
    if hub := _hub_data(manifest):
        metadata["datasets"] = hub
    block = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    use = _use_of_adapter(_base_of_adapter(base, sft), sft) if alone else _USE
    return f"""---
{block}
---

# {name}

A language model fine-tuned with preference data: {_by_sft(manifest)}{_loss_name(loss)}.

## Use

{use} {template.sentence(model or policy, prompts)}

## Data

{_data(manifest)}
- Fingerprint of the training pairs: `{run["data_fingerprint"]}`

## Training

- Base model: {_base_of_adapter(base, sft) if alone else shown_base(base)}
- Architecture: {", ".join(_architectures(model or policy))}
- Loss: {_options(loss)}
- {run["examples"]} pairs in {run["steps"]} optimiser steps, {config["optimizer"]}, learning rate
  {config["lr"]}
{_END.format(licence=_license_text(license_, licence, base))}"""


def _bare_card(manifest: Manifest, name: str, license_: str, model: Path) -> str:
    """Of a model without a record of its training: what is known is how it was measured here."""
    alone = is_adapter(model)
    base = named_base(read_config(model)) if alone else ""
    # the base's is not that of what another program made of it
    licence = licences.metadata(license_, "")
    metadata: dict[str, Any] = {
        "library_name": "peft" if alone else "transformers",
        "pipeline_tag": "text-generation",
        **licence,
        "tags": ["evaluated"],
    }
    if _HUB_ID.fullmatch(base):
        metadata["base_model"] = base
    block = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    needed = base or f"the model with content hash `{manifest.inputs.get('base', '')}`"
    use = _use_of_adapter(needed) if alone else _USE
    return f"""---
{block}
---

# {name}

A language model whose training is not recorded here: it was evaluated and published.

## Use

{use}

## Data

- What it was trained on was not recorded

## Training

- Not recorded; content hash of what was evaluated: `{manifest.content_hash}`
- Architecture: {", ".join(_architectures(model))}
{_END.format(licence=_license_text(license_, licence, base))}"""


def named_base(config: Mapping[str, Any]) -> str:
    """What an adapter's configuration names as its base; empty where others cannot find it so."""
    name = str(config.get("base_model_name_or_path") or "")
    known = _HUB_ID.fullmatch(name) or name.startswith(BUILTIN_PREFIX)
    return name if known and not name.startswith(SFT_CHECKPOINT) else ""


_END = (
    """
## Figures

Beside this card, [manifest.json](manifest.json) names the run (`run_id`). In the same store
`runs/` has a folder for each run: its report with the held-out figures and their intervals, samples
before and after, the gate's verdict, the resolved configuration, and where the model comes from.

## Licence

{licence}

## Intended use

Text generation in the form of its training data, after an evaluation for the use at hand.

## Limits

"""
    + _LIMITS
    + "\n"
)


def _by_sft(manifest: Manifest) -> str:
    """What came before preference training, if that was SFT."""
    record = manifest.lineage.get(manifest.inputs.get("base", ""), {})
    if record.get("step") != "sft" or record["configuration"].get("n_epochs") == 0:
        return ""
    return "supervised fine-tuning on the preferred responses, then\n"


def _base_of_adapter(base: str, sft: str) -> str:
    """What an adapter is added to: the SFT model where there is one, which has no name of a hub."""
    if not sft:
        return shown_base(base)
    return f"the SFT checkpoint with content hash `{sft}`, trained from {shown_base(base)}"


def _use_of_adapter(needed: str, sft: str = "") -> str:
    whole = (
        "The weights of the model that the SFT checkpoint began from do not fit it." if sft else ""
    )
    return f"""\
This is a LoRA adapter, which needs its base: {needed}.
With the folder of that base as `base` and this one as `folder`, transformers and peft load it:

```python
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, folder)
```

{whole}""".rstrip()


def check_card(text: str, where: str) -> None:
    """Check metadata and sections of a card, offline.

    Raises:
        ArtifactError: something is missing, or stands there that must not.
    """
    problem = _problem(text)
    if problem:
        raise ArtifactError(f"the model card {problem}", where=where, fix="report a bug")


def _problem(text: str) -> str:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return "has no metadata block"
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return f"has metadata that is not YAML: {error}"
    if not isinstance(metadata, dict):
        return "has metadata that is no mapping"
    if missing := [key for key in _NEEDED if not metadata.get(key)]:
        return f"has no {missing[0]} in its metadata"
    if problem := licences.problem(metadata):
        return problem
    base = metadata.get("base_model")
    if base is not None and not _HUB_ID.fullmatch(str(base)):
        return f"names {base!r} as its base model, which is no id of a hub"
    if absent := [name for name in _SECTIONS if f"\n## {name}\n" not in text]:
        return f"has no section {absent[0]}"
    found = next((what for what, pattern in _FORBIDDEN.items() if pattern.search(text)), None)
    return f"has {found} in it" if found else ""


def shown_base(base: str) -> str:
    """What names the base model, without a path: that differs between machines."""
    if _HUB_ID.fullmatch(base) or base.startswith(BUILTIN_PREFIX):
        return base
    return "a model of one's own"


def _license_text(given: str, licence: Mapping[str, str], base: str) -> str:
    known = licence["license"] != "other"
    name = licence["license"] if known else given if given != "other" else ""
    own = f"`{name}`" if name else "not stated here"
    return (
        f"Of the model: {own}. What the licences of its base ({shown_base(base)}) and of its "
        "training data\nask for applies as well."
    )


def _ingest(manifest: Manifest) -> Mapping[str, Any]:
    records = [entry for entry in manifest.lineage.values() if entry["step"] == "ingest"]
    return records[0]["configuration"] if records else {}


def _data_names(manifest: Manifest) -> list[str]:
    return [str(name) for name in _ingest(manifest).get("datasets", [])]


def _hub_data(manifest: Manifest) -> list[str]:
    """Ids of the data sets that are on the hub."""
    sources = _ingest(manifest).get("sources", {})
    # what is part of a set is named after a comma
    found = {
        known[0].partition(",")[0] if (known := _stated(name, source)) else _hub_id(source)
        for name in _data_names(manifest)
        for source in [sources.get(name) or {}]
    }
    return sorted(item for item in found if _HUB_ID.fullmatch(item))


def _stated(name: str, source: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is known of a data set by its name, and its licence; None of other data of that name."""
    if name not in _DATA or (source and _place(source) != _PLACES[name]):
        return None
    return _DATA[name]


def _place(source: Mapping[str, Any]) -> str:
    """Where a source has its rows from; empty for what is computed or was posted."""
    if source.get("loader") or source.get("community"):
        return ""
    return str(source.get("path") or source.get("hub") or "")


def _hub_id(source: Mapping[str, Any]) -> str:
    """The data set of the hub that a source names; empty where it is another place."""
    path = _place(source)
    if path == source.get("hub"):
        return path
    owner, _, rest = path.removeprefix("hf://").removeprefix("datasets/").partition("/")
    return f"{owner}/{rest.partition('/')[0]}" if path.startswith("hf://") else ""


def _data(manifest: Manifest) -> str:
    sources = _ingest(manifest).get("sources", {})
    lines = []
    for name in _data_names(manifest):
        source = sources.get(name) or {}
        if known := _stated(name, source):
            what, license_ = known
            lines.append(f"- {what} (licence: {license_})")
        elif hub := _hub_id(source):
            lines.append(f"- {hub} (licence: as its card says)")
        else:
            shown = name if _PLAIN_NAME.fullmatch(name) else "a file"
            lines.append(f"- {shown}: pairs of one's own (licence: its owner's)")
    return "\n".join(lines) or "- Preference pairs whose origin was not recorded"


def _architectures(model: Path) -> list[str]:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return ["LoRA adapter"]
    return list(config.get("architectures") or ["unknown"])


_LOSS_NAMES = {
    "sft": "supervised fine-tuning (SFT) on the preferred responses",
    "dpo": "direct preference optimisation (DPO)",
    "robust": "robust DPO",
    "hinge": "preference training with a hinge loss (SLiC)",
    "ipo": "identity preference optimisation (IPO)",
    "simpo": "simple preference optimisation (SimPO)",
    "orpo": "odds-ratio preference optimisation (ORPO)",
}


def _loss_name(loss: dict[str, Any]) -> str:
    if loss["name"] == "dpo" and loss.get("label_smoothing", 0) > 0:
        return "conservative DPO"
    return _LOSS_NAMES.get(loss["name"], str(loss["name"]))


def _options(loss: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(loss.items()))
