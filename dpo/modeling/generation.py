"""Answers to prompts: batched, with a key/value cache, one random stream for each prompt.

Prompts of one batch are padded on the left, so that every row's next token is at the same place;
positions count from a row's first real token (GPT-2 and others add a vector for each position, and
would otherwise see a prompt shifted). A row that has ended leaves the batch. Each prompt draws from
a generator of its own, seeded by its number: its answer depends neither on the batch size nor on
the prompts beside it, and two models that answer the same prompt draw the same numbers.

Prompts whose longest answer does not fit into the model's context are answered beside prompts of
their own length only: no answer is cut by the length of another prompt, and no batch is wider than
the context (GPT-Neo's mask and others are tables of that size). So are those whose answers reach
the length at which LongRoPE (Phi-3) changes the rotation of all rows of a batch; there the cached
keys, which have the old one, are computed again.

Axes: B rows of a batch, L tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo.distributed.heartbeat import arrived
from dpo.errors import ModelError
from dpo.modeling.attention import same_rotation_up_to
from dpo.modeling.load import context_of
from dpo.modeling.sampler import Sampler, stream

DEFAULT_BATCH = 16
_BETWEEN = 8
"""Tokens from one call of ``between`` to the next: several processes may exchange words in it."""
_COMPACT_BELOW = 0.75
"""The batch is made smaller when fewer than this share of its rows still go on."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    prompt_ids: list[int]
    """The prompt as the model saw it, cut to its last tokens."""
    ids: list[int]
    """The answer's tokens, with the end token where it ended by itself."""
    ended: bool
    """Whether it ended before ``max_new_tokens``."""

    @property
    def said(self) -> list[int]:
        """The tokens of its text: the end token is none."""
        return self.ids[: len(self.ids) - self.ended]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """One answer to each prompt, as text; see ``answer``."""
    encoded = [encode(tokenizer, prompt, max_prompt_length) for prompt in prompts]
    found = answer(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        between=between,
    )
    return [decode(tokenizer, item) for item in found]


def encode(tokenizer: Any, prompt: str, max_prompt_length: int) -> list[int]:
    """Token ids of a prompt, its last ``max_prompt_length``; an empty prompt is the end token."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[-max_prompt_length:] or [tokenizer.eos_token_id]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the tokenizer's end token and those of ``generation_config.json``."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    return frozenset(token for token in (tokenizer.eos_token_id, *several) if token is not None)


def decode(tokenizer: Any, answered: Answer) -> str:
    """The text of an answer, without special tokens and the token that ended it."""
    # which is no special token for every tokenizer
    ids = answered.said
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
    advance: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One answer to each prompt, in the order of the prompts.

    Where several processes hold one model (FSDP, tensor parallel), each calls this with the same
    arguments: all take the same number of forward passes, because a process goes on until no
    process has an unfinished row. Processes that each hold the whole model do not wait for others.

    Args:
        model: A causal language model, or the module around it that FSDP shards (with the model as
            its attribute ``model``).
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, none empty; of one that fills the model's context the
            last tokens are taken, so that there is room for an answer.
        max_new_tokens: Longest answer, in tokens; fewer where the model's context ends.
        temperature: 0 is greedy.
        top_p: Nucleus sampling, for temperatures above 0.
        seed: Of the sampling; the global random state is neither used nor changed.
        batch_size: Prompts answered at a time; fewer when a GPU's memory does not hold so many.
        advance: Called with the number of prompts just answered.
        numbers: Which random stream each prompt has; by default its place.
        between: Called before every few tokens of a batch; what it raises ends the answering.
    """
    root, model = model, model if hasattr(model, "config") else model.model
    forward, together = _forward(model, root), _in_parts(model)
    streams = range(len(prompts)) if numbers is None else numbers
    context, ends = context_of(model.config), end_tokens(model, tokenizer)
    cached = _takes_cache(model)
    if context:
        prompts = [prompt[-max(1, context - 1) :] for prompt in prompts]
    # prompts of like length together: little padding
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))

    def run(places: list[int]) -> list[Answer]:
        rows = [prompts[place] for place in places]
        state = _Batch.of(model, rows, tokenizer.eos_token_id, cached=cached)
        sampler = Sampler(temperature, top_p, [stream(seed, streams[place]) for place in places])
        longest = max(len(prompt) for prompt in state.prompts)
        room = max(1, min(max_new_tokens, context - longest)) if context else max_new_tokens
        return _answer_batch(state, forward, room, sampler, ends, between, together=together)

    found: dict[int, Answer] = {}
    turns = same_rotation_up_to(model.config)

    def group(length: int) -> int:
        # without a cache, padding would change what the model sees
        if not cached or (context and length + max_new_tokens > context):
            return length
        if length > turns:
            return -1
        return length if length + max_new_tokens > turns else 0

    batches = _batches(order, prompts, batch_size, group)
    for places, rows in _as_memory_allows(run, list(batches), together=together):
        found.update(zip(places, rows, strict=True))
        if advance:
            advance(len(places))
    return [found[number] for number in range(len(prompts))]


def _as_memory_allows(
    run: Callable[[list[int]], list[Answer]], batches: list[list[int]], *, together: bool
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Each batch with its answers; when memory is short, this one and the later ones in halves."""
    while batches:
        numbers = batches[0]
        rows: list[Answer] | None = None
        try:
            rows = run(numbers)
        except torch.OutOfMemoryError:
            # one process alone must not take other steps than those that hold the same model
            if len(numbers) == 1 or together:
                raise
        # not in the except clause: its traceback would hold the tensors that filled the memory
        if rows is None:
            half = (len(numbers) + 1) // 2
            batches = [batch[i : i + half] for batch in batches for i in range(0, len(batch), half)]
            continue
        batches = batches[1:]
        yield numbers, rows


def _batches(
    order: list[int],
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    group: Callable[[int], int],
) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch; ``group`` tells by length which may share one."""
    for _, members in groupby(order, key=lambda number: group(len(prompts[number]))):
        numbers = list(members)
        for first in range(0, len(numbers), batch_size):
            yield numbers[first : first + batch_size]


def _answer_batch(
    state: _Batch,
    forward: Forward,
    room: int,
    sampler: Sampler,
    ends: frozenset[int],
    between: Callable[[], None],
    *,
    together: bool,
) -> list[Answer]:
    prompts = state.prompts
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    """The prompt behind each row that is still in the batch."""
    logits_BV = state.read_prompts(forward)
    for position in range(room):
        if position % _BETWEEN == 0:
            between()
        chosen = sampler.choose(logits_BV)
        for row, token in zip(rows, chosen, strict=True):
            # a row that has ended may still be in the batch: it gets no more tokens
            if not answers[row] or answers[row][-1] not in ends:
                answers[row].append(token)
        going = [place for place, row in enumerate(rows) if answers[row][-1] not in ends]
        anyone = _any_process(bool(going), state.device) if together else going
        if not anyone or position + 1 == room:
            break
        if going and len(going) <= _COMPACT_BELOW * len(rows):
            state.keep(going)
            rows = [rows[place] for place in going]
            chosen = [chosen[place] for place in going]
            sampler.keep(going)
        logits_BV = state.read_next(forward, chosen)
    return [
        Answer(prompt, ids, bool(ids) and ids[-1] in ends)
        for prompt, ids in zip(prompts, answers, strict=True)
    ]


@dataclass
class _Batch:
    """The rows of a batch, with their cache but for state space models."""

    model: Any
    prompts: list[list[int]]
    ids_BL: Tensor
    mask_BL: Tensor
    cache: Any
    turns: float
    """The length beyond which all rows are rotated otherwise."""

    @classmethod
    def of(
        cls, model: Any, prompts: Sequence[Sequence[int]], padding: int, *, cached: bool
    ) -> _Batch:
        """Prompts padded on the left."""
        longest = max(map(len, prompts))
        ids = [[padding] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return cls(
            model,
            [list(prompt) for prompt in prompts],
            torch.tensor(ids, device=model.device),
            torch.tensor(mask, device=model.device),
            _new_cache(model) if cached else None,
            same_rotation_up_to(model.config),
        )

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.ids_BL.device

    def read_prompts(self, forward: Forward) -> Tensor:
        """Logits of the first new token of each row, [B, V]."""
        return self._read(forward, self.ids_BL, (self.mask_BL.cumsum(1) - 1).clamp(min=0))

    def read_next(self, forward: Forward, tokens: list[int]) -> Tensor:
        """Logits after one more token in each row, [B, V]."""
        next_B1 = torch.tensor(tokens, device=self.device)[:, None]
        self.mask_BL = torch.cat([self.mask_BL, torch.ones_like(next_B1)], 1)
        self.ids_BL = torch.cat([self.ids_BL, next_B1], 1)
        if self.cache is None:
            return self.read_prompts(forward)
        if self.ids_BL.shape[1] == self.turns + 1:
            self.cache = _new_cache(self.model)
            return self.read_prompts(forward)
        return self._read(forward, next_B1, self.mask_BL.sum(1, keepdim=True) - 1)

    def _read(self, forward: Forward, ids_BL: Tensor, position_BL: Tensor) -> Tensor:
        offered = {
            "input_ids": ids_BL,
            "attention_mask": self.mask_BL,
            "position_ids": position_BL,
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
            "logits_to_keep": 1,
        }
        takes = _parameters(self.model)
        inputs = {name: value for name, value in offered.items() if name in takes}
        logits_BLV = forward(**inputs).logits
        whole = getattr(logits_BLV, "full_tensor", None)  # tensor parallel
        logits_BV: Tensor = (whole() if whole else logits_BLV)[:, -1]
        if bool(logits_BV.isnan().any()):
            raise ModelError(
                "the model answers with NaN",
                where=f"a prompt of {int(self.mask_BL.sum(1).min())} tokens or more",
                fix="look at its weights; with float16, use bfloat16 or float32",
            )
        return logits_BV

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.device)
        self.mask_BL, self.ids_BL = self.mask_BL[index], self.ids_BL[index]
        if self.cache is not None:
            # also of layers with states instead of keys, which have no batch_select_indices
            self.cache.reorder_cache(index)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _takes_cache(model: Any) -> bool:
    """Whether the model takes transformers' cache, and has attention whose length that knows."""
    # MiniMax has a cache of its own kind
    takes_any = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    if "past_key_values" not in _parameters(model) or not takes_any():
        return False
    # RecurrentGemma's layers keep states themselves: no row can leave, and padding is in them
    if any(hasattr(module, "recurrent_states") for module in model.modules()):
        return False
    try:
        _new_cache(model).get_seq_length()
    except ValueError:
        return False
    return True


def _parameters(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _forward(model: Any, root: Any) -> Forward:
    """How to run the model: through ``root``, where FSDP gathers the weights around it."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if root is model or not isinstance(root, FSDPModule):
        forward: Forward = model
        return forward
    if not hasattr(root, "read_tokens"):

        def read_tokens(_: Any, **inputs: Any) -> Any:
            return model(**inputs)

        root.read_tokens = MethodType(read_tokens, root)
        register_fsdp_forward_method(root, "read_tokens")
    through: Forward = root.read_tokens
    return through


def _in_parts(model: Any) -> bool:
    """Whether several processes hold the model together."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def _any_process(flag: bool, device: torch.device) -> bool:
    """Whether any process has rows that go on; every process must ask."""
    flags = torch.tensor([int(flag)], device=device)
    arrived()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
