"""The commands about published models: verify, pull, list, retain, rollback, lineage, forget.

Each takes one URL and settings as ``key=value``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo.errors import ConfigError
from dpo.publish import lineage, versions
from dpo.publish.verify import pull, verify
from dpo.publish.version import rollback
from dpo.storage.store import open_store

_SHOWN = 12
_SETTING = re.compile(r"[\w.]+=")
"""A URL may have = in its path."""
_ROLLBACK = "publish --rollback"


@dataclass(frozen=True)
class Given:
    """What follows the command's name."""

    url: str
    settings: dict[str, str]

    def number(self, key: str, default: float, *, least: float) -> float:
        """A setting as a finite number.

        Raises:
            ConfigError: it is none, or too small.
        """
        text = self.settings.get(key)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise _no_number(key, f"{text!r} is not a number", least)
        return value

    def whole(self, key: str, *, least: int) -> int:
        """A setting that has to be there, as a whole number.

        Raises:
            ConfigError: it is missing, none, or too small.
        """
        if (text := self.settings.get(key)) is None:
            raise ConfigError(f"{key} is missing", where=key, fix=f"write {key}={max(least, 3)}")
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise _no_number(key, f"{text!r} is not a whole number", least)
        return value


def _no_number(key: str, found: str, least: float) -> ConfigError:
    return ConfigError(
        f"{key} {found} from {least:g} on", where=key, fix=f"write {key}={max(least, 3):g}"
    )


def run(name: str, arguments: Sequence[str], example: str) -> int:
    """Run one of these commands; returns the exit code.

    Raises:
        ConfigError: not one URL, or a setting that the command does not know.
        DpoError: what the command found.
    """
    known, command = _COMMANDS[name]
    urls = [text for text in arguments if not _SETTING.match(text)]
    settings = dict(text.split("=", 1) for text in arguments if text not in urls)
    if unknown := sorted(set(settings) - set(known)):
        takes = f"it takes {', '.join(f'{key}=' for key in known)}" if known else "it takes none"
        raise ConfigError(f"dpo {name} knows no {unknown[0]}=", fix=takes)
    if name == _ROLLBACK and not urls and "publish.store" in settings:
        # as `dpo publish` itself is told
        urls = [f"{settings['publish.store']}/{settings.get('publish.name', 'policy')}"]
    if len(urls) != 1:
        raise ConfigError(f"dpo {name} takes one URL", fix=example)
    return command(Given(urls[0], settings))


def _verify(given: Given) -> int:
    manifest = verify(given.url)
    count = len(manifest["files"])
    print(f"{manifest['name']} {manifest['content_hash']}: {count} files are whole")
    print(f"signature: {manifest['signed']}")
    return 0


def _pull(given: Given) -> int:
    output = given.settings.get("output")
    if not output:
        raise ConfigError("dpo pull needs output= (folder to write the result to)")
    manifest = pull(given.url, Path(output).expanduser())
    print(f"{manifest['name']} {manifest['content_hash']} is in {output}")
    return 0


def _list(given: Given) -> int:
    found = versions.list_versions(given.url)
    unread = {url: text for version in found for url, text in version.problems.items()}
    if _as_json(given):
        print(json.dumps([asdict(version) for version in found], indent=1))
        return 1 if unread else 0
    if not found:
        print("nothing is published here")
    for version in found:
        state = "latest" if version.latest else "" if version.complete else "incomplete"
        time = datetime.fromtimestamp(version.published or version.touched, UTC)
        print(
            f"{state:10} {version.name or '.'} {version.content_hash} {time:%Y-%m-%d %H:%M:%S}Z "
            f"{len(version.files):4} files {version.size / 2**20:10,.1f} MiB  {version.run_id}"
        )
    return _print_unread(unread)


def _print_unread(unread: Mapping[str, str]) -> int:
    """What could not be read; the exit code."""
    for url, problem in unread.items():
        print(f"not known {url}  {problem}")
    return 1 if unread else 0


def _retain(given: Given) -> int:
    keep = given.whole("keep", least=1)
    hours = given.number("grace_hours", versions.DEFAULT_GRACE_HOURS, least=0)
    done = versions.retain(given.url, keep, hours)
    for version in done.removed:
        print(f"removed {version.name or '.'} {version.content_hash}")
    for version in done.busy:
        print(f"left {version.name or '.'} {version.content_hash}: it is being written")
    print(
        f"{len(done.removed)} versions and {done.unfinished} unfinished uploads were removed, "
        f"{len(done.busy)} were left for now"
    )
    return _print_unread(done.unread)


def _rollback(given: Given) -> int:
    store, name = versions.parent_of(given.url)
    version = rollback(store, name, given.settings.get("version", ""))
    print(f"{name}: latest.json names {version} now")
    return 0


def _lineage(given: Given) -> int:
    if community := given.settings.get("community"):
        return _print_dependents(given, lineage.dependents(given.url, community), community)
    manifest, records = lineage.chain(given.url)
    if _as_json(given):
        print(json.dumps({"version": manifest["content_hash"], "chain": records}, indent=1))
        return 0
    print(f"{manifest['name']} {manifest['content_hash']}, published by run {manifest['run_id']}")
    for entry in reversed(records):
        print(f"\n{entry['step']} {entry['content_hash']}")
        for line in _facts(entry):
            print(f"  {line}")
    return 0


def _facts(entry: Any) -> list[str]:
    made = entry.get("made_by") or {}
    prints = made.get("fingerprints") or {}
    # of a model that was given its sources are no data: the name of its folder, its kind
    kind = "data " if entry["step"] == "ingest" else ""
    facts = {
        **{f"from {name}": hash_ for name, hash_ in (entry.get("parents") or {}).items()},
        **{f"{kind}{name}": print_ for name, print_ in (entry.get("sources") or {}).items()},
        **{f"fingerprint of {name}": print_ for name, print_ in prints.items()},
        "code": entry.get("code"),
        "version": " ".join(filter(None, (made.get("version"), made.get("commit")))),
        "image": made.get("image"),
        "made on": made.get("processor")
        and f"{made['processor']}, {made.get('processes', 1)} processes",
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def _forget(given: Given) -> int:
    community = given.settings.get("community")
    if not community:
        raise ConfigError("dpo forget needs community=", fix="dpo forget STORE community=NAME")
    reports = given.settings.get("reports", "false")
    if reports not in ("true", "false"):
        raise ConfigError(f"reports={reports}: write true or false", where="reports")
    found = lineage.forget(given.url, community, reports=reports == "true")
    if not _as_json(given):
        caches = f" and {len(found.tokens)} caches of its tokens" if found.tokens else ""
        print(
            f"removed {len(found.data)} data sets of {community}{caches}; these, and what still "
            "depends on them:"
        )
    return _print_dependents(given, found, community, place="removed")


def _print_dependents(
    given: Given, found: lineage.Dependents, community: str, *, place: str = "data"
) -> int:
    """What was made of a community's data, after where that is, or was; the exit code."""
    store = open_store(given.url)
    code = 1 if found.unread or found.kept else 0
    if _as_json(given):
        print(json.dumps({**asdict(found), "fingerprints": sorted(found.fingerprints)}, indent=1))
        return code
    for where in [*found.data, *found.tokens]:
        print(f"{place:9} {where}")
    for print_ in sorted(found.fingerprints):
        print(f"data      fingerprint {print_}")
    for model in found.models:
        latest = "  (latest)" if lineage.is_latest(store, model) else ""
        print(f"model     {model.url}  run {model.run_id}{latest}")
    for url, texts in found.runs.items():
        shown = f"  shows text of it: {', '.join(text.rpartition('/')[2] for text in texts)}"
        print(f"run       {url}{shown if texts else ''}")
    for hash_, step in found.artifacts.items():
        print(f"artifact  {step} {hash_[:_SHOWN]}")
    if not (found.models or found.runs or found.artifacts):
        print(f"nothing below this URL was made of the data of {community}")
    for url, why in found.kept.items():
        print(f"kept      {url}  {why}")
    _print_unread(found.unread)
    return code


def _as_json(given: Given) -> bool:
    format_ = given.settings.get("format", "text")
    if format_ not in ("text", "json"):
        raise ConfigError(f"format={format_}: choose text or json", where="format")
    return format_ == "json"


_COMMANDS: dict[str, tuple[tuple[str, ...], Callable[[Given], int]]] = {
    "verify": ((), _verify),
    "pull": (("output",), _pull),
    "list": (("format",), _list),
    "retain": (("keep", "grace_hours"), _retain),
    _ROLLBACK: (("version", "publish.store", "publish.name"), _rollback),
    "lineage": (("community", "format"), _lineage),
    "forget": (("community", "reports", "format"), _forget),
}
