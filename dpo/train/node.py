"""One node of a training over several: what a pod of a TrainJob or PyTorchJob runs.

    python -m dpo.train.node        described by DPO_NODE_JOB (dpo.nodes.request)

Fetches the inputs from the store, trains with the other nodes, and the first node sends the result.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from dpo.config.stages import load_stage
from dpo.errors import ConfigError, DpoError, TrainingStopped
from dpo.nodes import lease
from dpo.nodes.request import Request, given
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.progress import reported
from dpo.storage.remote import fetch_model, fetch_output, send_output
from dpo.train.place import ROOT_VARIABLE

_GRACE_SECONDS = 60
"""A node without a launcher has this long to write a checkpoint."""
_NOBODY_WAITS = 0
"""Exit code of a node without a launcher. Runtimes restart containers that end otherwise: Kubeflow
Trainer's own does six times, each time for the whole time of a lease."""


def main() -> int:
    """Train as the environment says; returns the exit code."""
    try:
        request = given()
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    stopped: list[str] = []
    unheard = f"the step that started this job gave no sign for {request.lease_seconds} s"

    def end() -> None:
        stopped.append(unheard)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(min(_GRACE_SECONDS, request.lease_seconds))
        # still waiting for other nodes, where nothing answers to the signal
        print(f"{request.stage}: {stopped[0]}; this node ended", file=sys.stderr, flush=True)
        os._exit(_NOBODY_WAITS)

    def asked_to_end(*_: object) -> None:
        raise TrainingStopped(
            stopped[0] if stopped else "this node was asked to end",
            where=f"host {socket.gethostname()}",
            fix="run the step again: training goes on from its last checkpoint",
        )

    # torchrun's agent takes the signal over while it runs
    signal.signal(signal.SIGTERM, asked_to_end)
    watch = lease.Watch(request.output, request.lease_seconds, end)
    try:
        with reported(request.stage), tempfile.TemporaryDirectory() as folder:
            train(request, Path(folder))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        # without its launcher a node may fail as well: the store is away, or another node is gone
        if stopped or (code == TrainingStopped.exit_code and watch.abandoned):
            # the process that trained does not know why it was asked to stop
            print(f"{request.stage}: {unheard}; this node ended", file=sys.stderr, flush=True)
            return _NOBODY_WAITS
        return code
    finally:
        watch.end()
    return 0


def train(request: Request, folder: Path) -> None:
    """Fetch, train, send.

    Raises:
        DpoError: as training on one node; the message names this host.
    """
    # torch takes seconds to import: a job that cannot begin says so first
    code = code_fingerprint(request.stage)
    if request.code and request.code != code:
        raise ConfigError(
            f"the image of this node runs other code (fingerprint {code[:12]}) than the step that "
            f"started it ({request.code[:12]})",
            where=f"host {socket.gethostname()}",
            fix="build images and package from one commit; give the step and its nodes one image",
        )
    inputs = {name: folder / name for name, url in request.inputs.items() if url}
    for name, path in inputs.items():
        fetch = fetch_model if name == "base" else fetch_output
        fetch(request.inputs[name], path)
    if request.checkpoints:
        os.environ[ROOT_VARIABLE] = request.checkpoints
    from dpo.train.stage import run_train

    output = folder / "output"
    run_train(
        load_stage(request.stage, request.settings),
        output,
        pairs=inputs["pairs"],
        base=inputs.get("base"),
        reference=inputs.get("reference"),
        code=code,
    )
    if node_rank() == 0:
        send_output(output, request.output)


def node_rank() -> int:
    """Which of the nodes this is."""
    return int(os.environ.get("PET_NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX") or 0)


if __name__ == "__main__":
    sys.exit(main())
