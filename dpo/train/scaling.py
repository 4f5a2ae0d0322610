"""Loss scaling for float16: small gradients survive, and steps that overflow are done again.

torch's GradScaler leaves out the update of a step whose gradients overflow, and with it the step's
examples. Here the step is repeated with half the scale, so every example is trained on. The norm of
all gradients decides, which every process knows, so none takes another way; the state is two
numbers in the checkpoint's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FIRST_SCALE = 65536.0
_SMALLEST, _LARGEST = 1.0, 2.0**24
_GROW_AFTER_STEPS = 2000


@dataclass
class LossScale:
    """By how much losses are multiplied before the backward pass."""

    value: float = FIRST_SCALE
    good_steps: int = 0
    """Steps since it was changed."""

    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        if gradients and self.value != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def overflowed(self) -> bool:
        """Halve the scale after a step that overflowed; False where it cannot be halved."""
        self.good_steps = 0
        if self.value <= _SMALLEST:
            return False
        self.value /= 2
        return True

    def went_well(self) -> None:
        """Count a step, and try a larger scale now and then."""
        self.good_steps += 1
        if self.good_steps >= _GROW_AFTER_STEPS and self.value < _LARGEST:
            self.value *= 2
            self.good_steps = 0
