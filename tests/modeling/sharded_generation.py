"""One process of a sharded model that answers: torchrun ... sharded_generation.py KIND FILE.

KIND is ``fsdp`` (each block, then a module around the model, as training shards it) or ``tensor``
(attention and MLP split over the processes). The first process writes its answers to FILE.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dpo.modeling.generation import answer
from tests.modeling.test_generation import PROMPTS, Tokenizer, model_of

HOW = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.9, "seed": 1, "batch_size": 4}


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def sharded(kind):
    model = model_of("llama")
    if kind == "tensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        return model
    from torch.distributed.fsdp import fully_shard

    around = Around(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(around)


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    found = answer(sharded(sys.argv[1]), Tokenizer, PROMPTS, **HOW)
    # the same again: nothing of the first time may stay behind
    again = answer(sharded(sys.argv[1]), Tokenizer, PROMPTS, **HOW)
    assert found == again
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps([item.ids for item in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
