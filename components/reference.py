"""Log-probabilities of the reference model, once for all losses and betas."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def reference(
    pairs: dsl.Input[dsl.Dataset],
    log_probs: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    reference_uri: str = "",
    model: dsl.Input[dsl.Model] = None,
):
    """Scores every pair that the preference stage will see with the SFT model, per token.

    Args:
        pairs: Output of ingest.
        log_probs: Parquet with the log-probability of each response token, by pair.
        metrics: Counts of pairs and tokens.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
        reference_uri: Earlier log-probabilities, of the same pairs and model, to verify and use
            instead of scoring.
        model: Output of sft or any Hugging Face folder; left out, the model that the settings name.
    """
    from pathlib import Path

    from dpo.storage.adopt import adopt
    from dpo.storage.step import describe, log_metrics, step
    from dpo.train.reference import run_reference

    given = {"pairs": pairs, "model": model}
    target, inputs = Path(log_probs.path), {k: Path(v.path) for k, v in given.items() if v}
    with step("reference", settings, fingerprint, inputs=given) as run:
        if reference_uri:
            manifest = adopt(
                reference_uri, target, "reference", expected=run.artifact, inputs=inputs
            )
        else:
            manifest = run_reference(run.config, target, **inputs, code=run.code)
        describe(log_probs, manifest)
        log_metrics(metrics, manifest)
