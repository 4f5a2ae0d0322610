"""Lengths of a run's pairs: from ingested pairs, from the sources, or assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dpo.config.schema import RunConfig
from dpo.errors import DpoError
from dpo.plan.lengths import DEFAULT, Lengths

_SAMPLE_PAIRS = 1000
_READ_BYTES = 200 * 2**20
"""Sources up to this size are read to find their lengths."""
_CHARACTERS_A_TOKEN = 4.2
"""English text of HH dialogues under the tokenizers of GPT-NeoX and SmolLM2."""
HH_PAIRS = 160_800
"""Training pairs of Anthropic's HH-RLHF."""


def find_lengths(config: RunConfig, data: Path | None = None) -> Lengths:
    """Lengths of the run's pairs.

    Args:
        config: A whole configuration (``datasets`` is read where ``data`` is not given).
        data: Output of ingest.

    Returns:
        What ``data`` holds; else what the sources hold, where they are files on this machine; else
        the assumed lengths. ``source`` says which, and whether a tokenizer or characters counted.

    Raises:
        DpoError: ``data`` is no complete output of ingest.
    """
    if data is not None:
        return read_lengths(config, data, str(data))
    return _from_sources(config) or replace(DEFAULT, pairs=_known_pairs(config))


def read_lengths(config: RunConfig, data: Path, named: str) -> Lengths:
    """Lengths of ingested pairs, of a sample of at most 1,000.

    Raises:
        ArtifactError: the folder is no complete output of ingest.
        DataError: it holds no training pair.
    """
    from dpo.data.loader import weighted
    from dpo.data.parquet import read_pairs
    from dpo.data.schema import TRAIN
    from dpo.errors import DataError
    from dpo.storage.manifest import read_manifest

    read_manifest(data, stage="ingest", verify=False)
    pairs = read_pairs(data, TRAIN)
    # as training takes them: some sources come more than once, or in part
    draws = weighted(pairs.rows, pairs.weights, config.seed)
    if not draws:
        raise DataError("there is no pair to train on", where=str(data))
    sample = [pairs.rows[index] for index in draws[:: -(-len(draws) // _SAMPLE_PAIRS)]]
    count, how = _counter(config)
    measured = [
        _cut(config, count(row.prompt), [count(row.chosen) + 1, count(row.rejected) + 1])
        for row in sample
    ]
    source = f"{len(sample):,} pairs of {named}, counted by {how}"
    return replace(_summary(measured, len(draws), source), different=len(set(draws)))


def _summary(measured: Sequence[tuple[int, int, int]], n_pairs: int, source: str) -> Lengths:
    prompts, chosen, rejected = zip(*measured, strict=True)
    return Lengths(
        prompt=fmean(prompts),
        chosen=fmean(chosen),
        rejected=fmean(rejected),
        pairs=n_pairs,
        longest=max(map(sum, measured)),
        source=source,
    )


def _cut(config: RunConfig, prompt: int, responses: Iterable[int]) -> tuple[int, int, int]:
    """What ``dpo.data.tokenize.tokenize_pair`` leaves."""
    chosen, rejected = responses
    if prompt + max(chosen, rejected) > config.max_length:
        prompt = min(prompt, config.max_prompt_length)
    if prompt + max(chosen, rejected) > config.max_length:
        room = config.max_length - config.max_prompt_length
        chosen, rejected = min(chosen, room), min(rejected, room)
    return prompt, chosen, rejected


def _counter(config: RunConfig) -> tuple[Any, str]:
    """A function from text to tokens, and its name; the tokenizer where it is on this machine."""
    from dpo.data.text_tokenizer import load_text_tokenizer
    from dpo.storage.base_model import is_here, local_tokenizer

    model = config.model
    other = model.tokenizer_name_or_path
    wanted = model if other is None else model.model_copy(update={"name_or_path": other})
    try:
        if is_here(wanted):
            tokenizer = load_text_tokenizer(
                local_tokenizer(model), trust_remote_code=model.trust_remote_code
            )
            return lambda text: len(tokenizer(text)["input_ids"]), "the model's tokenizer"
    except DpoError:
        pass
    estimate = f"characters / {_CHARACTERS_A_TOKEN} (the tokenizer is not on this machine)"
    return lambda text: round(len(text) / _CHARACTERS_A_TOKEN), estimate


def _from_sources(config: RunConfig) -> Lengths | None:
    """Lengths of pairs made in a temporary folder; None where a source is not on this machine."""
    from contextlib import redirect_stderr
    from io import StringIO
    from tempfile import TemporaryDirectory

    from dpo.config.models import ModelConfig
    from dpo.config.stages import restrict
    from dpo.data.stage import run_ingest
    from dpo.storage.base_model import is_here

    if not all(_is_small_and_here(source.path) for source in config.sources.values()):
        return None
    if not is_here(config.model):
        # ingest wants some tokenizer; this one travels along
        reading = config.model_copy(update={"model": ModelConfig()})
    else:
        reading = config
    # its notes are about a run, and this is none
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        place = Path(folder, "data")
        try:
            run_ingest(restrict(reading, "ingest"), place)
            return read_lengths(config, place, ", ".join(config.sources))
        except DpoError:
            return None


def _is_small_and_here(path: str | None) -> bool:
    from dpo.config.places import BUILTIN_PREFIX

    if path is None:
        return False
    file = Path(path).expanduser()
    return path.startswith(BUILTIN_PREFIX) or (file.is_file() and file.stat().st_size < _READ_BYTES)


def _known_pairs(config: RunConfig) -> int | None:
    return HH_PAIRS if [s.hub for s in config.sources.values()] == ["Anthropic/hh-rlhf"] else None
