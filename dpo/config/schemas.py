"""JSON Schema of the configuration, for editors: generated from the types.

python -m dpo.config.schemas [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dpo.config.losses import AnyLoss
from dpo.config.models import ModelConfig, TrainerConfig
from dpo.config.places import config_dir
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig

_TYPES: dict[str, Any] = {
    "run": RunConfig,
    "model": ModelConfig,
    "loss": AnyLoss,
    "dataset": SourceConfig,
    "trainer": TrainerConfig,
}


def schemas() -> dict[str, str]:
    """File name and text of every schema."""
    return {f"{name}.json": _text(name, type_) for name, type_ in _TYPES.items()}


def _text(name: str, type_: Any) -> str:
    schema = TypeAdapter(type_).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    if name == "run":
        # Hydra's own key, and group choices written as a name
        schema["properties"]["defaults"] = {"type": "array", "description": "Hydra's defaults list"}
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the schemas, or with ``--check`` compare them with the files."""
    folder: Path = config_dir() / "schemas"
    stale = []
    for name, text in schemas().items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote config/schemas/{name}")
    if stale and "--check" in arguments:
        print(f"{', '.join(stale)} differ from the types: run `make schemas`", file=sys.stderr)
        return 1
    print("config/schemas is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
