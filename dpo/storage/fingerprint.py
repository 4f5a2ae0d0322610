"""Fingerprints: of the code that a step runs, and of files and folders.

The code fingerprint of a step covers the modules of ``dpo`` that its entry module reaches by
imports (those inside functions too) with the templates that these fill in, the lock file and the
Python version. So a change in ``dpo/evaluate`` gives a new fingerprint to the evaluation and to no
other step.
"""

from __future__ import annotations

import ast
import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dpo.config.places import lock_file
from dpo.config.stages import Stage
from dpo.storage.manifest import content_hash, sha256_file

_PACKAGE = Path(__file__).resolve().parent.parent

ENTRY_MODULES: dict[Stage, str] = {
    "ingest": "dpo.data.stage",
    "sft": "dpo.train.stage",
    "reference": "dpo.train.reference",
    "preference": "dpo.train.stage",
    "evaluate": "dpo.evaluate.stage",
    "gate": "dpo.evaluate.gate",
    "publish": "dpo.publish.stage",
}
"""Where each step's code starts."""

_TEMPLATES = {
    "dpo.data.report": "data/templates/*.j2",
    "dpo.data.rules": "data/templates/chat/*.jinja",
    "dpo.evaluate.report": "evaluate/templates/*.j2",
}
"""Files of the package that a module fills in, by its name: they make its results as its code does.
"""


@cache
def code_fingerprint(stage: Stage) -> str:
    """sha256, in hex, of the code that ``stage`` runs and of what it was locked to."""
    digest = hashlib.sha256(f"python {platform.python_version()}\n".encode())
    lock = lock_file()
    digest.update(b"no lock file" if lock is None else sha256_file(lock).encode())
    for module, path in sorted(imported_modules(ENTRY_MODULES[stage]).items()):
        digest.update(f"\n{module}\0{sha256_file(path)}".encode())
        for template in _templates(module):
            digest.update(f"\n{_inside(template)}\0{sha256_file(template)}".encode())
    return digest.hexdigest()


@cache
def source_fingerprint() -> str:
    """sha256, in hex, of ``dpo``'s sources, templates and lock file: the same in every image.

    Unlike ``code_fingerprint`` it leaves out the Python version, so a package that was compiled on
    one machine can say what code it expects on another.
    """
    lock = lock_file()
    digest = hashlib.sha256(b"no lock file" if lock is None else sha256_file(lock).encode())
    templates = [path for module in _TEMPLATES for path in _templates(module)]
    for path in sorted([*_PACKAGE.rglob("*.py"), *templates]):
        digest.update(f"\n{_inside(path)}\0{sha256_file(path)}".encode())
    return digest.hexdigest()


def _templates(module: str) -> list[Path]:
    return sorted(_PACKAGE.glob(_TEMPLATES[module])) if module in _TEMPLATES else []


def _inside(path: Path) -> str:
    return path.relative_to(_PACKAGE).as_posix()


def imported_modules(entry: str) -> dict[str, Path]:
    """Modules of ``dpo`` that ``entry`` reaches by imports, with their files."""
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        path = _module_file(module)
        if path is None or module in found:
            continue
        found[module] = path
        waiting.extend(_imports_of(path))
        # importing a.b.c runs a and a.b first
        waiting.append(module.rpartition(".")[0])
    return found


def _imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in _nodes_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # ``from dpo.data import schema`` may name a module or an attribute
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name == "dpo" or name.startswith("dpo.")]


def _nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those of ``if TYPE_CHECKING:``."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def _module_file(module: str) -> Path | None:
    if not module.startswith("dpo"):
        return None
    base = _PACKAGE.joinpath(*module.split(".")[1:])
    if base.is_dir():
        return base / "__init__.py" if (base / "__init__.py").is_file() else None
    file = base.with_suffix(".py")
    return file if file.is_file() else None


def visible_files(folder: Path) -> list[Path]:
    """All files in a folder but hidden ones, which are tools' own: ``.git``, ``.cache`` of the hub
    with the time of the download."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [p for p in files if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def path_fingerprint(path: Path) -> str:
    """sha256 of a file's bytes, or over the names and hashes of a folder's ``visible_files``."""
    if path.is_file():
        return sha256_file(path)
    files = {p.relative_to(path).as_posix(): sha256_file(p) for p in visible_files(path)}
    return content_hash(files)
