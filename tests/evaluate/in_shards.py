"""One process of a reference pass and an evaluation whose models no device can hold.

    torchrun ... -m tests.evaluate.in_shards jobs.json

Each job is what ``dpo.distributed.launch`` tells its processes: settings of a stage, and paths.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpo.config.stages import load_stage
from dpo.evaluate.stage import run_evaluate
from dpo.modeling import sharded
from dpo.train.reference import run_reference

RUN = {"reference": run_reference, "evaluate": run_evaluate}


def main(file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    made = []
    shard = sharded.shard
    sharded.fits = lambda model, device: False
    sharded.shard = lambda *given, **named: made.append(shard(*given, **named)) or made[-1]
    for job in json.loads(Path(file).read_text(encoding="utf-8")):
        paths = {name: Path(path) for name, path in job["paths"].items()}
        RUN[job["stage"]](load_stage(job["stage"], job["settings"]), paths.pop("output"), **paths)
        # the first process writes what the next job reads
        dist.barrier()
    # the reference, and in the evaluation SFT model, policy, SFT model again and published version
    assert len(made) == 5
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
