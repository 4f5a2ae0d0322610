"""Models: loading, packed attention, log-probabilities, losses, generation."""
