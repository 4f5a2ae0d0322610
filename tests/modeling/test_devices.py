"""What GPUs do, of which there is none here: full memory, old drivers, sums in any order."""

import os
from functools import partial

import pytest
import torch

from dpo.distributed import device
from dpo.distributed.device import best_device
from dpo.distributed.work import _take_gpu
from dpo.errors import ConfigError, TrainingError
from dpo.modeling import precision
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.memory import enough_memory
from dpo.modeling.repeatable import in_any_order, or_in_any_order, same_bits
from tests.modeling.test_kernels import build


@pytest.fixture
def broken_driver(monkeypatch):
    """A GPU in /dev that torch cannot use."""
    import warnings

    def unavailable():
        warnings.warn("The NVIDIA driver on your system is too old (found 12020)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_has_nvidia_device", lambda: True)
    for name in ("CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


def test_a_pod_whose_gpu_torch_cannot_use_does_not_train_on_the_cpu(broken_driver, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(TrainingError, match=r"driver on your system is too old(.|\n)*update"):
        best_device()


def test_elsewhere_that_is_said(broken_driver, capsys):
    assert best_device() == "cpu"
    assert "driver on your system is too old (found 12020)): working on the CPU" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden_are_not_missed(broken_driver, hidden, monkeypatch, capsys):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert best_device() == "cpu"
    assert capsys.readouterr().err == ""


def test_cublas_is_given_a_workspace_of_its_own_before_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert best_device() == "cuda"
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has 79 GiB"),
            r"full: CUDA out of memory\. Tried 2 GiB(.|\n)*micro_batch_tokens",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"
            ),
            "memory of the GPU is full(.|\n)*nvidia-smi",
        ),
        (
            RuntimeError("ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'"),
            "memory of the GPU is full",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on"),
            r"torch 2\S* has no code for this GPU",
        ),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
            r"the GPU has failed: .*ECC(.|\n)*Xid(.|\n)*last checkpoint",
        ),
        (
            # mostly an address that a kernel got wrong
            torch.AcceleratorError("CUDA error: unspecified launch failure"),
            r"a kernel on the GPU has failed: (.|\n)*a broken GPU from a bug",
        ),
        (
            torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
            r"the GPU is not free: (.|\n)*who holds it",
        ),
    ],
)
def test_what_a_gpu_reports_is_one_message(error, words):
    with pytest.raises(TrainingError, match=words), enough_memory():
        raise error


def test_a_bug_stays_what_it_is():
    with pytest.raises(RuntimeError, match="device-side assert") as found, enough_memory():
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert not isinstance(found.value, TrainingError)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(
        TrainingError, match=r"4 processes for 2 GPUs(.|\n)*DPO_PROCESSES to at most 2"
    ):
        _take_gpu(2)


def test_operations_that_repeat_are_asked_for_while_training(monkeypatch):
    assert not torch.are_deterministic_algorithms_enabled()
    with same_bits(True):
        assert torch.are_deterministic_algorithms_enabled()
        # attention stays as it is where torch only warns
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with same_bits(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_model_that_cannot_repeat_is_told_the_setting():
    text = "histc_cuda with floating point input does not have a deterministic implementation, but"
    with pytest.raises(ConfigError, match=r"histc_cuda(.|\n)*deterministic=false"), same_bits(True):
        raise RuntimeError(text)
    assert not torch.are_deterministic_algorithms_enabled()


def refused_operation(calls):
    # torch has no kind of it that gives the same bits each time, on a CPU neither
    calls.append(torch.are_deterministic_algorithms_enabled())
    return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0])).tolist()


def test_one_process_goes_on_in_any_order_where_torch_refuses(capfd):
    calls = []
    work = partial(refused_operation, calls)
    with same_bits(True):
        assert or_in_any_order(work, "preference", alone=True) == [0, 2, 0]
        assert or_in_any_order(work, "preference", alone=True) == [0, 2, 0]
    assert calls == [True, False, False]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "put_ adds in no fixed order" in capfd.readouterr().err


def test_several_processes_do_nothing_anew():
    with pytest.raises(ConfigError, match=r"put_(.|\n)*deterministic=false"), same_bits(True):
        or_in_any_order(partial(refused_operation, []), "preference", alone=False)


def test_what_changes_no_weights_may_go_in_any_order():
    with same_bits(True):
        with in_any_order():
            assert refused_operation([]) == [0, 2, 0]
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("choice", [{"kernels": "liger"}, {"kernels": "auto", "compiled": True}])
def test_kernels_that_are_compiled_where_they_run_need_a_compiler(choice, monkeypatch):
    """The train image has none."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="needs a C compiler"):
        apply_kernels(build("llama"), device="cuda", **choice)


@pytest.mark.parametrize(
    ("dtype", "device_type", "native", "told"),
    [
        (torch.bfloat16, "cpu", False, True),
        (torch.float16, "cpu", False, True),
        (torch.bfloat16, "cpu", True, False),
        (torch.float32, "cpu", False, False),
        (torch.bfloat16, "cuda", False, False),
    ],
)
def test_products_that_a_processor_has_no_instructions_for_are_told(
    dtype, device_type, native, told, monkeypatch, capsys
):
    """On such a processor a square product of 2048 ran at 0.3 GFLOP/s in bfloat16, at 104 in
    float32: it looks as if training hung."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: native)
    precision.say_if_slow(dtype, device_type, "sft")
    assert ("no instructions" in capsys.readouterr().err) is told
