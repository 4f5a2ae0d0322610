"""The DAG: fingerprint, ingest, sft, reference, preference, evaluate, gate, publish; then finish.

Defaults are those of the preset ``quick`` (a test compares them with its YAML). Kubeflow shows the
``Args`` text of the docstring beside each field of the form.
"""

from kfp import dsl

from components.fingerprint import fingerprint
from components.finish import finish
from components.gate import gate
from components.publish import publish
from components.reference import reference
from components.sft import sft
from pipelines.sharded import ingest_tasks
from pipelines.steps import PIPELINE
from pipelines.sweep import train_and_judge


@dsl.pipeline(
    name=PIPELINE,
    description="Preference data to a published model: SFT, then DPO, conservative DPO or IPO.",
    display_name="Preference fine-tuning",
)
def preference_pipeline(
    model: str = "smollm2",
    datasets: list = ["hh_sample"],  # noqa: B006  # kfp wants literals and copies them
    prompt_format: str = "raw",
    max_length: int = 256,
    max_prompt_length: int = 128,
    test_fraction: float = 0.2,
    max_rejected_share: float = 0.05,
    seed: int = 0,
    sft_n_examples: int = 64,
    sft_n_epochs: int = 1,
    sft_batch_size: int = 16,
    sft_optimizer: str = "AdamW",
    sft_lr: float = 1e-5,
    sft_lr_schedule: str = "linear",
    sft_warmup_steps: int = 1,
    sft_overrides: list = [],  # noqa: B006
    preference_loss: str = "dpo",
    preference_beta: float = 0.0,
    preference_label_smoothing: float = 0.0,
    preference_n_examples: int = 192,
    preference_n_epochs: int = 1,
    preference_batch_size: int = 16,
    preference_optimizer: str = "AdamW",
    preference_lr: float = 5e-5,
    preference_lr_schedule: str = "linear",
    preference_warmup_steps: int = 2,
    preference_overrides: list = [],  # noqa: B006
    evaluate_n_pairs: int = 100,
    evaluate_n_samples: int = 4,
    gate_min_reward_accuracy: float = 0.4,
    gate_force: bool = False,
    publish_store: str = "",
    publish_name: str = "policy",
    data_uri: str = "",
    sft_model_uri: str = "",
    reference_uri: str = "",
):
    """Turns preference data into a better language model.

    Args:
        model: What to train. A name of config/model (smollm2, tiny, pythia28, llama7b, zephyr and
            others), a hub id such as org/name, or a folder.
        datasets: Where the preference pairs come from. Names of config/dataset (hh_sample, hh, shp,
            se, novalto), files, folders or URLs; several are mixed.
        prompt_format: raw keeps dialogue text as it is, chat applies the model's chat template.
        max_length: Longest prompt with response, in tokens.
        max_prompt_length: What a prompt is cut to when prompt and response exceed max_length, in
            tokens.
        test_fraction: Share of prompts held out of training where the data has no split of its own.
        max_rejected_share: The run stops when a larger share of the rows is unusable.
        seed: Order of the examples and choice of subsets; equal seeds give equal runs.
        sft_n_examples: SFT examples to train on; 0 takes all.
        sft_n_epochs: Passes over them; 0 leaves SFT out, so that preference training starts from
            the model as it is.
        sft_batch_size: Examples in an SFT optimiser step.
        sft_optimizer: RMSprop (as in the DPO paper) or AdamW.
        sft_lr: Learning rate of SFT after warm-up.
        sft_lr_schedule: constant, or linear down to zero.
        sft_warmup_steps: Optimiser steps until sft_lr is reached.
        sft_overrides: Any other setting of SFT as a list of overrides, e.g. ["max_grad_norm=1.0"].
        preference_loss: dpo, ipo, robust, hinge, simpo or orpo; dpo with
            preference_label_smoothing above 0 is conservative DPO.
        preference_beta: How strongly the policy is held to the SFT model; 0 takes the loss's own
            default (0.1; simpo 2).
        preference_label_smoothing: Assumed share of wrongly labelled pairs, below 0.5; for dpo and
            robust.
        preference_n_examples: Pairs to train on; 0 takes all.
        preference_n_epochs: Passes over them.
        preference_batch_size: Pairs in an optimiser step.
        preference_optimizer: RMSprop (as in the DPO paper) or AdamW.
        preference_lr: Learning rate of preference training after warm-up.
        preference_lr_schedule: constant, or linear down to zero.
        preference_warmup_steps: Optimiser steps until preference_lr is reached.
        preference_overrides: Any other setting of preference training and of what follows, e.g.
            ["loss.reference_free=true", "evaluation.max_new_tokens=128"].
        evaluate_n_pairs: Held-out pairs to measure on; 0 takes all.
        evaluate_n_samples: Held-out prompts that both models answer in the report.
        gate_min_reward_accuracy: The policy is published when the lower 95 % bound of its held-out
            reward accuracy exceeds this.
        gate_force: Publish although a rule fails; recorded in the verdict.
        publish_store: Where to publish: s3://bucket/prefix or minio://bucket/prefix;
            file:///folder only where all steps share that folder.
        publish_name: Name of the published model.
        data_uri: Start from these pairs instead of datasets: URL of an earlier run's output of
            ingest (s3://, minio://, file://), verified file by file. Usually left empty.
        sft_model_uri: Start from this model instead of SFT: URL of an earlier checkpoint or of a
            published model (s3://bucket/prefix/policy), verified file by file. Usually left empty.
        reference_uri: Use these log-probabilities instead of scoring: URL of an earlier output of
            reference, of the same pairs and SFT model. Usually left empty.
    """
    end = finish(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, store=publish_store)
    # a cached one would be skipped without a word
    end.set_caching_options(enable_caching=False)
    # no name: drivers look the group up by its key, and older ones know it by its name alone
    with dsl.ExitHandler(end):
        plan = fingerprint(
            model=model,
            datasets=datasets,
            prompt_format=prompt_format,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            test_fraction=test_fraction,
            max_rejected_share=max_rejected_share,
            seed=seed,
            sft_n_examples=sft_n_examples,
            sft_n_epochs=sft_n_epochs,
            sft_batch_size=sft_batch_size,
            sft_optimizer=sft_optimizer,
            sft_lr=sft_lr,
            sft_lr_schedule=sft_lr_schedule,
            sft_warmup_steps=sft_warmup_steps,
            sft_overrides=sft_overrides,
            preference_loss=preference_loss,
            preference_beta=preference_beta,
            preference_label_smoothing=preference_label_smoothing,
            preference_n_examples=preference_n_examples,
            preference_n_epochs=preference_n_epochs,
            preference_batch_size=preference_batch_size,
            preference_optimizer=preference_optimizer,
            preference_lr=preference_lr,
            preference_lr_schedule=preference_lr_schedule,
            preference_warmup_steps=preference_warmup_steps,
            preference_overrides=preference_overrides,
            evaluate_n_pairs=evaluate_n_pairs,
            evaluate_n_samples=evaluate_n_samples,
            gate_min_reward_accuracy=gate_min_reward_accuracy,
            gate_force=gate_force,
            publish_store=publish_store,
            publish_name=publish_name,
            data_uri=data_uri,
            sft_model_uri=sft_model_uri,
            reference_uri=reference_uri,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        )
        plan.set_caching_options(enable_caching=False)
        planned = plan.outputs

        data = ingest_tasks(
            settings=planned["ingest_settings"],
            fingerprint=planned["ingest_fingerprint"],
            data_uri=data_uri,
        )
        start = sft(
            settings=planned["sft_settings"],
            fingerprint=planned["sft_fingerprint"],
            pairs=data.outputs["pairs"],
            model_uri=sft_model_uri,
        )
        scored = reference(
            settings=planned["reference_settings"],
            fingerprint=planned["reference_fingerprint"],
            pairs=data.outputs["pairs"],
            model=start.outputs["checkpoint"],
            reference_uri=reference_uri,
        )
        policy, evaluation = train_and_judge(
            planned,
            pairs=data.outputs["pairs"],
            model=start.outputs["checkpoint"],
            log_probs=scored.outputs["log_probs"],
        )
        decision = gate(
            settings=planned["gate_settings"],
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            evaluation=evaluation,
        )
        decision.set_caching_options(enable_caching=False)
        # a boolean that the gate computed: no text of a user reaches a condition
        with dsl.If(decision.outputs["Output"] == True, name="approved"):  # noqa: E712
            publication = publish(
                settings=planned["publish_settings"],
                run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                policy=policy,
                evaluation=evaluation,
                verdict=decision.outputs["verdict"],
            )
            publication.set_caching_options(enable_caching=False)
