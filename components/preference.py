"""Preference training: DPO, conservative DPO or IPO, from the SFT model."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def preference(
    pairs: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    log_probs: dsl.Input[dsl.Dataset],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    overrides: str = "",
):
    """Trains the policy to prefer chosen over rejected responses, measured against the reference.

    Args:
        pairs: Output of ingest.
        model: Output of sft: where the policy starts.
        log_probs: Output of reference, of the same model and pairs.
        policy: Hugging Face folder with the settings, figures and fingerprints beside it.
        metrics: Last figures of the training.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
        overrides: JSON list of settings that a sweep changes, such as ["loss.beta=0.2"].
    """
    from dpo.storage.step import log_metrics, step
    from dpo.train.task import train_step

    with step("preference", settings, fingerprint, overrides) as run:
        manifest = train_step(run, policy, pairs=pairs, base=model, reference=log_probs)
        log_metrics(metrics, manifest)
