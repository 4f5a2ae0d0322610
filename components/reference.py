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
):
    """Scores every pair that the preference stage will see with the SFT model, per token.

    Args:
        pairs: Output of ingest.
        model: Output of sft.
        log_probs: Parquet with the log-probability of each response token, by pair.
        metrics: Counts of pairs and tokens.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
    """
    from pathlib import Path

    from dpo.storage.step import log_metrics, step
    from dpo.train.reference import run_reference

    with step("reference", settings, fingerprint) as run:
        manifest = run_reference(
            run.config,
            Path(log_probs.path),
            pairs=Path(pairs.path),
            model=Path(model.path),
            code=run.code,
        )
        log_metrics(metrics, manifest)
