"""Errors travel between the processes of a training."""

import pickle

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


def test_a_message_has_nothing_that_a_terminal_would_obey_or_could_not_write():
    error = errors.DataError("caf\udce9 \x1b[2J \u202e", where="a\ud800", fix="b\nc\td\u00e9")
    assert error.found == r"caf\udce9 \u001b[2J \u202e"
    assert (error.where, error.fix) == (r"a\ud800", "b\nc\td\u00e9")
