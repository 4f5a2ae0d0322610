"""How long processes wait for each other."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dpo.distributed import together


@pytest.fixture
def joined():
    """A job of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    together._groups.clear()


def waits(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def test_only_what_the_first_process_says_is_waited_for_a_day(joined):
    assert waits(together.saving_group()) == timedelta(days=1)
    assert waits(together.writing_group()) == timedelta(minutes=30)
    assert together.writing_group() is together.writing_group()


def test_one_process_alone_needs_no_group():
    assert together.saving_group() is None
    assert together.writing_group() is None
