"""Memory that a training step frees is there for the next one, in the threads of lanes too."""

import os
import subprocess
import sys
from pathlib import Path

from dpo.storage.host_memory import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
_STEPS = """
import resource
import threading

if {early}:
    from dpo.storage.host_memory import prepare
    prepare()
import torch
from dpo.modeling.lanes import side_by_side
from dpo.storage.host_memory import keep_freed_memory

def as_libraries_do():
    # a thread that allocates while another one does gets a heap of its own
    threads = [threading.Thread(target=lambda: [bytes(1000) for _ in range(10**5)]) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

as_libraries_do()
keep_freed_memory()
torch.set_num_threads(2)

def lane(_):
    held = [torch.ones(1 << 24) for _ in range(2)]  # 128 MiB
    del held

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

# the heap grows until it holds what both lanes have at once, whatever their timing
for _ in range(15):
    side_by_side(lane, [0, 1])
before = faults()
for _ in range(3):
    side_by_side(lane, [0, 1])
print(faults() - before)
"""


def faults_of_three_steps(*, early: bool, variables: dict[str, str]) -> int:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", _STEPS.format(early=early)],
        env={**clean, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_process_started_with_the_variables_clears_no_page_twice():
    """Three steps of two lanes take and free 0.75 GiB: 196,608 pages of 4 KiB, or 384 of 2 MiB."""
    assert faults_of_three_steps(early=False, variables=VARIABLES) < 192


def test_a_process_that_prepares_itself_before_torch_is_imported_does_not_either():
    assert faults_of_three_steps(early=True, variables={}) < 192


def test_the_images_start_their_processes_so():
    text = (ROOT / "images/Dockerfile").read_text()
    for name, value in VARIABLES.items():
        assert f"{name}={value}" in text
