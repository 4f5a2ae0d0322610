"""Every loss beside TRL 1.16's loss of the same name, where the two agree by definition.

| ours | TRL |
|---|---|
| dpo | DPOTrainer ``sigmoid`` |
| hinge, robust | DPOTrainer, same name |
| ipo, log_probs=mean | DPOTrainer ``ipo`` (TRL averages over tokens) |
| dpo, sft_weight (RPO) | DPOTrainer ``sigmoid`` + weighted ``sft``, on one pair |
| dpo, label_smoothing, reference_free | CPOTrainer ``sigmoid`` with label_smoothing |
| simpo | CPOTrainer ``simpo`` |
| orpo | ORPOTrainer's odds ratio with the chosen response's mean negative log-likelihood |

DPOTrainer's are computed from token ids by its own forward pass and padding, so they also compare
log-probabilities. DPOTrainer averages its ``sft`` over all tokens of a batch, and ignores
label_smoothing for ``sigmoid`` since 0.29. IPO with summed log-probs has no peer there.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from dpo.config.losses import DPOLoss, HingeLoss, IPOLoss, ORPOLoss, RobustLoss, SimPOLoss
from dpo.data.log_probs import PairLogProbs
from dpo.modeling.load import load_model
from dpo.modeling.losses import PairLogps, preference_loss
from dpo.modeling.scoring import score
from dpo.train.step import Objective
from tests.train.test_golden import GOLDEN, read, tokenized

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytestmark = pytest.mark.filterwarnings("ignore")

DPO_CASES = [
    (DPOLoss(beta=0.2), {"loss_type": ["sigmoid"]}),
    (HingeLoss(beta=0.2), {"loss_type": ["hinge"]}),
    (IPOLoss(beta=0.2, log_probs="mean"), {"loss_type": ["ipo"]}),
    (RobustLoss(beta=0.2, label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
    (
        DPOLoss(beta=0.2, sft_weight=0.7),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
]


def moved(seed):
    """The golden model with other weights."""
    model = load_model(GOLDEN / "model", torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def by_trl(settings, examples, folder):
    """Mean loss of ``examples`` by TRL's own forward pass, policy 1 beside reference 2."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Peer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {
            "prompt_ids": e.prompt_T.tolist(),
            "chosen_ids": e.responses[0].tolist(),
            "rejected_ids": e.responses[1].tolist(),
        }
        for e in examples
    ]
    arguments = DPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], bf16=False, max_length=None,
        gradient_checkpointing=False, beta=0.2, **settings,
    )  # fmt: skip
    trainer = Peer(
        model=moved(1),
        ref_model=moved(2),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(rows)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, inputs))


@pytest.mark.parametrize(("loss", "settings"), DPO_CASES, ids=lambda x: getattr(x, "name", ""))
def test_a_loss_is_that_of_dpo_trainer(loss, settings, tmp_path):
    single = bool(getattr(loss, "sft_weight", 0))
    examples = tokenized(read("dpo"), sft=False)[: 1 if single else 6]
    scored = score(moved(2), examples, dtype=torch.float32, token_budget=512)
    reference = [PairLogProbs("", "", *row) for row in scored]
    objective = Objective(moved(1), loss, torch.float32, 512)
    ours = objective.evaluate(examples, reference)["loss/eval"]
    assert ours == pytest.approx(by_trl(settings, examples, tmp_path), rel=2e-5)


SUMS = (torch.tensor([-10.0, -33.0, -7.5]), torch.tensor([-14.0, -20.0, -6.0]))
TOKENS = (torch.tensor([2.0, 11.0, 5.0]), torch.tensor([4.0, 8.0, 3.0]))
ZERO = torch.zeros(3)
LOGPS = PairLogps(*SUMS, ZERO, ZERO, *TOKENS)
MEANS = tuple(total / tokens for total, tokens in zip(SUMS, TOKENS, strict=True))


def cpo(**settings):
    from trl.experimental.cpo import CPOTrainer

    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    return SimpleNamespace(**{**defaults, **settings}), CPOTrainer.cpo_loss


def test_simpo_is_that_of_cpo_trainer():
    trainer, function = cpo(loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    expected, *_ = function(trainer, *MEANS)
    found = preference_loss(SimPOLoss(beta=2.0, gamma=0.7), LOGPS)
    torch.testing.assert_close(found, expected)


def test_conservative_dpo_without_reference_is_that_of_cpo_trainer():
    trainer, function = cpo(loss_type="sigmoid", beta=0.3, label_smoothing=0.1)
    expected, *_ = function(trainer, *SUMS)
    loss = DPOLoss(beta=0.3, label_smoothing=0.1, reference_free=True)
    torch.testing.assert_close(preference_loss(loss, LOGPS), expected)


def test_orpo_is_that_of_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, *MEANS)
    # its trainer subtracts the ratio's term from the negative log-likelihood
    found = preference_loss(ORPOLoss(beta=0.3), LOGPS)
    torch.testing.assert_close(found, -MEANS[0] - ratio)
