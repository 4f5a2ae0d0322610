"""The ingest stage: sources to validated Parquet pairs, with every rejected row and its reason.

Two passes, neither of which holds the data in memory. The first reads and checks rows in blocks and
spills sound pairs to disk, with a hash of each; hashes tell which pairs collide with others. The
second writes the remaining pairs, in the order of the input.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.assemble import Assembled, Cap, assemble
from dpo.data.check import Rules
from dpo.data.division import Shard
from dpo.data.gather import Checked, check_sources, in_order
from dpo.data.quarantine import NOT_FAULTY, QUARANTINE, Rejected
from dpo.data.report import SAMPLE_ROWS, write_report
from dpo.data.rules import rules_of
from dpo.data.schema import arrow_schema
from dpo.data.shards import read_shards
from dpo.data.sources import source_fingerprints
from dpo.data.spill import Tally
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.errors import DataError
from dpo.storage.manifest import Manifest, staged, write_manifest
from dpo.storage.progress import message

_SPILL = "spill"
_SHOWN_REASONS = 5


def run_ingest(
    config: RunConfig,
    output: Path,
    *,
    code: str = "",
    fingerprints: Mapping[str, str] | None = None,
    workers: int | None = None,
    shards: Sequence[Path] = (),
) -> Manifest:
    """Read, validate and write the pairs of ``config.sources`` into the folder ``output``.

    Args:
        config: Settings.
        output: Folder to make.
        code: Fingerprint of the code, kept in the manifest.
        fingerprints: Of the sources, where they are known.
        workers: Processes to check rows in; None decides by the cores and the size of the input.
            The output does not depend on it.
        shards: Outputs of ``shards.run_shard``, which have read the sources.

    Raises:
        ArtifactError: the shards do not belong together.
        ConfigError: the model's tokenizer cannot be used.
        DataError: a source that is missing or unreadable, more than ``max_rejected_share`` rows
            rejected, or a split without a pair.
    """
    rules = rules_of(config)
    with staged(output) as folder:
        if shards:
            checked, found = read_shards(config, shards)
        else:
            checked, found = _read_here(config, rules, folder / _SPILL, fingerprints, workers)
        result = _assembled(config, rules, checked, folder)
        _refuse_bad_share(config, result, folder, output)
        _refuse_empty_split(result, folder, output)
        figures = result.figures()
        tokenizer = load_text_tokenizer(rules.tokenizer, trust_remote_code=rules.trust_remote_code)
        write_report(
            {
                "figures": figures,
                "sources": found,
                "near_duplicates": result.near_examples,
            },
            result.sample,
            result.total().examples,
            tokenizer,
            rules.limits,
            folder,
        )
        manifest = write_manifest(
            folder,
            "ingest",
            settings=stage_settings(config, "ingest"),
            inputs={},
            code=code,
            details={"metrics": _scalars(figures), "sources": dict(found)},
        )
    _tell(figures)
    return manifest


def check_only(config: RunConfig) -> Assembled:
    """Read and validate the sources of ``config`` and keep nothing but counts and examples.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
        DataError: a source that is missing, unreadable or empty.
    """
    rules = rules_of(config)
    with TemporaryDirectory() as name:
        folder = Path(name)
        checked = check_sources(config, rules, folder / _SPILL, None, Shard())
        return _assembled(config, rules, checked, folder)


def _read_here(
    config: RunConfig,
    rules: Rules,
    spill: Path,
    fingerprints: Mapping[str, str] | None,
    workers: int | None,
) -> tuple[list[Checked], dict[str, str]]:
    with ThreadPoolExecutor(1) as beside:
        # hashing leaves the interpreter's lock: workers check rows meanwhile
        later = None if fingerprints else beside.submit(source_fingerprints, config)
        checked = check_sources(config, rules, spill, workers, Shard())
        return checked, later.result() if later else dict(fingerprints or {})


def _assembled(
    config: RunConfig, rules: Rules, checked: Sequence[Checked], folder: Path
) -> Assembled:
    spill = folder / _SPILL
    spill.mkdir(exist_ok=True)
    weights = {name: source.weight for name, source in config.sources.items()}
    result = assemble(
        in_order(checked, rules, spill),
        _caps(config),
        folder,
        schema=arrow_schema(config.prompt_format, weights, rules.chat_template),
        sample_rows=SAMPLE_ROWS,
        seed=config.seed,
    )
    shutil.rmtree(spill)
    _refuse_empty_source(config, result)
    return result


def _caps(config: RunConfig) -> dict[str, Cap]:
    return {
        name: Cap(source.max_pairs, config.seed if source.seed is None else source.seed)
        for name, source in config.sources.items()
        if source.max_pairs is not None
    }


def _scalars(figures: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in figures.items() if isinstance(value, int)}


def _refuse_empty_source(config: RunConfig, result: Assembled) -> None:
    for name in config.sources:
        if name not in result.sources or not result.sources[name].rows:
            raise DataError(
                "the data set is empty",
                where=f"sources.{name}",
                fix="give a file with at least one row",
            )


def _refuse_bad_share(config: RunConfig, result: Assembled, folder: Path, output: Path) -> None:
    tally = result.total()
    bad = {reason: n for reason, n in tally.reasons.items() if reason not in NOT_FAULTY}
    n_bad = sum(bad.values())
    share = n_bad / tally.rows
    if share <= config.max_rejected_share or config.bad_rows == "drop":
        return
    examples = [item for reason in bad for item in tally.examples[reason]]
    raise DataError(
        f"{n_bad:,} of {tally.rows:,} rows are unusable ({share:.1%}; at most "
        f"{config.max_rejected_share:.1%} are allowed). For example:\n{_listed(examples)}",
        where=_kept_quarantine(folder, output),
        fix="mend these rows, allow more with max_rejected_share, or leave them out: bad_rows=drop",
    )


def _refuse_empty_split(result: Assembled, folder: Path, output: Path) -> None:
    total = result.total()
    if not total.pairs:
        raise DataError(
            f"none of {total.rows:,} rows gives a pair{_why(total)}",
            where=_kept_quarantine(folder, output),
            fix="mend these rows, or give others: see config/dataset/README.md",
        )
    for split, count in (
        ("train", result.train_pairs),
        ("test", total.pairs - result.train_pairs),
    ):
        if not count:
            kept = f"; {_kept_quarantine(folder, output)}" if total.reasons else ""
            raise DataError(
                f"no pair is in the {split} split ({total.pairs:,} pairs in all){_why(total)}",
                where=f"test_fraction{kept}",
                fix="give more pairs, or another test_fraction",
            )


def _why(tally: Tally) -> str:
    """The reasons of rejected rows by their number, and an example of each."""
    if not tally.reasons:
        return ""
    common = tally.reasons.most_common(_SHOWN_REASONS)
    counts = ", ".join(f"{count:,} {name}" for name, count in common)
    examples = [tally.examples[name][0] for name, _ in common]
    return f"; rejected are {counts}. For example:\n{_listed(examples)}"


def _listed(examples: Sequence[Rejected]) -> str:
    return "\n".join(f"    {item}" for item in examples[:_SHOWN_REASONS])


def _kept_quarantine(folder: Path, output: Path) -> str:
    """Put the quarantine beside the output that is not made; where it is, for a message."""
    kept = output.absolute().with_name(f"{output.name}.{QUARANTINE}")
    shutil.move(folder / QUARANTINE, kept)
    return f"all rejected rows with reasons: {kept}"


def _tell(figures: dict[str, Any]) -> None:
    if figures["rejected"]:
        reasons = ", ".join(f"{count} {name}" for name, count in figures["reasons"].items())
        message(
            "ingest", f"{figures['rejected']:,} of {figures['rows']:,} rows rejected: {reasons}"
        )
