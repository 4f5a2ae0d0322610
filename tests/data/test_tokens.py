"""The token cache gives what the tokenizer gives, is shared by all limits, and is made once."""

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.cli import main
from dpo.data import tokens
from dpo.data.parquet import read_pairs
from dpo.data.tokenize import Limits, load_tokenizer, tokenize_pair
from dpo.data.tokens import fill_cache, tokenize_rows, tokens_key
from dpo.errors import ArtifactError
from tests.data.conftest import Outcome, good_row
from tests.data.test_tokenize import GOLDEN


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DPO_TOKENS_DIR")
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(GOLDEN / "model")


ROWS = [good_row(number) for number in range(40)]
ROWS[3]["sft_target"] = "another answer"


def ids(example: Any) -> list[list[int]]:
    return [one.tolist() for one in (example.prompt_T, *example.responses)]


@pytest.mark.parametrize("responses", ["pair", "sft_target"])
@pytest.mark.parametrize("limits", [Limits(512, 256, "keep_end"), Limits(6, 3, "keep_start")])
def test_cached_examples_are_those_of_the_tokenizer(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any, responses: str, limits: Limits
) -> None:
    pairs = read_pairs(ingest(ROWS).folder, "train")
    chosen = list(range(len(pairs.rows)))[::-2]
    found = tokenize_rows(pairs, chosen, tokenizer, limits, responses=responses)
    names = ["sft_target"] if responses == "sft_target" else ["chosen", "rejected"]
    for index, example in zip(chosen, found, strict=True):
        row = pairs.rows[index]
        texts = [getattr(row, name) for name in names]
        expected = tokenize_pair(row.prompt, texts, tokenizer, limits, pair_id=row.pair_id)
        assert ids(example) == ids(expected)
        assert example.pair_id == row.pair_id
        assert example.tokens_hash() == expected.tokens_hash()
    assert len(list(cache.glob("*/manifest.json"))) == 1


def test_an_entry_is_made_once_and_serves_every_limit(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ingest(ROWS).folder
    entry = fill_cache(folder, tokenizer)
    assert entry is not None

    def never(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_write", never)
    assert fill_cache(folder, tokenizer) == entry
    for split in ("train", "test"):
        pairs = read_pairs(folder, split)
        for length in (512, 8):
            tokenize_rows(pairs, range(len(pairs.rows)), tokenizer, Limits(length, 4, "keep_end"))
    columns = duckdb.sql(f"SELECT * FROM '{entry}/*.parquet'").columns
    assert columns == ["pair_id", "split", "prompt", "chosen", "rejected", "sft_target"]
    (shown,) = duckdb.sql(f"SELECT count(*), count(sft_target) FROM '{entry}/*.parquet'").fetchall()
    # the two good rows of the fixture are there as well
    assert shown == (42, 1)


def test_the_key_follows_the_content_of_pairs_and_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    assert tokens_key("a", tokenizer) == tokens_key("a", load_tokenizer(GOLDEN / "model"))
    assert tokens_key("a", tokenizer) != tokens_key("b", tokenizer)
    for path in (GOLDEN / "model").glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_bytes((GOLDEN / "model" / "config.json").read_bytes())
    same = tokens_key("a", load_tokenizer(tmp_path))
    assert same == tokens_key("a", tokenizer)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["added_tokens"].append(
        {
            **{"id": 60_000, "content": "<new>", "single_word": False, "lstrip": False},
            **{"rstrip": False, "normalized": False, "special": True},
        }
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert tokens_key("a", load_tokenizer(tmp_path)) != same


def test_few_pairs_of_many_are_not_kept(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any
) -> None:
    pairs = read_pairs(ingest(ROWS).folder, "train")
    (found,) = tokenize_rows(pairs, [1], tokenizer, Limits(512, 256, "keep_end"))
    assert found.pair_id == pairs.rows[1].pair_id
    assert not cache.exists()


def test_a_damaged_entry_is_made_again(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any
) -> None:
    folder = ingest(ROWS).folder
    entry = fill_cache(folder, tokenizer)
    assert entry is not None
    file = entry / "tokens-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert fill_cache(folder, tokenizer) == entry
    assert file.read_bytes() == whole


def test_an_entry_of_other_pairs_is_refused(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any
) -> None:
    pairs = read_pairs(ingest(ROWS).folder, "train")
    entry = fill_cache(pairs.folder, tokenizer)
    assert entry is not None
    pairs.rows.reverse()
    with pytest.raises(ArtifactError, match="of other pairs"):
        tokenize_rows(pairs, range(len(pairs.rows)), tokenizer, Limits(512, 256, "keep_end"))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write into an empty folder; root only where the disk does not let it."""
    if os.geteuid():
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        yield
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(
            f"root writes everywhere, and cannot mount here ({' '.join(mount)}): run as "
            "another user"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_cache_is_done_without(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any
) -> None:
    cache.parent.mkdir()
    pairs = read_pairs(ingest(ROWS).folder, "train")
    with read_only(cache.parent):
        assert tokenize_rows(pairs, range(9), tokenizer, Limits(512, 256, "keep_end"))
        assert not cache.exists()


def test_a_cache_that_is_a_file_is_done_without(
    ingest: Callable[..., Outcome], cache: Path, tokenizer: Any
) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    pairs = read_pairs(ingest(ROWS).folder, "train")
    every = range(len(pairs.rows))
    assert len(tokenize_rows(pairs, every, tokenizer, Limits(512, 256, "keep_end"))) == len(every)


@given(st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_many_texts_at_once_have_the_ids_of_each(tokenizer: Any, texts: list[str]) -> None:
    encode = tokens._encoder(tokenizer, texts[:1])
    assert encode is not None
    each = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [one.tolist() for one in encode(texts)] == each


def test_the_command_says_why_the_cache_cannot_be_written(
    ingest: Callable[..., Outcome],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It said that the tokenizer has no fast form, or that the folder cannot be written."""
    folder = ingest(ROWS).folder

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokens, "_write", full)
    assert main(["tokenize", "model=tiny", f"data={folder}"]) == 1
    shown = capsys.readouterr().err
    assert "the cache cannot be written: the disk is full" in shown
    assert str(cache) in shown
