"""The end of every run, also of one that failed."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def finish(
    status: dsl.PipelineTaskFinalStatus,
    run_id: str = "",
    store: str = "",
):
    """Writes how the run ended into its manifest in the store and tells those who asked to know.

    Never cached. Whom to tell is a setting of the deployment, not a parameter: DPO_NOTIFY_URL, and
    DPO_NOTIFY_SECRET to sign the message with.

    Args:
        status: What Kubeflow says of the steps before.
        run_id: Names the run's folder in the store.
        store: Where the run publishes to.
    """
    from dpo.publish.finish import run_finish
    from dpo.storage.progress import reported

    with reported("finish"):
        run_finish(store, run_id, status.state, status.error_message or "")
