"""Figures as text."""

import pytest

from dpo.evaluate.numbers import interval_text, percent_text, signed_text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.5901, 0.49, 0.6899, "0.590 [0.490, 0.690]"),
        (-1.5, -2.0, 1.0, "−1.500 [−2.000, 1.000]"),
        (-143.26, -150.0, -140.0, "−143.3 [−150.0, −140.0]"),
        (1234.5, 1000.0, 2000.0, "1234 [1000, 2000]"),
        # at three decimals nothing would be seen
        (0.00012, -0.00008, 0.00015, "0.00012 [−0.00008, 0.00015]"),
        (0.0, 0.0, 0.002, "0.0000 [0.0000, 0.0020]"),
        (0.0, 0.0, 0.0, "0.000 [0.000, 0.000]"),
        (-0.0001, -0.5, 0.5, "0.000 [−0.500, 0.500]"),
        (1e-12, 0.0, 1e-12, "0.00000000 [0.00000000, 0.00000000]"),
    ],
)
def test_as_many_decimals_as_it_takes(value, low, high, text):
    assert interval_text({"value": value, "low": low, "high": high}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "+0.500"),
        (-0.25, "−0.250"),
        (-0.000123, "−0.00012"),
        (0.0, "0.000"),
        (12.3456, "+12.35"),
    ],
)
def test_differences_have_a_sign(value, text):
    assert signed_text(value) == text


def test_no_figure_is_a_dash():
    assert interval_text(None) == percent_text(None) == "–"
