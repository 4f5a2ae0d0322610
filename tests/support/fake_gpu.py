"""A GPU of which there is nothing but the name: fake tensors that say they are on one.

Real code runs with them, kernels excepted. An operation that mixes devices fails as on a GPU, what
would make the CPU wait for the GPU is noted, and every number that is asked for is 1. Only what
torch itself refuses without CUDA is replaced here, never the code under test. torch's engine is one
of these things: ``backward`` gives every weight a gradient, and goes through nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_iter

DEVICE = torch.device("cuda", 0)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_ITEM = torch.ops.aten._local_scalar_dense.default
_OF_VALUES = (_ITEM, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
"""What they return depends on values, for which the GPU is waited for."""


class FakeGpu(FakeTensorMode):
    """Fake tensors, and what was done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Operations for which a CPU waits until the GPU has done all before them."""
        self.kernels: list[str] = []
        """All operations on a GPU, by their names."""
        self.weights: list[torch.nn.Parameter] = []
        self._changed: dict[int, Any] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and note it."""
        kwargs = kwargs or {}
        before = _device_types((args, kwargs))
        on_gpu = "cuda" in before
        if on_gpu:
            self.kernels.append(str(func))
        if func in _OF_VALUES and on_gpu:
            self.waits.append(str(func))
        if func is _ITEM:
            with unset_fake_temporarily():
                value = torch.ones((), dtype=args[0].dtype).item()
            # nothing on the GPU is NaN
            return False if on_gpu and args[0].dtype == torch.bool else value
        result = super().dispatch(func, types, args, kwargs)
        crosses = len(before | _device_types(result)) > 1
        without_waiting = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        if func in _COPIES and crosses and not without_waiting:
            self.waits.append(str(func))
        if func is torch.ops.aten.index.Tensor and on_gpu:
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            self.waits += [f"{func} by a mask" for _ in masks]
        return result

    def move(self, model: Any, device: torch.device = DEVICE) -> Any:
        """``model`` with fake weights and buffers on a GPU; in place."""
        self.apply(model, lambda tensor: self.from_tensor(tensor).detach().to(device))
        return model

    def apply(self, model: Any, change: Callable[..., Any], recurse: bool = True) -> Any:
        """In place of ``Module._apply``, which changes no fake tensors; ties are kept."""
        for module in model.modules() if recurse else [model]:
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if id(weight) not in self._changed:
                    trained = weight.requires_grad
                    new = torch.nn.Parameter(change(weight).detach(), requires_grad=trained)
                    # an id means something while its tensor lives
                    self._changed[id(weight)] = (new, weight)
                module._parameters[name] = self._changed[id(weight)][0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = change(buffer)
        self.weights = [*model.parameters()] if recurse else self.weights
        return model

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """Of a tensor's shape."""
        if tensor.device.type == "cuda":
            self.waits.append("to an array")
        return np.ones(tuple(tensor.shape), dtype=np.float32 if tensor.is_floating_point() else int)

    def backward(self, loss: torch.Tensor) -> None:
        """In place of torch's engine."""
        assert loss.requires_grad
        assert loss.device == DEVICE
        for weight in self.weights:
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)


def _device_types(values: Any) -> set[str]:
    return {value.device.type for value in tree_iter(values) if isinstance(value, torch.Tensor)}


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """Within it new tensors are fake, and a GPU of that capability can be named."""
    from dpo.modeling import precision, varlen

    gpu, from_numpy, tensor = FakeGpu(), torch.from_numpy, torch.tensor

    def fake_tensor(data: Any, device: Any = None, **how: Any) -> torch.Tensor:
        # of values that are known a copy would be made in earnest
        with unset_fake_temporarily():
            real = tensor(data, **how)
        return gpu.from_tensor(real).to(device or "cpu")

    # no driver is asked for the current device; fake tensors do so only where there is no GPU
    torch._C._ensureCUDADeviceGuardSet()
    replaced = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.is_bf16_supported": lambda **_: capability >= (8, 0),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        # torch 2.11 makes a real tensor on a GPU first
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
        # memory is pinned by the driver
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        # an array's memory is real, and so would its tensor be
        "torch.from_numpy": lambda values: gpu.from_tensor(from_numpy(values)),
        "torch.tensor": fake_tensor,
        "torch.Tensor.backward": lambda loss: gpu.backward(loss),
        "torch.nn.Module._apply": lambda *given, **named: gpu.apply(*given, **named),
        "torch.Tensor.numpy": lambda tensor: gpu.numpy(tensor),
        "torch.Tensor.tolist": lambda tensor: gpu.numpy(tensor).tolist(),
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        for cached in (varlen._has_flash_attention, precision.has_fast_bfloat16):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield stack.enter_context(gpu)
