"""The best candidate of a sweep."""

from typing import List  # noqa: UP035  # kfp reads the annotation as text

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def select(
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006  # as kfp reads it
    evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006  # as kfp reads it
    policy: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    candidates: list,
) -> str:
    """Takes the policy with the best reward accuracy on the validation part.

    Args:
        policies: Outputs of preference, one a candidate.
        evaluations: Outputs of evaluate on the validation part, in the same order.
        policy: The best, with the same content.
        summary: The candidates and their figures.
        metrics: Training figures of the best.
        candidates: What each candidate changed: a JSON list of settings, in the same order.

    Returns:
        What the best candidate changed.
    """
    from pathlib import Path

    from dpo.evaluate.select import run_select
    from dpo.storage.progress import reported
    from dpo.storage.step import describe, log_metrics, write_text

    with reported("select"):
        best, table, manifest = run_select(
            candidates,
            [Path(item.path) for item in policies],
            [Path(item.path) for item in evaluations],
            Path(policy.path),
        )
        write_text(Path(summary.path), table)
        describe(policy, manifest)
        log_metrics(metrics, manifest)
    return best.overrides
