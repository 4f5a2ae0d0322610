"""Which modules of a model are its transformer blocks."""

from __future__ import annotations

from typing import Any

from dpo.errors import ModelError


def find_blocks(model: Any, block_name: str | None) -> list[Any]:
    """The transformer blocks: modules of class ``block_name``, or those that the model declares.

    Raises:
        ModelError: there are none of that name.
    """
    names = {block_name} if block_name else set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found or not block_name:
        return found
    known = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
    raise ModelError(
        f"the model has no block {block_name}",
        where="model.block_name",
        fix=f"set model.block_name=null to have it found, or name one of {', '.join(known)}",
    )
