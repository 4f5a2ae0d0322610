"""Publication of models to a store, and reading them back."""
