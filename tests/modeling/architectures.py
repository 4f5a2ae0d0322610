"""Small models of many architectures, with random weights."""

import warnings
from typing import Any

import torch

HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "shared_intermediate_size": 32,
}
"""Of granitemoehybrid: states in one layer, attention in the next, experts in both."""


def random_model(kind: str, settings: dict[str, Any], **options: Any) -> Any:
    """A causal model of ``kind``, the same for every call; ``options`` are of ``from_config``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(kind, **settings)
        return AutoModelForCausalLM.from_config(config, **options).eval()
