"""The first step: check the run's settings and resolve its sources to fingerprints."""

from typing import NamedTuple

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def fingerprint(
    model: str,
    datasets: list,
    prompt_format: str,
    max_length: int,
    max_prompt_length: int,
    test_fraction: float,
    max_rejected_share: float,
    seed: int,
    sft_n_examples: int,
    sft_n_epochs: int,
    sft_batch_size: int,
    sft_optimizer: str,
    sft_lr: float,
    sft_lr_schedule: str,
    sft_warmup_steps: int,
    sft_overrides: list,
    preference_loss: str,
    preference_beta: float,
    preference_label_smoothing: float,
    preference_n_examples: int,
    preference_n_epochs: int,
    preference_batch_size: int,
    preference_optimizer: str,
    preference_lr: float,
    preference_lr_schedule: str,
    preference_warmup_steps: int,
    preference_overrides: list,
    evaluate_n_pairs: int,
    evaluate_n_samples: int,
    gate_min_reward_accuracy: float,
    gate_force: bool,
    publish_store: str,
    publish_name: str,
    data_uri: str,
    sft_model_uri: str,
    reference_uri: str,
    run_id: str = "",
) -> NamedTuple(
    "Plan",
    [
        ("ingest_settings", str),
        ("ingest_fingerprint", str),
        ("sft_settings", str),
        ("sft_fingerprint", str),
        ("reference_settings", str),
        ("reference_fingerprint", str),
        ("preference_settings", str),
        ("preference_fingerprint", str),
        ("evaluate_settings", str),
        ("evaluate_fingerprint", str),
        ("gate_settings", str),
        ("publish_settings", str),
    ],
):
    """Checks every setting, then resolves data, base model and code to content fingerprints.

    Cheap and never cached. Its outputs are arguments of the other steps: what changed reruns, and
    what did not change is served from the cache. Parameters are those of the pipeline; run_id names
    the run's folder in the store, where its plan is noted.
    """
    parameters = dict(locals())
    from collections import namedtuple

    from dpo.data.plan import check_source
    from dpo.storage.progress import reported

    with reported("fingerprint"):
        parameters.pop("run_id")
        check_source()
        # not before: an image of other code may not have them
        from dpo.data.plan import plan_run
        from dpo.plan.booked import check_booked
        from dpo.publish.runs import record_plan

        check_booked(parameters)
        plan = plan_run(parameters, store_needed=True)
        record_plan(parameters, run_id, plan)
    return namedtuple("Plan", plan)(**plan)
