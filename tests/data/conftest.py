"""Runs ingest on a few rows and gives back what became of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data.stage import run_ingest
from dpo.data.text_tokenizer import load_text_tokenizer

_TINY = ModelConfig(name_or_path="builtin:tiny")


@dataclass(frozen=True)
class Outcome:
    folder: Path
    pairs: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    report: dict[str, Any]

    @property
    def reasons(self) -> list[str]:
        return [line["reason"] for line in self.quarantine]


Ingest = Callable[..., Outcome]


def good_row(number: int, split: str | None = None) -> dict[str, Any]:
    row = {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": f"no {number}"}
    return row | ({"split": split} if split else {})


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


GOOD = [good_row(-1, "train"), good_row(-2, "test")]
"""One pair for each split, which ingest asks for."""


def read_outcome(folder: Path) -> Outcome:
    lines = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(
        folder,
        pq.read_table(folder / "pairs-00000.parquet").to_pylist(),
        [json.loads(line) for line in lines],
        json.loads((folder / "report.json").read_text(encoding="utf-8")),
    )


@pytest.fixture
def ingest_sources(tmp_path: Path) -> Callable[..., Outcome]:
    """Run ingest on sources by name; further arguments are settings of the run."""

    def run(sources: dict[str, Any], *, workers: int | None = None, **settings: Any) -> Outcome:
        config = RunConfig(
            datasets=list(sources),
            sources={name: SourceConfig(**source) for name, source in sources.items()},
            **{"max_rejected_share": 1.0, "model": _TINY, **settings},
        )
        folder = tmp_path / "out"
        run_ingest(config, folder, workers=workers)
        return read_outcome(folder)

    return run


@pytest.fixture
def ingest(tmp_path: Path, ingest_sources: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run ingest on rows; two good pairs, one in each split, are added and left out again."""

    def run(rows: Sequence[Any], source: dict[str, Any] | None = None, **settings: Any) -> Outcome:
        for name, items in (("rows", rows), ("good", GOOD)):
            lines = "".join(json.dumps(row) + "\n" for row in items)
            (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        found = ingest_sources(
            {
                "rows": {"path": str(tmp_path / "rows.jsonl"), **(source or {})},
                "good": {"path": str(tmp_path / "good.jsonl")},
            },
            **settings,
        )
        pairs = [pair for pair in found.pairs if pair["dataset"] == "rows"]
        return Outcome(found.folder, pairs, found.quarantine, found.report)

    return run


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with one token a word, so that truncation can be counted by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    names = ["<end>", "?", *"abcdefghijklmnop"]
    vocabulary = {word: index for index, word in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_text_tokenizer(folder)
