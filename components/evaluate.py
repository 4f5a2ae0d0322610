"""Held-out figures, samples and the report."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    pairs: dsl.Input[dsl.Dataset],
    sft: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    roc: dsl.Output[dsl.ClassificationMetrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    settings: str = "{}",
    fingerprint: str = "",
    overrides: str = "",
    part: str = "",
    log_probs: dsl.Input[dsl.Dataset] = None,
):
    """Compares the policy with the SFT model on pairs that neither was trained on.

    Both may be any Hugging Face folders with the same tokens, such as a model and what another
    program made of it.

    Args:
        pairs: Output of ingest.
        sft: Output of sft, or a Hugging Face folder: the reference.
        policy: Output of preference, or a Hugging Face folder.
        evaluation: Folder with evaluation.json, samples.json, pairs.json and both forms of the
            report.
        report: The report for a browser.
        summary: The report as Markdown.
        metrics: The held-out figures.
        roc: How well the implicit reward tells chosen from rejected responses.
        confusion: The same at the median reward.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
        overrides: JSON list of settings that a sweep changes, such as ["loss.beta=0.2"].
        part: all, validation or test: which held-out pairs; empty leaves it to the settings.
        log_probs: Output of reference, made with sft; made here where it is left out.
    """
    from pathlib import Path

    from dpo.evaluate.artifacts import log_classification
    from dpo.evaluate.stage import run_evaluate
    from dpo.publish.pinned import pinned
    from dpo.storage.lineage import note_sources
    from dpo.storage.step import copy_report, describe, log_metrics, step

    given = {"pairs": pairs, "sft": sft, "policy": policy, "log_probs": log_probs}

    with (
        step("evaluate", settings, fingerprint, overrides, part=part, inputs=given) as run,
        pinned(run.config.evaluation.published) as published,
    ):
        manifest = run_evaluate(
            run.config,
            Path(evaluation.path),
            pairs=Path(pairs.path),
            sft=Path(sft.path),
            policy=Path(policy.path),
            reference=Path(log_probs.path) if log_probs else None,
            published=published,
            code=run.code,
        )
        steps = dict(zip(given, ("ingest", "sft", "preference", "reference"), strict=True))
        uris = {steps[name]: item.uri for name, item in given.items() if item}
        note_sources(Path(evaluation.path), uris)
        describe(evaluation, manifest)
        copy_report(Path(evaluation.path, "report.html"), Path(report.path))
        copy_report(Path(evaluation.path, "report.md"), Path(summary.path))
        log_metrics(metrics, manifest)
        log_classification(Path(evaluation.path), roc, confusion)
