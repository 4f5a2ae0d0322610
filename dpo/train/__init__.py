"""Training stages: SFT, reference log-probabilities, preference training."""
