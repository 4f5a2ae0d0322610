"""Runs the models of an evaluation: scores of held-out pairs, answers to held-out prompts.

Of several processes each does a share, and all have all results.

One model is in memory at a time. The SFT model answers first; the policy then scores the pairs,
answers, and scores both models' answers; the SFT model at last scores what the policy wrote.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from dpo.config.losses import SFTLoss
from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.data.schema import TEST, Pair
from dpo.data.tokenize import TokenizedExample, load_tokenizer
from dpo.distributed.device import best_device
from dpo.distributed.together import each_a_share
from dpo.errors import ModelError
from dpo.evaluate.kl import kl_figures
from dpo.modeling.budget import scoring_budget
from dpo.modeling.generation import Answer, answer, decode, encode
from dpo.modeling.load import load_model
from dpo.modeling.losses import uses_means
from dpo.modeling.precision import DTYPES, compute_dtype
from dpo.modeling.sharded import Scorer, load_once, on_devices, score_shared
from dpo.storage.progress import Bar, track

_KL_STREAM = 7919
"""Added to the seed, so that the samples for the KL are not those of the report."""


@dataclass(frozen=True)
class Models:
    """Folders of the models that are compared."""

    sft: Path
    policy: Path
    published: Path | None = None
    policy_base: Path | None = None
    """Of an adapter, where it is not to be looked for."""
    published_base: Path | None = None
    """Of a published adapter."""
    score_sft: bool = False
    """Whether the SFT model scores the pairs here: nobody gave what it gives them."""


@dataclass
class Measured:
    """What the models gave."""

    before: list[PairLogProbs] = field(default_factory=list)
    """Of the SFT model, where it was to score them."""
    after: list[PairLogProbs] = field(default_factory=list)
    published: list[PairLogProbs] = field(default_factory=list)
    rows: list[Pair] = field(default_factory=list)
    """The pairs whose prompts were answered."""
    answers: dict[str, tuple[list[Answer], list[str]]] = field(default_factory=dict)
    """By model: answers and their texts."""
    reward_change: list[float] = field(default_factory=list)
    """Implicit reward of the policy's answer minus that of the SFT model's, by row."""
    kl: dict[str, Any] | None = None


def spread(rows: Sequence[Pair], n: int) -> list[Pair]:
    """The first ``n`` rows with different prompts, taking turns between the sources."""
    by_source: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    for row in rows:
        if row.prompt not in seen:
            seen.add(row.prompt)
            by_source.setdefault(row.dataset, []).append(row)
    found: list[Pair] = []
    for turn in range(max(map(len, by_source.values()), default=0)):
        found += [group[turn] for group in by_source.values() if turn < len(group)]
    return found[:n]


class Measurement:
    """One evaluation's models, prompts and settings."""

    def __init__(
        self,
        config: RunConfig,
        rows: Sequence[Pair],
        examples: Sequence[TokenizedExample],
        tokenizer: Any,
    ) -> None:
        self.config, self.rows, self.examples, self.tokenizer = config, rows, examples, tokenizer
        self.wanted = config.evaluation
        self.device = best_device()
        self.sampled = spread(rows, self.wanted.n_samples)
        self.kl_rows = spread(rows, self.wanted.n_kl_samples)
        self.result = Measured(rows=self.sampled)

    def run(self, models: Models) -> Measured:
        """Every figure of every model."""
        result, n_models = self.result, 3 if models.published else 2
        total = n_models * len(self.sampled) + len(self.kl_rows)
        total += (n_models - 1 + models.score_sft) * len(self.examples)
        with track("evaluate", "pairs and answers", total) as bar:
            if models.score_sft:
                # as the reference step does
                types = self.config.model.model_copy(
                    update={"policy_dtype": self.config.model.reference_dtype}
                )
                sft = self._load(models.sft, types=types)
                result.before = self._pairs(sft, "SFT model", bar, types)
                del sft
            if self.sampled:
                result.answers["sft"] = self._answers(self._load(models.sft), self.tokenizer, bar)
            policy = self._load(models.policy, models.policy_base)
            result.after = self._pairs(policy, "policy", bar)
            kl_answers = self._policy_answers(policy, bar)
            ours = self._score(policy, self._answer_examples())
            kl_ours = self._score(policy, kl_answers)
            del policy
            if self.sampled or kl_answers:
                sft = self._load(models.sft)
                theirs = self._score(sft, self._answer_examples())
                self._finish(ours, theirs, kl_ours, self._score(sft, kl_answers))
                del sft
            if models.published:
                self._published(models.published, models.published_base, bar)
        return result

    def _load(
        self,
        folder: Path,
        base: Path | None = None,
        types: ModelConfig | None = None,
        *,
        scores: bool = True,
    ) -> Any:
        settings = types or self.config.model
        # not compiled: answers have other shapes with every token
        load = partial(
            load_model,
            folder,
            DTYPES[settings.policy_dtype],
            device=self.device,
            trust_remote_code=settings.trust_remote_code,
            kernels=settings.kernels,
            output_layer=settings.output_layer,
            base=base,
        )
        if not dist.is_initialized():
            return self._checked(load(), folder) if scores else load()
        # FSDP's hooks hold the model before in circles
        gc.collect()
        model, _ = load_once(lambda weights: (load(weights=weights), None))
        if scores:
            self._checked(model, folder)
        return on_devices(model, settings, self.device)

    def _checked(self, model: Any, folder: Path) -> Any:
        """The model, which must know each token of the texts and their places."""
        rows = model.get_input_embeddings().weight.shape[0]
        texts = (ids_T for e in self.examples for ids_T in (e.prompt_T, *e.responses))
        highest = max(int(ids_T.max(initial=0)) for ids_T in texts)
        if highest >= rows:
            raise ModelError(
                f"the model has embeddings for {rows:,} tokens, and the held-out pairs have token "
                f"{highest:,}",
                where=str(folder),
                fix="compare models with the same tokenizer",
            )
        return model

    def _tokenizer_of(self, folder: Path) -> Any:
        return load_tokenizer(folder, trust_remote_code=self.config.model.trust_remote_code)

    def _score(
        self,
        model: Any,
        examples: Sequence[TokenizedExample],
        bar: Bar | None = None,
        types: ModelConfig | None = None,
    ) -> list[tuple[Any, ...]]:
        if not examples:
            return []
        return score_shared(
            model,
            examples,
            dtype=compute_dtype(types or self.config.model, self.device),
            token_budget=scoring_budget(self.config, model, self.device),
            bar=bar,
        )

    def _pairs(
        self, model: Any, whose: str, bar: Bar, types: ModelConfig | None = None
    ) -> list[PairLogProbs]:
        scored = self._score(model, self.examples, bar, types)
        found = [
            PairLogProbs(TEST, example.tokens_hash(), chosen, rejected)
            for example, (chosen, rejected) in zip(self.examples, scored, strict=True)
        ]
        check_finite(found, whose)
        return found

    def _answers(self, model: Any, tokenizer: Any, bar: Bar) -> tuple[list[Answer], list[str]]:
        given = self._ask(model, tokenizer, self.sampled, bar)
        return given, [decode(tokenizer, item) for item in given]

    def _ask(
        self, model: Any, tokenizer: Any, rows: Sequence[Pair], bar: Bar, **how: float
    ) -> list[Answer]:
        wanted = self.wanted
        prompts = [encode(tokenizer, row.prompt, self.config.max_prompt_length) for row in rows]
        settings: dict[str, Any] = {
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "seed": self.config.seed,
            **how,
        }

        together = isinstance(model, Scorer)

        def share(part: Sequence[list[int]], numbers: range) -> list[Answer]:
            return answer(
                model,
                tokenizer,
                part,
                max_new_tokens=wanted.max_new_tokens,
                batch_size=wanted.batch_size,
                advance=None if dist.is_initialized() and not together else bar.advance,
                numbers=numbers,
                **settings,
            )

        if together:
            return share(prompts, range(len(prompts)))
        # some batches each, for prompts of like length to be found
        return each_a_share(prompts, share, at_once=4 * wanted.batch_size, advance=bar.advance)

    def _policy_answers(self, policy: Any, bar: Bar) -> list[TokenizedExample]:
        """Answers for the report, and the answers on which the KL is estimated."""
        if self.sampled:
            self.result.answers["policy"] = self._answers(policy, self.tokenizer, bar)
        seed = self.config.seed + _KL_STREAM
        given = self._ask(
            policy, self.tokenizer, self.kl_rows, bar, temperature=1.0, top_p=1.0, seed=seed
        )
        return [
            _example(row.pair_id, item.prompt_ids, item.ids)
            for row, item in zip(self.kl_rows, given, strict=True)
        ]

    def _answer_examples(self) -> list[TokenizedExample]:
        """Each prompt with the SFT model's and the policy's answer."""
        if not self.sampled:
            return []
        sides = (self.result.answers["sft"][0], self.result.answers["policy"][0])
        return [
            _example(row.pair_id, sft.prompt_ids, sft.ids, policy.ids)
            for row, sft, policy in zip(self.sampled, *sides, strict=True)
        ]

    def _finish(self, ours: Any, theirs: Any, kl_ours: Any, kl_theirs: Any) -> None:
        """Reward change of the answers, and the KL divergence."""
        loss = self.config.loss
        assert not isinstance(loss, SFTLoss)
        reduce = np.mean if uses_means(loss) else np.sum
        for (sft_p, policy_p), (sft_r, policy_r) in zip(ours, theirs, strict=True):
            gain = reduce(policy_p - policy_r) - reduce(sft_p - sft_r)
            self.result.reward_change.append(float(loss.beta * gain))
        if kl_ours:
            self.result.kl = kl_figures(
                [row.prompt for row in self.kl_rows],
                [values for (values,) in kl_ours],
                [values for (values,) in kl_theirs],
                n_bootstrap=self.wanted.n_bootstrap,
                seed=self.config.seed,
            )

    def _published(self, folder: Path, base: Path | None, bar: Bar) -> None:
        tokenizer = self._tokenizer_of(folder)
        # log-probabilities of other tokens could not be compared; answers can
        scores = tokenizer.get_vocab() == self.tokenizer.get_vocab()
        model = self._load(folder, base, scores=scores)
        if scores:
            self.result.published = self._pairs(model, "published version", bar)
        if self.sampled:
            self.result.answers["published"] = self._answers(model, tokenizer, bar)


def check_finite(rows: Sequence[PairLogProbs], whose: str) -> None:
    """Stop where figures would be made of what is no number.

    Raises:
        ModelError: with how many pairs have a log-probability that is NaN or infinite.
    """
    lost = sum(not np.isfinite([row.chosen.sum(), row.rejected.sum()]).all() for row in rows)
    if lost:
        raise ModelError(
            f"the {whose} gives {lost} of {len(rows)} held-out pairs a log-probability that is NaN "
            "or infinite",
            fix="look at its weights and at the curves of its training; with float16, use bfloat16 "
            "or float32",
        )


def _example(pair_id: str, prompt: list[int], *responses: list[int]) -> TokenizedExample:
    ids = [np.asarray(tokens, dtype=np.int32) for tokens in (prompt, *responses)]
    return TokenizedExample(pair_id, ids[0], tuple(ids[1:]))
