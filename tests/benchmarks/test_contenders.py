"""The benchmarks run as they are called without further words."""

from tests.benchmarks.contenders import run_ours
from tests.benchmarks.extras import run_rerun
from tests.benchmarks.workload import Case


def test_tokens_that_are_left_out_are_those_of_the_device():
    case = Case("gpt_neox_17m", "float32", steps=1, warmup=0, batch=2)
    found = run_ours(case)
    assert found["settings"]["micro_batch_tokens"] == 2048
    assert len(found["losses"]) == 1
    assert run_rerun(case)["reference"] > 0
