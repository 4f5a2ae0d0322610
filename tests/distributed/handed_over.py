"""One of two processes: torchrun ... handed_over.py FOLDER, a folder of models' folders.

The first process reads each model; the other one, which has no values, gets them, whole or (folders
named ``split-...``) its share of each layer, and compares with the files. It writes what it found
beside them.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dpo.config.models import TrainerConfig
from dpo.distributed import together
from dpo.distributed.weights import outline, take_from_first
from dpo.modeling.load import load_model
from dpo.train.parallel import Layout
from dpo.train.tensor_parallel import parallelize

IDS = torch.arange(1, 20)[None]


def ties(model):
    weights = [weight.data_ptr() for _, weight in model.named_parameters(remove_duplicate=False)]
    return len(weights) - len(set(weights))


def loaded(folder):
    """The model, which only the first process has read, and whether it is empty here."""
    model = load_model(folder, torch.float32, weights="cpu" if dist.get_rank() == 0 else "none")
    return model, all(weight.is_meta for weight in model.parameters())


def compared(folder):
    model, empty = loaded(folder)
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


def split(folder):
    model, empty = loaded(folder)
    mesh = init_device_mesh("cpu", (2,))
    parallelize(model, mesh, device="cpu")
    read = load_model(folder, torch.float32)
    n_bytes = sum(weight.untyped_storage().nbytes() for weight in read.parameters())
    equal, held = True, 0
    with torch.no_grad():
        near = torch.allclose(model(input_ids=IDS).logits, read(input_ids=IDS).logits, atol=1e-5)
    for weight, whole in zip(model.parameters(), read.parameters(), strict=True):
        own, (placement,) = weight.to_local(), weight.placements
        if placement.is_shard():
            whole = whole.chunk(2, placement.dim)[dist.get_rank()]
        equal &= torch.equal(own, whole)
        held += own.untyped_storage().nbytes()
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        "empty": empty,
        "equal": equal and near,
        "share": held / n_bytes,
        "tied": output.weight is embedding.weight,
        "expected tied": read.get_output_embeddings().weight is read.get_input_embeddings().weight,
    }


def seconds_of(group):
    """How long an operation of ``group`` may wait."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def waits():
    """What each group of a mesh of two axes waits for, and a first process that is late."""
    mesh = Layout.of(TrainerConfig(name="FSDPTrainer", replicas=2), "cpu").data
    found = [seconds_of(group) for group in mesh.get_all_groups()]
    together._timeout = timedelta(seconds=1)
    together.waits_as_long(dist.group.WORLD)
    if dist.get_rank() == 0:
        # it writes gigabytes
        time.sleep(2)
    together.barrier()
    return found


def main():
    together.connect("gloo", 120)
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    found = {f.name: (split if f.name.startswith("split") else compared)(f) for f in folders}
    found["waits"] = waits()
    if dist.get_rank() == 1:
        (root / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
