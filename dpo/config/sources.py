"""Settings of a source of preference pairs."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, WithJsonSchema

from dpo.config.base import LARGEST_INTEGER, Section

Format = Literal[
    "auto",
    "pairs",
    "messages",
    "hh",
    "shp",
    "se",
    "novalto",
    "openai",
    "ranked",
    "rated",
    "compared",
    "argilla",
    "labelstudio",
    "summaries",
]
_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
CustomFunction = Annotated[str, Field(pattern=_FUNCTION)]


def _known_format(value: str) -> str:
    if value not in get_args(Format) and not re.fullmatch(_FUNCTION, value):
        known = ", ".join(get_args(Format))
        raise ValueError(f"sources.NAME.format={value}: choose one of {known}, or module:function")
    return value


AnyFormat = Annotated[
    str,
    AfterValidator(_known_format),
    WithJsonSchema({"anyOf": [{"enum": list(get_args(Format))}, {"pattern": _FUNCTION}]}),
]


class SourceConfig(Section):
    """One source of preference pairs."""

    format: AnyFormat = "auto"
    """How a row is read; ``auto`` decides by the row's keys, ``module:function`` names a function
    of yours. See config/dataset/README.md."""
    loader: CustomFunction | None = None
    """``module:function`` that returns the whole data set in the reference code's form; instead of
    ``path`` and ``hub``."""
    path: str | None = None
    """File, folder, glob or URL (``s3://``, ``minio://``, ``file://``, ``hf://owner/name/folder``);
    ``builtin:NAME`` for data that travels with this package."""
    hub: str | None = None
    """Data set id on the hub, used when ``path`` is not set."""
    hub_subset: str | None = None
    """Folder or configuration inside the hub data set."""
    community: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of a stored community data set: below the URL or folder in DPO_COMMUNITY_DATA, or in
    toy-data/."""
    split: Literal["auto", "hash", "train", "test", "reference"] = "auto"
    """``auto`` keeps the source's own split and divides the rest by hash of the prompt; ``hash``
    divides all rows so; ``train`` and ``test`` put all rows there; ``reference`` holds out the 1 %
    of rows that the reference code holds out of StackExchange."""
    test_fraction: float | None = Field(None, ge=0, le=1)
    """Share of this source's prompts held out by hash, where it differs from the others'."""
    max_pairs: int | None = Field(None, gt=0)
    """Take at most so many pairs of this source (a seeded choice)."""
    seed: int | None = Field(None, ge=0, le=LARGEST_INTEGER)
    """Seed of that choice, where it differs from the run's."""
    max_pairs_per_prompt: int | None = Field(None, gt=0)
    """Take at most so many pairs with one prompt, the first ones."""
    max_prompt_tokens: int | None = Field(None, gt=0)
    """Reject rows whose prompt is longer, instead of cutting it to ``max_prompt_length``."""
    min_score_ratio: float = Field(2.0, ge=1)
    """shp: take a pair when the better score is at least so many times the other."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often each training pair of this source comes in an epoch: 2 takes each twice, 0.5 a
    seeded half of them."""
