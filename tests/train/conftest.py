"""Pairs, an SFT model and its log-probabilities, made once for the tests of training."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.stage import run_ingest
from dpo.train.reference import run_reference
from dpo.train.stage import run_train

SETTINGS = [
    *("model=tiny", "datasets=[hh_sample]", "max_length=96", "max_prompt_length=48"),
    *("batch_size=8", "lr=1e-3", "warmup_steps=2", "n_eval_examples=5", "seed=3"),
]


@dataclass(frozen=True)
class Prepared:
    """Outputs that a preference stage starts from."""

    data: Path
    sft: Path
    reference: Path

    def paths(self, *, sft: bool) -> dict[str, Path]:
        """Arguments of ``run_train`` for either stage."""
        if sft:
            return {"pairs": self.data}
        return {"pairs": self.data, "base": self.sft, "reference": self.reference}


@pytest.fixture(scope="package")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """96 training pairs at most are scored: no test here trains on more."""
    folder = tmp_path_factory.mktemp("prepared")
    found = Prepared(folder / "data", folder / "sft", folder / "reference")
    config = compose([*SETTINGS, "n_examples=96"]).config
    sft = compose([*SETTINGS, "n_examples=16", "loss=sft"]).config
    run_ingest(restrict(config, "ingest"), found.data)
    run_train(restrict(sft, "sft"), found.sft, pairs=found.data)
    reference = restrict(config, "reference")
    run_reference(reference, found.reference, pairs=found.data, model=found.sft)
    return found
