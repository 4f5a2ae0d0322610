"""How long pairs are, in tokens, and what is assumed of them. ``found_lengths`` measures.

Training imports this: what reads data is apart, for an edit there must not train anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of a pair, in tokens after truncation; an SFT example has no ``rejected``."""

    prompt: float
    chosen: float
    rejected: float
    pairs: int | None = None
    """Training pairs of an epoch, where they are known."""
    different: int | None = None
    """How many of them are different ones, where sources come more than once by their weight."""
    longest: int | None = None
    """Most tokens of a pair with its prompt counted once, where it is known."""
    padded: float = 0.0
    """Mean length of padded sequences, for programs that pad; 0: the longer of the two."""
    source: str = "assumed: the lengths of HH dialogues"

    @property
    def responses(self) -> tuple[float, ...]:
        """The responses that a step passes."""
        return (self.chosen, self.rejected) if self.rejected else (self.chosen,)

    @property
    def tokens(self) -> float:
        """Tokens of a pair, the prompt counted once."""
        return self.prompt + self.chosen + self.rejected

    def for_sft(self) -> Lengths:
        """Of the SFT stage, which trains on one response."""
        return replace(self, rejected=0.0)


DEFAULT = Lengths(prompt=128, chosen=42, rejected=53)
"""Means of HH's harmless-base under the tokenizers of GPT-NeoX and SmolLM2."""
