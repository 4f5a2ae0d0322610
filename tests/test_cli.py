"""The command line as a person uses it, in processes of its own."""

import json
import subprocess
import sys

import pytest

from dpo.cli import COMMANDS


def dpo(*arguments, cwd=None, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "dpo", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_with_an_example(name, capsys):
    from dpo.cli import main

    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[name].example.split()[1] in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys, dpo.cli\n"
        "try:\n    dpo.cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'hydra', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "did you mean train"]),
        (["train", "--fast"], ["--fast"]),
        (["train", "loss.bta=1"], ["loss.bta", "beta"]),
        (["ingest"], ["output="]),
        (["ingest", "verdict=x", "output=y"], ["verdict="]),
        (["config", "model=nope"], ["nope", "tiny"]),
        (["verify"], ["one URL"]),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(arguments, words):
    done = dpo(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_config_tells_where_each_value_came_from():
    done = dpo("config", "model=pythia28", "lr=1e-6", "--json")
    found = json.loads(done.stdout)
    assert found["config"]["lr"] == 1e-6
    assert found["origins"]["lr"] == "command line"
    assert found["origins"]["model.name_or_path"] == "model/pythia28.yaml"


def test_a_missing_file_is_named(tmp_path):
    done = dpo("ingest", "model=tiny", f"datasets=[{tmp_path}/none.jsonl]", f"output={tmp_path}/o")
    assert done.returncode == 1
    assert "none.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_stages_one_by_one_from_the_command_line(tmp_path):
    """Each command reads what the one before wrote."""
    out = tmp_path / "out"
    common = ["model=tiny", "max_length=128", "max_prompt_length=64", "n_eval_examples=16"]
    train = [*common, "n_examples=16", "batch_size=8", "lr=1e-4", "warmup_steps=0"]
    data, sft, policy, scored = f"data={out}/data", f"{out}/sft", f"{out}/policy", f"{out}/ref"
    judged, verdict = f"evaluation={out}/eval", f"verdict={out}/verdict"
    commands = [
        ["ingest", *common[:-1], f"output={out}/data"],
        ["train", "loss=sft", *train, data, f"output={sft}"],
        ["reference", *common, "n_examples=16", data, f"base={sft}", f"output={scored}"],
        ["train", "loss=ipo", *train, data, f"base={sft}", f"reference={scored}"],
        ["evaluate", "loss=ipo", *common, data, f"sft={sft}", f"policy={policy}"],
        ["gate", judged, f"output={out}/verdict", "gate.min_reward_accuracy=0"],
        ["publish", f"policy={policy}", judged, verdict, f"publish.store=file://{out}/store"],
        ["verify", f"file://{out}/store/policy"],
        ["pull", f"file://{out}/store/policy", f"output={out}/pulled"],
    ]
    commands[3] += [f"output={policy}"]
    commands[4] += [f"reference={scored}", f"output={out}/eval"]
    commands[4] += ["evaluation.n_samples=1", "evaluation.max_new_tokens=4"]
    commands[6] += [f"output={out}/published"]
    for command in commands:
        done = dpo(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert (out / "pulled/model.safetensors").read_bytes() == (
        out / "policy/model.safetensors"
    ).read_bytes()
    assert "whole" in dpo("verify", f"file://{out}/store/policy").stdout
