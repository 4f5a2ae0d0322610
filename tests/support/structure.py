"""Checks that the project is laid out as it must be: ``make validate-structure``.

    python -m tests.support.structure

Folders, every choice of the configuration, and files that are generated; the target runs
``tests/test_imports.py`` after it, which checks who imports whom.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

FOLDERS = ("pipelines", "components", "images", "dpo", "config", "tests")
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE")


def missing(root: Path) -> Iterator[str]:
    """Folders and files that must be there and are not."""
    yield from (f"the folder {name}/ is missing" for name in FOLDERS if not (root / name).is_dir())
    yield from (f"the file {name} is missing" for name in FILES if not (root / name).is_file())


def broken_configuration() -> Iterator[str]:
    """Choices of the configuration that do not compose, and presets that cannot run."""
    from dpo.config.compose import choices, compose
    from dpo.errors import DpoError
    from pipelines import package
    from pipelines.request import parameters, presets

    tries = [f"{group}={name}" for group in ("model", "loss", "trainer") for name in choices(group)]
    tries += [f"datasets=[{name}]" for name in choices("dataset")]
    for override in tries:
        try:
            # the blank model has no name by design
            extra = ["model.name_or_path=x"] if override == "model=blank_model" else []
            compose([override, *extra])
        except DpoError as error:
            yield f"{override}: {error.found}"
    for name in presets():
        try:
            parameters(package.defaults(package.load_package()), preset_name=name)
        except DpoError as error:
            yield f"preset {name}: {error.found}"


def stale_files() -> Iterator[str]:
    """Generated files that are not those of their sources."""
    import tempfile

    from dpo.config.places import config_dir
    from dpo.config.schemas import schemas
    from pipelines import package

    for name, text in schemas().items():
        if (config_dir() / "schemas" / name).read_text(encoding="utf-8") != text:
            yield f"config/schemas/{name} is not current: run `make schemas`"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, "fresh.yaml")
        package.compile_pipeline(fresh)
        if fresh.read_bytes() != package.PACKAGE.read_bytes():
            yield f"{package.PACKAGE.name} is not current: run `make pipeline`"


def main() -> int:
    """Print what was checked and found; 1 when something is wrong."""
    checks = {
        "folders and files": missing(ROOT),
        "configuration and presets": broken_configuration(),
        "generated files": stale_files(),
    }
    bad = 0
    for name, problems in checks.items():
        found = list(problems)
        bad += len(found)
        print(f"{name}: {'ok' if not found else ''}")
        for problem in found:
            print(f"  {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
