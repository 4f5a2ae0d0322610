"""``activation_checkpointing`` where a model does not say what its blocks are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from dpo.errors import ConfigError, ModelError
from dpo.modeling.recompute import checkpoint_activations


def without_blocks_declared():
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
    model = AutoModelForCausalLM.from_config(OpenAIGPTConfig(**sizes))
    assert not model._no_split_modules
    return model.eval()


def test_nothing_to_recompute_is_refused():
    """It was trained with all activations in memory, and said nothing."""
    with pytest.raises(ConfigError, match=r"model\.block_name"):
        checkpoint_activations(without_blocks_declared(), "full")
    with pytest.raises(ModelError, match="no block GPT2Block"):
        checkpoint_activations(without_blocks_declared(), "full", "GPT2Block")
    checkpoint_activations(without_blocks_declared(), "none", "GPT2Block")


@pytest.mark.parametrize(("mode", "passes"), [("full", [2, 2, 2]), ("selective", [2, 1, 2])])
def test_blocks_that_are_named_are_recomputed(mode, passes):
    """Each block once forward, and once more in backward where that was asked for."""
    model, counted = without_blocks_declared(), [0, 0, 0]
    for number, block in enumerate(model.transformer.h):

        def count(*_, number=number):
            counted[number] += 1

        block.attn.register_forward_hook(count)
    checkpoint_activations(model, mode, "Block")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert counted == passes
