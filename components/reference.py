"""Log-probabilities of the reference model, once for all losses and betas."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def reference(
    pairs: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    log_probs: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    reference_uri: str = "",
):
    """Scores every pair that the preference stage will see with the SFT model, per token.

    Args:
        pairs: Output of ingest.
        model: Output of sft.
        log_probs: Parquet with the log-probability of each response token, by pair.
        metrics: Counts of pairs and tokens.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
        reference_uri: Earlier log-probabilities, of the same pairs and model, to verify and use
            instead of scoring.
    """
    from pathlib import Path

    from dpo.storage.adopt import adopt
    from dpo.storage.step import log_metrics, step
    from dpo.train.reference import run_reference

    target, inputs = Path(log_probs.path), {"pairs": Path(pairs.path), "model": Path(model.path)}
    with step("reference", settings, fingerprint) as run:
        if reference_uri:
            manifest = adopt(
                reference_uri, target, "reference", expected=run.artifact, inputs=inputs
            )
        else:
            manifest = run_reference(run.config, target, **inputs, code=run.code)
        log_metrics(metrics, manifest)
