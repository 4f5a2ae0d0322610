"""Held-out figures, samples, the report, and the gate that decides on them."""
