"""The decision whether a policy is published."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def gate(
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    settings: str = "{}",
    run_id: str = "",
) -> bool:
    """Applies the rules to the held-out figures; a refusal is a result, not a failure.

    Never cached. The verdict and the run's manifest are written to the store either way.

    Args:
        evaluation: Output of evaluate.
        verdict: Folder with verdict.json: each rule with its figure and limit.
        report: The report with the verdict on top.
        settings: JSON of the settings that this step reads (see config/README.md).
        run_id: Names the run's folder in the store; empty records nothing there.

    Returns:
        Whether the policy is to be published. Unnamed, because kfp.local resolves no other
        output in a condition.
    """
    from pathlib import Path

    from dpo.evaluate.gate import run_gate
    from dpo.publish.runs import record_verdict
    from dpo.storage.progress import message
    from dpo.storage.step import copy_report, step

    with step("gate", settings, inputs={"evaluation": evaluation}) as run:
        decision = run_gate(
            run.config, Path(verdict.path), evaluation=Path(evaluation.path), code=run.code
        )
        copy_report(Path(verdict.path, "report.html"), Path(report.path))
        if not run_id:
            message("gate", "no run_id is given: the store keeps no record of the verdict")
        else:
            record_verdict(
                run.config.publish,
                run_id,
                evaluation=Path(evaluation.path),
                verdict=Path(verdict.path),
            )
    return decision.approved
