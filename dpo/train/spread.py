"""``BasicTrainer`` on a machine with several GPUs: one process, the layers lie on all of them.

A row passes the GPUs one after the other, so this adds memory, not speed. What is not a layer
(embeddings, last norm, output weights) is on the first GPU, where a row begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from dpo.errors import ModelError


def shares(sizes: Sequence[int], rest: int, n_devices: int) -> list[int]:
    """Device of each layer: consecutive layers together, about equal bytes on each device.

    Args:
        sizes: Bytes of each layer.
        rest: Bytes that are on the first device in any case.
        n_devices: Number of devices.
    """
    total = rest + sum(sizes)
    found, before = [], rest
    for size in sizes:
        # by its middle, so that a layer on the border goes where more of it belongs
        found.append(min(int((before + size / 2) * n_devices / total), n_devices - 1))
        before += size
    return found


def spread_layers(model: Any, blocks: Sequence[Any], devices: Sequence[torch.device]) -> None:
    """Put ``blocks`` of ``model`` on ``devices``, everything else on the first; in place.

    Raises:
        ModelError: there are no blocks.
    """
    if not blocks:
        raise ModelError(
            f"{model.config.model_type} models do not say which of their modules are blocks, to be "
            f"spread over {len(devices)} GPUs",
            where="trainer=BasicTrainer",
            fix="set model.block_name to the class of a block, or CUDA_VISIBLE_DEVICES=0",
        )
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    rest = sum(p.nbytes for p in model.parameters()) - sum(sizes)
    placed = shares(sizes, rest, len(devices))
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        # not model.to: the first GPU need not have room for all of it
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(devices[0]), recurse=False)
    for block, number in zip(blocks, placed, strict=True):
        block.to(devices[number])
        block.register_forward_pre_hook(_bring_to(devices[number]), with_kwargs=True)
    blocks[-1].register_forward_hook(_bring_back(devices[0]))


def _bring_to(device: torch.device) -> Any:
    def hook(_: Any, arguments: Any, named: Any) -> Any:
        return _moved(arguments, device), _moved(named, device)

    return hook


def _bring_back(device: torch.device) -> Any:
    def hook(_: Any, __: Any, output: Any) -> Any:
        return _moved(output, device)

    return hook


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), values)
