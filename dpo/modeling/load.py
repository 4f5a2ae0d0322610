"""Loads a causal language model and what belongs to it, and saves it as a Hugging Face folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.data.quiet import quiet
from dpo.data.tokenize import load_tokenizer, moved_ids
from dpo.errors import ArtifactError, ModelError, writing
from dpo.modeling.archive import checkpoint_folder, load_policy_file
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.lora import merge_saved
from dpo.modeling.precision import DTYPES
from dpo.modeling.stored import check_names
from dpo.storage.base_model import local_model, local_tokenizer
from dpo.storage.given_model import adapter_base_folder, read_model
from dpo.storage.lineage import check_base
from dpo.storage.manifest import read_manifest
from dpo.storage.model_folder import check_folder, is_adapter, is_quantised, quantised

Weights = Literal["device", "cpu", "none"]
"""Where a loaded model's weights are."""

_SHARD_SIZE = "2GB"


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    kernels: str = "auto",
    compiled: bool = False,
    output_layer: str = "tiled",
    weights: Weights = "device",
    base: Path | None = None,
) -> Any:
    """A model in evaluation mode (no dropout, as the paper trains), with gradients.

    The folder of an adapter gives its base model with the adapter added.

    Args:
        folder: Its configuration and weights.
        dtype: Type of the weights.
        device: Where to put it.
        trust_remote_code: Run code that comes with it.
        kernels: As ``model.kernels``.
        compiled: As ``model.compile``.
        output_layer: As ``model.output_layer``.
        weights: ``device``; or, for a model that is spread over processes, ``cpu``, or ``none``: on
            the meta device, without values (as far as its class can be made there, else ``cpu``).
        base: Folder of an adapter's base, where it is not to be looked for.

    Raises:
        ModelError: the folder holds no causal model that transformers can load.
        MissingDependency: ``kernels`` needs a package that is not here.
    """
    quiet()
    if is_adapter(folder):
        model = load_model(
            base or _base_folder(folder),
            dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            kernels=kernels,
            compiled=compiled,
            output_layer=output_layer,
            weights=weights,
        )
        # merged weights have the base's names and shapes
        return model if _has_no_values(model) else merge_saved(model, folder).eval()
    check_folder(folder)
    model = _shell(folder, dtype, trust_remote_code) if weights == "none" else None
    if model is None:
        model = _with_values(folder, dtype, trust_remote_code)
    if weights == "device":
        model = model.to(device)
    apply_kernels(model, kernels, device=device, compiled=compiled, output_layer=output_layer)
    return model


def _with_values(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        model, found = _from_folder(folder, dtype, trust_remote_code)
    except Exception as error:
        if is_quantised(folder):
            raise quantised(folder) from None
        if "trust_remote_code" in str(error):
            raise ModelError(
                "the model needs code that comes with it, which does not run unless it is allowed",
                where=str(folder),
                fix="set model.trust_remote_code=true if you trust its source",
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model cannot be loaded: {reason}",
            where=str(folder),
            fix="give model.name_or_path a causal language model of transformers",
        ) from None
    if getattr(model.config, "quantization_config", None):
        # of some kinds transformers makes plain weights (fp8 and mxfp4, on a CPU)
        raise quantised(folder)
    check_names(model, found, folder)
    _say_if_untied(model)
    return model.eval()


def _say_if_untied(model: Any) -> None:
    """Correct a configuration that calls two different tables tied.

    transformers sees in the file that they differ. What opens the trained model may not, and put
    the embeddings in the place of the output layer.
    """
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    says_tied = getattr(model.config, "tie_word_embeddings", False)
    if says_tied and output is not None and output.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False


def _shell(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model on the meta device; None for a class that looks at values while it is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(**options: str) -> Any:
        # read again for each try: one that failed leaves its attention in the configuration
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )

    try:
        with torch.device("meta"):
            try:
                model = make(attn_implementation="sdpa")
            except ValueError:
                model = make()
    except Exception:
        return None
    hidden = (value for module in model.modules() for value in vars(module).values())
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in hidden):
        # neither weight nor buffer: nobody would hand it over
        return None
    return model.eval()


def _has_no_values(model: Any) -> bool:
    return any(weight.is_meta for weight in model.parameters())


def _from_folder(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of its loading."""
    from transformers import AutoModelForCausalLM

    load = partial(
        AutoModelForCausalLM.from_pretrained,
        str(folder),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        # reported by ``check_names``, which names the weight
        ignore_mismatched_sizes=True,
    )
    try:
        model, found = load(attn_implementation="sdpa")
    except ValueError:
        # Bloom, GPT-J, gpt-oss and models without attention do not have it
        model, found = load()
    return model, found


def _base_folder(adapter: Path) -> Path:
    """The folder of an adapter's base, which must be what the adapter was trained on."""
    folder = adapter_base_folder(adapter)
    try:
        trained_on = read_manifest(adapter, verify=False).inputs.get("base", "")
    except ArtifactError:
        # no checkpoint of ours
        return folder
    if trained_on:
        found = read_model(folder, name="the adapter's base", verify=False).content_hash
        check_base(trained_on, folder, found, ModelError)
    return folder


def load_for_training(
    model: ModelConfig, base: Path | None, *, device: str = "cpu", weights: Weights = "device"
) -> tuple[Any, Any]:
    """Policy and tokenizer to start from: ``base``, else ``model.archive``, else the base model.

    ``weights`` as in ``load_model``.

    Raises:
        ModelError: they cannot be loaded or do not fit each other.
    """
    dtype, trusted = DTYPES[model.policy_dtype], model.trust_remote_code
    options: dict[str, Any] = {
        "device": device,
        "trust_remote_code": trusted,
        "kernels": model.kernels,
        "compiled": model.compile,
        "output_layer": model.output_layer,
        "weights": weights,
    }
    archive = None if base is not None or model.archive is None else Path(model.archive)
    if archive is not None and archive.is_file():
        policy = load_model(local_model(model), dtype, **options)
        if not _has_no_values(policy):
            load_policy_file(policy, archive)
        tokenizer = load_tokenizer(local_tokenizer(model), trust_remote_code=trusted)
    else:
        folder = base or (checkpoint_folder(archive) if archive else local_model(model))
        policy = load_model(folder, dtype, **options)
        if archive is not None:
            _check_kind(policy, model)
        own = base is not None or archive is not None
        place = folder if own else local_tokenizer(model)
        tokenizer = load_tokenizer(place, trust_remote_code=trusted)
    check_tokenizer(policy, tokenizer)
    if model.tokenizer_name_or_path and base is None:
        _check_same_ids(local_model(model), tokenizer, trusted)
    return policy, tokenizer


def _check_kind(policy: Any, model: ModelConfig) -> None:
    """Refuse an archive's folder with another kind of model than the settings name, as a
    ``policy.pt`` of one is refused. What is not on this machine is not compared.

    Raises:
        ModelError: they differ.
    """
    named = builtin(model.name_or_path) or Path(model.name_or_path)
    if not model.name_or_path or not (named / "config.json").is_file():
        return
    asked = json.loads((named / "config.json").read_text(encoding="utf-8")).get("model_type")
    if asked != policy.config.model_type:
        raise ModelError(
            f"the archive holds a {policy.config.model_type} model, and {model.name_or_path} is a "
            f"{asked} model",
            where=f"model.archive={model.archive}",
            fix="name the model that the archive was trained from: model=..., or give the folder "
            "as base=",
        )


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model has no embeddings for.

    Raises:
        ModelError: the tokenizer has more tokens than the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeddings for {rows:,}",
            where="model.tokenizer_name_or_path",
            fix="use the tokenizer that belongs to the weights",
        )


def _check_same_ids(folder: Path, tokenizer: Any, trusted: bool) -> None:
    """Refuse a tokenizer that gives a text other ids than the weights were trained with.

    Raises:
        ModelError: it is another one than that beside the weights, where there is one.
    """
    try:
        own = load_tokenizer(folder, trust_remote_code=trusted)
    except ModelError:
        return
    # tokens may be added, but none may have a new number
    moved = moved_ids(own, tokenizer)
    if moved is not None:
        raise ModelError(
            "the tokenizer is not that of the weights: the same text has other ids"
            + (f" ({moved:,} tokens are numbered otherwise)" if moved else ""),
            where="model.tokenizer_name_or_path",
            fix="leave it out: the model has a tokenizer of its own",
        )


def check_length(model: Any, max_length: int) -> None:
    """Refuse examples longer than the model's context.

    Raises:
        ModelError: ``max_length`` exceeds it.
    """
    context = context_of(model.config)
    if context is not None and max_length > context:
        raise ModelError(
            f"max_length is {max_length}, the model's context {context} tokens",
            where="max_length",
            fix=f"set max_length to at most {context} (and max_prompt_length below it)",
        )


def context_of(config: Any) -> int | None:
    """The longest sequence, in tokens, of a model with ``config``; None where it says none."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    found = (getattr(text, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def save_model(
    model: Any, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """A Hugging Face folder: sharded safetensors, configurations, tokenizer with chat template.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to.
        weights: Its weights, where the model holds only a part of them.

    Raises:
        OSError: a file could not be written.
    """
    quiet()
    with writing(folder):
        model.save_pretrained(str(folder), state_dict=weights, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(str(folder))
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors are written for the owner alone; a pod's other user must read them
            path.chmod(0o644)
