"""Several trainings in one set of processes: starting Python and torch takes longer than they do.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.train.many jobs.json

Each job is the arguments of ``run_train``, as ``dpo.distributed.launch`` writes them.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpo.config.stages import load_stage
from dpo.distributed.launch import only_first_reports_progress
from dpo.train.stage import run_train


def main(file):
    torch.set_num_threads(1)
    only_first_reports_progress(int(os.environ["RANK"]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    for job in json.loads(Path(file).read_text(encoding="utf-8")):
        paths = {name: Path(path) for name, path in job["paths"].items()}
        config = load_stage(job["stage"], job["settings"])
        run_train(config, paths.pop("output"), **paths)
        print("done", job["paths"]["output"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
