"""Licences of models, as hubs write them.

The list is that of the Hugging Face Hub's documentation, "Licenses".
"""

from __future__ import annotations

import re

# what the publishers of the models state
_MODELS = {
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "EleutherAI/pythia": "apache-2.0",
    "openai-community/gpt2": "mit",
    "gpt2": "mit",
    "mistralai/Mistral-7B": "apache-2.0",
    "HuggingFaceH4/zephyr-7b-beta": "mit",
    "meta-llama/Llama-2": "llama2",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "builtin:": "apache-2.0",
}
_HUBS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 gemma grok2-community unknown other
"""
_KNOWN = frozenset(_HUBS.split())
"""What a card may name as its licence; any other has a name beside ``other``."""


def metadata(given: str, base: str) -> dict[str, str]:
    """What a card's metadata says of the licence.

    Args:
        given: Of the model, as its owner names it; empty takes the base model's where it is known.
        base: What names the base model.
    """
    licence = given or next(
        (found for start, found in _MODELS.items() if base.startswith(start)), ""
    )
    for name in _hub_names(licence):
        if name in _KNOWN - {"other"}:
            return {"license": name}
    named = licence if licence != "other" else ""
    return {"license": "other", "license_name": named or "see-licence-of-base-model-and-data"}


def _hub_names(licence: str) -> tuple[str, ...]:
    """As hubs may write what SPDX calls ``gpl-3.0-only`` or ``odbl-1.0``."""
    alone = licence.removesuffix("-only")
    return licence, alone, re.sub(r"-\d+\.\d+$", "", alone)


def problem(values: dict[str, object]) -> str:
    """What is wrong with the licence in a card's metadata; empty where nothing is."""
    licence = values["license"]
    if licence not in _KNOWN:
        return f"names the licence {licence!r}, which no hub knows (other, with license_name)"
    if licence == "other" and not values.get("license_name"):
        return "has no license_name in its metadata"
    return ""
