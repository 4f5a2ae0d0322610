"""The steps of the pipeline as Kubeflow components: signature, docstring, one call into ``dpo``."""
