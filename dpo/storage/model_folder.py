"""What can be seen to be wrong with a model's folder before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path

from dpo.errors import ModelError

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEADER_LENGTH_BYTES = 8
_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no whole model: the files of its weights are looked at, not read.

    Raises:
        ModelError: no ``config.json``, one that is not JSON, names no model or one of an encoder
            and a decoder, weights that are missing, cut off, integers or not safetensors, or an
            adapter beside them.
    """
    _check_config(folder / "config.json")
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would add it to whatever base it names, and pass over the weights here
        raise ModelError(
            "the folder holds a whole model and an adapter, and nothing says which is meant",
            where=str(folder),
            fix=f"move {ADAPTER_CONFIG} and the adapter's weights away, or into a folder of their "
            "own with the tokenizer",
        )
    weights = [path for path in weight_files(folder) if path.name != _INDEX]
    for path in weights:
        _check_safetensors(path)
    if not weights:
        pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
        raise ModelError(
            f"the model's weights are missing: there is no {_WEIGHTS}"
            + (f", and {pickled.name} is a pickle, which is not loaded" if pickled else ""),
            where=str(folder),
            fix="convert it with save_pretrained(safe_serialization=True)"
            if pickled
            else "fetch the model again: the folder needs config.json, weights and tokenizer",
        )


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no whole model; a ``config.json`` makes it none."""
    whole = any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def base_of(folder: Path) -> str:
    """The base model that an adapter's folder records.

    Raises:
        ModelError: it records none.
    """
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(
            "the adapter does not say what its base model is",
            where=str(folder / ADAPTER_CONFIG),
            fix="write base_model_name_or_path into it",
        )
    return base


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from, with their index: one file before shards."""
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        return [index, *(folder / name for name in _shards(index))]
    return sorted(folder.glob("*.safetensors"))


def check_adapter(folder: Path) -> None:
    """Refuse an adapter without whole weights.

    Raises:
        ModelError: they are missing, cut off, or a pickle.
    """
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        _check_safetensors(path)
        return
    pickled = (folder / "adapter_model.bin").is_file()
    raise ModelError(
        f"the adapter's weights are missing: there is no {ADAPTER_WEIGHTS}"
        + (", and adapter_model.bin is a pickle, which is not loaded" if pickled else ""),
        where=str(folder),
        fix="save it again with a newer peft, which writes safetensors"
        if pickled
        else "fetch the adapter again",
    )


def _check_config(path: Path) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "not a Hugging Face model folder: config.json is missing",
            where=str(path.parent),
            fix="give a folder with config.json, weights and tokenizer",
        ) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ModelError(
            f"config.json is not JSON: {error}", where=str(path), fix="fetch the model again"
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(
            "config.json names no model_type",
            where=str(path),
            fix="give the folder of a causal language model of transformers",
        )
    if values.get("is_encoder_decoder") is True:
        # transformers would load the decoder of some, and miss what the encoder gives it
        raise ModelError(
            f"this {values['model_type']} model is an encoder and a decoder, not one model that "
            "goes on with a text",
            where=str(path),
            fix="give the folder of a causal language model of transformers",
        )
    if (named := values.get("transformers_weights")) not in (None, _WEIGHTS):
        raise ModelError(
            f"config.json says that the weights are in {named} (transformers_weights)",
            where=str(path),
            fix="load it with transformers and save it again: save_pretrained(folder)",
        )


def is_quantised(folder: Path) -> bool:
    """Whether ``config.json``, which ``check_folder`` has read, says so of the weights."""
    return bool(json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config"))


def quantised(folder: Path) -> ModelError:
    """What is told of such a model."""
    return ModelError(
        "config.json says that the weights are quantised (quantization_config), and such weights "
        "cannot be trained",
        where=str(folder),
        fix="give the model that they were made from, in bfloat16 or float32",
    )


def _of_integers(path: Path, name: str, dtype: str) -> ModelError:
    """transformers would take the numbers as they are, without what they are scaled by."""
    if is_quantised(path.parent):
        return quantised(path.parent)
    return ModelError(
        f"{name} is of type {dtype}, and a model's weights are not integers: it is quantised, "
        "though config.json does not say so",
        where=str(path),
        fix="give the model that it was made from, in bfloat16 or float32",
    )


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            "the list of weight files is not readable",
            where=str(index),
            fix="fetch the model again",
        ) from None


def _check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header says; reads the header alone."""
    if not path.is_file():
        raise ModelError(
            f"a file of weights is missing: {path.name}",
            where=str(path.parent),
            fix="fetch the model again",
        )
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            if not 0 < length <= size - _HEADER_LENGTH_BYTES:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        for name, tensor in tensors.items():
            if name.endswith(".weight") and tensor["dtype"] in _INTEGERS:
                raise _of_integers(path, name, tensor["dtype"])
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
        expected = _HEADER_LENGTH_BYTES + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, its header says {expected:,}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = error if isinstance(error, ValueError) else "its header is not readable"
        raise ModelError(
            f"a file of weights is damaged: {reason}",
            where=str(path),
            fix="fetch the model again; git-lfs pointers are no weights",
        ) from None
