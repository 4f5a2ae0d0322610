"""Supervised fine-tuning on the chosen responses."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def sft(
    pairs: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    model_uri: str = "",
    model: dsl.Input[dsl.Model] = None,
):
    """Trains the base model on the chosen responses; the result is policy and reference at once.

    Args:
        pairs: Output of ingest.
        checkpoint: Hugging Face folder with the settings, figures and fingerprints beside it.
        metrics: Last figures of the training.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprints of code and base model that the run was planned
            with.
        model_uri: An earlier checkpoint or a published model to verify and use instead of
            training.
        model: Where training starts: any Hugging Face folder; left out, the model that the settings
            name.
    """
    from pathlib import Path

    from dpo.storage.adopt import adopt
    from dpo.storage.base_model import model_fingerprint
    from dpo.storage.step import describe, log_metrics, step
    from dpo.train.task import train_step

    with step("sft", settings, fingerprint, inputs={"pairs": pairs, "model": model}) as run:
        if model_uri:
            manifest = adopt(model_uri, Path(checkpoint.path), "sft", expected=run.artifact)
        else:
            if not model:
                run.expect("model", model_fingerprint(run.config.model))
            manifest = train_step(run, checkpoint, pairs=pairs, base=model)
        describe(checkpoint, manifest)
        log_metrics(metrics, manifest)
