"""The webhook: a community posts preference pairs, and a pipeline run makes a model of them."""
