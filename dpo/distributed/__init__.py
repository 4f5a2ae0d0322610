"""Several processes that do one stage together: how they start, live and exchange."""
