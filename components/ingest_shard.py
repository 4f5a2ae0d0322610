"""One of several tasks that share the reading and checking of the preference data."""

from kfp import dsl

from components.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def ingest_shard(
    checked: dsl.Output[dsl.Dataset],
    shard: str,
    settings: str = "{}",
    fingerprint: str = "",
    data_uri: str = "",
):
    """Reads and validates a share of the sources; the task ingest puts all shares together.

    Args:
        checked: Folder with the share's checked rows, the rejected ones, and a manifest.
        shard: Which share, such as 2/8.
        settings: JSON of the settings that ingest reads (see config/README.md).
        fingerprint: JSON with the fingerprints of code and data that the run was planned with.
        data_uri: An earlier output of ingest, which the task ingest takes: nothing is read here.
    """
    from pathlib import Path

    from dpo.data.shards import parse_shard, run_shard
    from dpo.data.sources import data_fingerprint, source_fingerprints
    from dpo.storage.step import step

    with step("ingest", settings, fingerprint) as run:
        if data_uri:
            # an output without a file is taken for lost when it is cached
            Path(checked.path).mkdir(parents=True)
            Path(checked.path, "skipped").touch()
            return
        sources = source_fingerprints(run.config)
        run.expect("data", data_fingerprint(sources))
        share = parse_shard(shard)
        run_shard(run.config, Path(checked.path), share, code=run.code, fingerprints=sources)
