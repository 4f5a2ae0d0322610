"""Errors travel between the processes of a training."""

import errno
import pickle
from pathlib import Path

import pytest

from dpo import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.DpoError)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"where": "host a", "fix": "free space"}], ids=["", "whole"])
def test_an_error_arrives_as_it_was_sent(kind, more):
    sent = kind("the disk is full", **more)
    arrived = pickle.loads(pickle.dumps(sent))
    assert type(arrived) is kind
    assert str(arrived) == str(sent)
    assert (arrived.where, arrived.fix) == (sent.where, sent.fix)


@pytest.mark.parametrize(
    ("raised", "where"),
    [
        (Exception("No space left on device (os error 28)"), "out"),
        (OSError(errno.ENOSPC, "No space left on device"), "out"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "out/a"),
    ],
    ids=["of a library in Rust", "without a file", "with its file"],
)
def test_a_full_disk_is_named_with_its_folder(raised, where):
    with pytest.raises(OSError, match="No space left") as caught, errors.writing(Path("out")):
        raise raised
    problem = errors.system_problem(caught.value)
    assert (problem.found, problem.where) == ("the disk is full", where)


@pytest.mark.parametrize(
    "raised",
    [
        errors.StoreError("refused (os error 111)"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ValueError("no"),
        Exception("No such file or directory (os error 2)"),
    ],
)
def test_what_is_no_write_is_left_as_it_is(raised):
    with pytest.raises(type(raised)) as caught, errors.writing(Path("out")):
        raise raised
    assert caught.value is raised
    assert getattr(raised, "filename", None) is None


def test_a_message_has_nothing_that_a_terminal_would_obey_or_could_not_write():
    error = errors.DataError("caf\udce9 \x1b[2J \u202e", where="a\ud800", fix="b\nc\td\u00e9")
    assert error.found == r"caf\udce9 \u001b[2J \u202e"
    assert (error.where, error.fix) == (r"a\ud800", "b\nc\td\u00e9")
