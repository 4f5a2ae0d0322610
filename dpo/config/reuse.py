"""Whether an earlier output of a step holds for other settings: what decides it, and what does not.

Both sides are settings as ``dpo.config.stages.stage_settings`` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.config.compose import flatten
from dpo.config.stages import OUT_OF_BAND, Stage

_HOW = OUT_OF_BAND | {
    *("trainer", "micro_batch_tokens", "eval_batch_size", "activation_checkpointing"),
    *("deterministic", "eval_every", "do_first_eval", "do_last_eval"),
    *("sample_during_eval", "n_eval_model_samples"),
}
"""How the work is spread over devices and watched: an output made otherwise is as good."""
_KERNELS = {"model.kernels", "model.output_layer", "model.compile", "model.block_name"}
"""Other ways to the same numbers."""
_TOKENIZER = {"model.name_or_path", "model.tokenizer_name_or_path", "model.revision"}
"""All that ingest reads of a model."""


def differing(
    stage: Stage, made: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings by which an output of ``stage`` is not what is asked for: old and new value.

    Settings that ``made`` does not tell (an older version did not have them) are not compared.
    """
    then, now = flatten(made), flatten(asked)
    return {
        key: (then.get(key), now.get(key))
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
        and key.partition(".")[0] in made
        and _decides(stage, key)
        and not (stage == "reference" and _covers(key, then.get(key), now.get(key), now))
    }


def _decides(stage: Stage, key: str) -> bool:
    section = key.partition(".")[0]
    if stage == "ingest" and section == "model":
        return key in _TOKENIZER
    return section not in _HOW and key not in _KERNELS


def _covers(key: str, then: Any, now: Any, asked: Mapping[str, Any]) -> bool:
    """Whether log-probabilities of the old choice of pairs hold all of the new one.

    The training pairs are the first of one seeded order, so a smaller number is a part of a larger
    one; held-out pairs are drawn anew for each number (``dpo.data.loader``).
    """
    if key == "n_examples":
        fewer = then is None or (now is not None and now <= then)
        return fewer or asked.get("score_training_pairs") is False
    if key == "n_eval_examples":
        return then is None
    # the first pass sees every pair already
    return key == "n_epochs" or (key == "score_training_pairs" and bool(then))


def shown(changes: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    """``lr=1e-05 → 0.001, ...`` for a message."""
    texts = [f"{key}={then!r} → {now!r}" for key, (then, now) in changes.items()]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
