"""One of two processes: torchrun ... handed_over.py FOLDER, a folder of models' folders.

The first process reads each model; the other one, which has no values, gets them and compares with
the files. It writes what it found beside them.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpo.distributed.weights import outline, take_from_first
from dpo.modeling.load import load_model

IDS = torch.arange(1, 20)[None]


def ties(model):
    weights = [weight.data_ptr() for _, weight in model.named_parameters(remove_duplicate=False)]
    return len(weights) - len(set(weights))


def compared(folder):
    first = dist.get_rank() == 0
    model = load_model(folder, torch.float32, weights="cpu" if first else "none")
    empty = any(weight.is_meta for weight in model.parameters())
    shape = outline(model)
    take_from_first(model, "cpu")
    read = load_model(folder, torch.float32)
    with torch.no_grad():
        equal = torch.equal(model(input_ids=IDS).logits, read(input_ids=IDS).logits)
    return {
        "empty": empty,
        "same outline": shape == outline(read),
        "equal": equal,
        "ties": ties(model),
        "expected ties": ties(read),
    }


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    found = {folder.name: compared(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    if dist.get_rank() == 1:
        (root / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
