"""Publication of an approved policy."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def publish(
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    published: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    run_id: str = "",
):
    """Uploads the policy under its content hash, then points latest.json at it.

    Never cached. Content that is published already moves no bytes.

    Args:
        policy: Output of preference, or the Hugging Face folder that was evaluated.
        evaluation: Output of evaluate.
        verdict: Output of gate; a refused policy is not published.
        published: Folder with published.json: URL, content hash, bytes moved.
        metrics: Counts of files and bytes.
        settings: JSON of the settings that this step reads (see config/README.md).
        run_id: Names the run's folder in the store; empty records nothing there.
    """
    from pathlib import Path

    from dpo.publish.stage import run_publish
    from dpo.storage.step import describe, log_metrics, step

    given = {"policy": policy, "evaluation": evaluation, "verdict": verdict}
    with step("publish", settings, inputs=given) as run:
        manifest = run_publish(
            run.config,
            Path(published.path),
            policy=Path(policy.path),
            evaluation=Path(evaluation.path),
            verdict=Path(verdict.path),
            run_id=run_id,
            code=run.code,
        )
        describe(published, manifest)
        log_metrics(metrics, manifest)
