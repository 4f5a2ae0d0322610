"""Which held-out pairs an evaluation measures on: all, a validation part, or a test part.

A sweep selects on the validation part and sends the best through the gate on the test part, which
selection never saw. The hash of the prompt decides, so pairs that share a prompt stay together and
added data moves no pair.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Part = Literal["all", "validation", "test"]


def in_part(prompt: str, part: Part, validation_fraction: float) -> bool:
    """Whether pairs with this prompt belong to ``part``."""
    if part == "all":
        return True
    # another prefix than that of the train/test split, which must not decide this too
    digest = hashlib.sha256(b"part\0" + prompt.encode("utf-8")).digest()
    is_validation = int.from_bytes(digest[:8], "big") / 2**64 < validation_fraction
    return is_validation == (part == "validation")
