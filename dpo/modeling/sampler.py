"""Which token comes next, from random numbers that each prompt has of its own.

Axes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stream(seed: int, number: int) -> torch.Generator:
    """The random numbers of one prompt."""
    # drawn on the CPU: the same numbers on every device
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class Sampler:
    """Chooses the next token of each row: greedy, or by nucleus sampling from its own stream."""

    def __init__(
        self, temperature: float, top_p: float, streams: Sequence[torch.Generator]
    ) -> None:
        self.temperature, self.top_p, self.streams = temperature, top_p, list(streams)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows are left."""
        self.streams = [self.streams[row] for row in rows]

    def choose(self, logits_BV: Tensor) -> list[int]:
        """The next token of each row."""
        if self.temperature == 0:
            greedy: list[int] = logits_BV.argmax(1).tolist()
            return greedy
        chances_BV = (logits_BV.double() / self.temperature).softmax(1)
        token_BV = None
        if self.top_p < 1:
            chances_BV, token_BV = chances_BV.sort(dim=1, descending=True, stable=True)
            # the smallest set of tokens that holds top_p of the probability; the likeliest always
            outside_BV = chances_BV.cumsum(1) - chances_BV >= self.top_p
            chances_BV = chances_BV.masked_fill(outside_BV, 0.0)
        sums_BV = chances_BV.cumsum(1)
        draws = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self.streams]
        drawn_B1 = (torch.stack(draws).to(sums_BV.device) * sums_BV[:, -1])[:, None]
        place_B1 = torch.searchsorted(sums_BV, drawn_B1, right=True)
        # rounding may leave the draw at the very end: then the last token that may be chosen
        last_B1 = (sums_BV < sums_BV[:, -1:]).sum(1, keepdim=True)
        place_B1 = torch.minimum(place_B1, last_B1)
        chosen_B1 = place_B1 if token_BV is None else token_BV.gather(1, place_B1)
        chosen: list[int] = chosen_B1.squeeze(1).tolist()
        return chosen
