"""``dpo plan``: text, JSON, exit codes, and where lengths come from."""

import json
import subprocess
import sys

import pytest

from dpo.cli import main
from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.stage import run_ingest

GIVEN = ["prompt_tokens=130", "chosen_tokens=80", "rejected_tokens=80", "simulate=false"]
FOUR = ["model=pythia28", "gpus=4"]
SPLIT = "trainer=TensorParallelTrainer"


def plan(capsys, *words):
    code = main(["plan", "--output", "json", *GIVEN, *words])
    return code, json.loads(capsys.readouterr().out)


def test_json_of_the_paper_s_model(capsys):
    code, found = plan(
        capsys, "model=pythia28", "trainer=FSDPTrainer", "gpus=4", "gpu_memory_gib=80", "pairs=1000"
    )
    assert code == 0
    assert found["fits"] is True
    assert found["parameters"] == 2_775_208_960
    assert found["tokens_a_pair"] == 290
    assert found["tflop_a_pair"] == pytest.approx(4.58, abs=0.01)
    parts = found["memory_gib"]
    assert parts["total"] == pytest.approx(
        sum(v for k, v in parts.items() if k != "total"), rel=1e-3
    )
    # 1,000 pairs x 4.58 TFLOP / (4 x 312 TFLOP/s x 25 %)
    assert found["training_seconds"] == pytest.approx(1000 * 4.58 / 312, rel=0.01)
    assert found["reference_seconds"] < found["training_seconds"] / 2


def test_what_does_not_fit_ends_with_2(capsys):
    code = main(["plan", *GIVEN, "model=llama7b", "gpus=1", "gpu_memory_gib=24"])
    shown = capsys.readouterr().out
    assert code == 2
    assert "DOES NOT FIT" in shown
    assert "trainer=FSDPTrainer model.fsdp_policy_mp=bfloat16 gpus=8 batch_size=8: " in shown


def test_lengths_of_ingested_pairs(tmp_path, capsys):
    """Two lengths by hand: the bytes of the tiny model's tokenizer are counted by itself."""
    rows = [
        {"prompt": f"\n\nHuman: {n}\n\nAssistant:", "chosen": " yes", "rejected": " no no no"}
        for n in range(20)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    settings = compose(["model=tiny", f"datasets=[{source}]"]).config
    run_ingest(restrict(settings, "ingest"), tmp_path / "data")
    words = ["plan", "--output", "json", "simulate=false", "model=tiny", "gpus=0"]
    assert main([*words, f"data={tmp_path / 'data'}"]) == 0
    from_data = json.loads(capsys.readouterr().out)
    assert main([*words, f"datasets=[{source}]"]) == 0
    from_source = json.loads(capsys.readouterr().out)
    assert from_data["tokens_a_pair"] == from_source["tokens_a_pair"]
    assert from_data["pairs"] == from_source["pairs"] <= 20
    assert "the model's tokenizer" in from_data["lengths"]["source"]
    from dpo.config.places import builtin
    from dpo.data.tokenize import load_tokenizer

    count = load_tokenizer(builtin("builtin:tiny"))
    assert from_data["lengths"]["rejected"] == len(count(" no no no")["input_ids"]) + 1


def test_a_source_counts_as_often_as_training_takes_it(tmp_path, capsys):
    """With weight 3 each pair comes three times in an epoch, and is scored once."""
    rows = [{"prompt": f"{n}?", "chosen": f"{n} yes", "rejected": f"{n} no"} for n in range(20)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    words = ["plan", "--output", "json", "simulate=false", "model=tiny", f"datasets=[{source}]"]
    once, thrice = (_json(capsys, [*words, f"sources.pairs.weight={weight}"]) for weight in (1, 3))
    assert thrice["pairs"] == 3 * once["pairs"]
    assert thrice["training_seconds"] == pytest.approx(3 * once["training_seconds"])
    assert thrice["reference_seconds"] == pytest.approx(once["reference_seconds"])
    # as many as are said are other pairs than those
    said = _json(capsys, [*words, "sources.pairs.weight=3", "pairs=1000"])
    assert said["reference_seconds"] == pytest.approx(
        once["reference_seconds"] * 1000 / once["pairs"]
    )


def _json(capsys, words):
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_hub_data_is_assumed(capsys):
    code = main(
        [
            "plan",
            "simulate=false",
            "model=pythia28",
            "datasets=[hh]",
            "gpus=4",
            "trainer=FSDPTrainer",
        ]
    )
    shown = capsys.readouterr().out
    assert code == 0
    assert "assumed: the lengths of HH dialogues" in shown
    assert "160,800 pairs" in shown


def test_a_gpu_is_found_as_people_write_it(capsys):
    plans = []
    for name in ("H100", "h100"):
        words = ["plan", "--output", "json", "simulate=false", "model=pythia28", *GIVEN]
        assert main([*words, f"gpu={name}"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=many"], "gpus=many: expected a number"),
        (["gpu=RTX"], "name one of A10"),
        (["prompt_tokens=5"], "chosen_tokens is missing"),
        ([*GIVEN[1:], "prompt_tokens=nan"], "lengths must be above 0"),
        ([*GIVEN[1:], "prompt_tokens=inf"], "lengths must be above 0"),
        (["data=/no/such/folder"], "/no/such/folder"),
        (["model=pythai28"], "did you mean pythia28"),
        (["pairs=0"], "give 1 or more"),
        (["gpu_memory_gib=-1"], "or leave it out for that of gpu=A100"),
        (["peak_tflops=nan"], "or leave it out for that of gpu=A100"),
        (["gpu_memory_gib=inf"], "gpu_memory_gib=inf is no amount"),
        (["simulate=maybe"], "true or false"),
        (["model.name_or_path=org/none"], "org/none is not known"),
        # what the trainers themselves refuse
        ([*FOUR, "trainer=FSDPTrainer", "trainer.replicas=3"], "does not divide the 4 processes"),
        (
            [*FOUR, "trainer=FSDPTrainer", "batch_size=6"],
            "use a multiple of 4, such as batch_size=8",
        ),
        (["batch_size=6", "gradient_accumulation_steps=4"], "(4), as batch_size=8 is"),
        ([*FOUR, SPLIT, "batch_size=3", "trainer.tensor_parallel=2"], "use a multiple of 2"),
        ([*FOUR, SPLIT, "trainer.tensor_parallel=3"], "use one of 1, 2, 4"),
        (["model=smollm2", SPLIT, "gpus=2"], "9 attention heads"),
        (["model=gpt2-large", SPLIT, "gpus=2"], "not available for gpt2 models"),
        (["lora.enabled=true", "lora.modules=[nope]"], "no linear layer nope in its blocks"),
    ],
)
def test_mistakes(capsys, words, message):
    assert main(["plan", *words]) != 0
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_the_account_needs_no_torch():
    code = (
        "import sys; from dpo.cli import main; "
        f"main(['plan', 'model=pythia28', 'gpus=1', *{GIVEN!r}]); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_no_time_is_named_for_a_cpu_whose_peak_nobody_knows(capsys):
    """It was that of an A100: 24 pairs/s of a model of 2.8 B on a CPU."""
    words = ["plan", *GIVEN, "model=pythia28", "gpus=0", "pairs=1000"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "time               unknown: give peak_tflops=" in text
    assert "pairs a second" not in text
    assert "a GPU" not in text
    assert main([*words, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = ("peak_tflops", "pairs_per_second", "training_seconds", "reference_seconds")
    assert [found[key] for key in times] == [None] * 4
    # 4.58 TFLOP a pair at a quarter of 0.4 TFLOP/s
    assert main([*words, "peak_tflops=0.4", "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training_seconds"] == pytest.approx(1000 * 4.58 / 0.1, rel=0.01)


@pytest.mark.parametrize(
    ("words", "tflops"),
    [
        (["gpu=V100"], 15.7),
        (["gpu=V100", "model.policy_dtype=float16"], 125),
        (["gpu=V100", "model.policy_dtype=bfloat16"], 15.7),
        (["gpu=V100", "model.compute_dtype=bfloat16"], 15.7),
        (["gpu=A100"], 312),
        (["gpu=A100", "model.compute_dtype=float32"], 19.5),
        (["gpu=A100", "model.compute_dtype=float32", "peak_tflops=156"], 156),
    ],
)
def test_the_time_follows_the_type_of_the_products(words, tflops, capsys):
    """NVIDIA's data sheets: V100 and A100 without tensor cores in float32, which torch's default is
    (no TF32), with them in 16 bits; those of a V100 take float16 alone."""
    _, found = plan(capsys, "model=pythia28", "pairs=1000", *words)
    assert found["peak_tflops"] == tflops
    assert found["training_seconds"] == pytest.approx(1000 * 4.58 / (tflops / 4), rel=0.01)
