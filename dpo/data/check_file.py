"""``dpo ingest --check FILE``: what is wrong with a data file, for the person who keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.config.compose import compose
from dpo.data.assemble import Assembled
from dpo.data.quarantine import NOT_FAULTY, Rejected, writable
from dpo.data.reasons import title
from dpo.data.stage import check_only
from dpo.errors import DpoError, printable

FAULTY = 1
"""Exit code when a row is wrong, no row gives a pair, or the file cannot be read."""


def check_file(
    place: str, settings: Sequence[str], config_dir: Path | None, *, as_json: bool
) -> int:
    """Check a file and print the result; the exit code tells whether rows are wrong.

    Args:
        place: File, folder, glob or URL.
        settings: ``key=value`` overrides.
        config_dir: Folder with choices of the user's own.
        as_json: Print one JSON object as the last line.
    """
    entry = place if any(mark in place for mark in "/.:*") else f"./{place}"
    quoted = json.dumps(entry, ensure_ascii=False)
    try:
        config = compose([f"datasets=[{quoted}]", *settings], user_dir=config_dir).config
        result = check_only(config)
    except DpoError as error:
        if not as_json:
            raise
        print(json.dumps({"readable": False, "problem": str(error)}))
        return error.exit_code
    found = _as_json(result)
    # rows are hostile texts, and this is a terminal; JSON in ASCII is JSON in any encoding
    print(printable(json.dumps(found) if as_json else _as_text(place, found)))
    faults = any(reason not in NOT_FAULTY for reason in found["reasons"])
    return FAULTY if faults or not found["accepted"] else 0


def _as_json(result: Assembled) -> dict[str, Any]:
    total = result.total()
    return {
        "readable": True,
        "rows": total.rows,
        "accepted": total.pairs,
        "rejected": total.reasons.total(),
        "reasons": {
            reason: {
                "count": count,
                "fault": reason not in NOT_FAULTY,
                "places": [_place(item) for item in total.examples[reason]],
            }
            for reason, count in total.reasons.most_common()
        },
    }


def _place(item: Rejected) -> dict[str, Any]:
    return {
        "file": writable(item.file.partition(": ")[2]),
        "line": item.line,
        "field": writable(item.field),
        "value": writable(item.start_of_value()),
        "advice": writable(item.advice),
    }


def _as_text(place: str, found: dict[str, Any]) -> str:
    wrong = {reason: entry for reason, entry in found["reasons"].items() if entry["fault"]}
    others = {reason: entry for reason, entry in found["reasons"].items() if not entry["fault"]}
    pairs = _count(found["accepted"], "pair")
    lines = [f"{place}: {_count(found['rows'], 'row')}, {pairs} can be used."]
    for heading, group in (("To mend", wrong), ("Sound, but not needed", others)):
        if group:
            n_rows = sum(entry["count"] for entry in group.values())
            lines += ["", f"{heading}: {_count(n_rows, 'row')}"]
        for reason, entry in group.items():
            lines += ["", f"  {title(reason)} ({reason}): {_count(entry['count'], 'row')}"]
            lines += [f"    {_shown(item)}" for item in entry["places"]]
            if entry["count"] > len(entry["places"]):
                lines.append(f"    ... and {entry['count'] - len(entry['places']):,} more")
    ending = "Nothing is wrong."
    if wrong:
        ending = "Mend these rows in the file and check it again."
    elif not found["accepted"]:
        ending = "No row gives a pair: there is nothing to train on in this file."
    return "\n".join([*lines, "", ending])


def _shown(item: dict[str, Any]) -> str:
    value = " ".join(item["value"].split())
    begins = f" It begins: {value}" if value else ""
    return f"{item['file']}, line {item['line']}: {item['advice']}.{begins}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
