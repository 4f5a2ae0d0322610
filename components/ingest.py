"""Preference data from wherever it is, validated, as Parquet pairs."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def ingest(
    pairs: dsl.Output[dsl.Dataset],
    data_report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    settings: str = "{}",
    fingerprint: str = "",
    data_uri: str = "",
    rows: dsl.Input[dsl.Dataset] = None,
):
    """Reads the sources, validates each row, splits by prompt and writes Parquet pairs.

    Args:
        pairs: Folder of Parquet files with prompt, chosen, rejected, sft_target, dataset, split
            and pair_id, the rejected rows with their reasons, and a manifest.
        data_report: What was accepted and rejected, and why.
        metrics: Counts of rows.
        settings: JSON of the settings that this step reads (see config/README.md).
        fingerprint: JSON with the fingerprints of code and data that the run was planned with.
        data_uri: An earlier output of this step to verify and use instead of the sources.
        rows: File or folder of preference data (JSON Lines, CSV, Parquet ...) to read instead of
            the sources that the settings name.
    """
    from pathlib import Path

    from dpo.data.sources import data_fingerprint, source_fingerprints
    from dpo.data.stage import run_ingest
    from dpo.storage.adopt import adopt
    from dpo.storage.step import copy_report, describe, log_metrics, of_rows, step

    with step("ingest", settings, fingerprint, inputs={"rows": rows}) as run:
        if data_uri:
            manifest = adopt(data_uri, Path(pairs.path), "ingest", expected=run.artifact)
        else:
            config = of_rows(run.config, settings, Path(rows.path)) if rows else run.config
            sources = source_fingerprints(config)
            run.expect("data", data_fingerprint(sources))
            manifest = run_ingest(config, Path(pairs.path), code=run.code, fingerprints=sources)
        describe(pairs, manifest)
        copy_report(Path(pairs.path, "report.html"), Path(data_report.path))
        log_metrics(metrics, manifest)
