"""Preference training: DPO, conservative DPO or IPO, from the SFT model."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def preference(
    pairs: dsl.Input[dsl.Dataset],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    overrides: str = "",
    model: dsl.Input[dsl.Model] = None,
    log_probs: dsl.Input[dsl.Dataset] = None,
):
    """Trains the policy to prefer chosen over rejected responses, measured against the reference.

    Args:
        pairs: Output of ingest.
        policy: Hugging Face folder with the settings, figures and fingerprints beside it.
        metrics: Last figures of the training.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprint of the code that the run was planned with.
        overrides: JSON list of settings that a sweep changes, such as ["loss.beta=0.2"].
        model: Where the policy starts: an output of sft or any Hugging Face folder; left out, the
            model that the settings name.
        log_probs: Output of reference, of the same model and pairs; made here where it is left out.
    """
    from dpo.storage.step import describe, log_metrics, step
    from dpo.train.task import train_step

    given = {"pairs": pairs, "model": model, "log_probs": log_probs}
    with step("preference", settings, fingerprint, overrides, inputs=given) as run:
        manifest = train_step(run, policy, pairs=pairs, base=model, reference=log_probs)
        describe(policy, manifest)
        log_metrics(metrics, manifest)
