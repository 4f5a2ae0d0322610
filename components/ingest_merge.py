"""Puts together what the tasks ingest-shard have checked; takes the place of the task ingest."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def ingest(
    shards: dsl.Input[list[dsl.Dataset]],
    pairs: dsl.Output[dsl.Dataset],
    data_report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    data_uri: str = "",
):
    """Finds repeats over all shares and writes what one task would have written, byte for byte.

    Args:
        shards: Outputs of all tasks ingest-shard.
        pairs: Folder of Parquet files with prompt, chosen, rejected, sft_target, dataset, split
            and pair_id, the rejected rows with their reasons, and a manifest.
        data_report: What was accepted and rejected, and why.
        metrics: Counts of rows.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprints of code and data that the run was planned with.
        data_uri: An earlier output of this step to verify and use instead of the shares.
    """
    from pathlib import Path

    from dpo.data.stage import run_ingest
    from dpo.storage.adopt import adopt
    from dpo.storage.step import copy_report, describe, log_metrics, step

    with step("ingest", settings, fingerprint) as run:
        if data_uri:
            manifest = adopt(data_uri, Path(pairs.path), "ingest", expected=run.artifact)
        else:
            folders = [Path(shard.path) for shard in shards]
            manifest = run_ingest(run.config, Path(pairs.path), code=run.code, shards=folders)
        describe(pairs, manifest)
        copy_report(Path(pairs.path, "report.html"), Path(data_report.path))
        log_metrics(metrics, manifest)
