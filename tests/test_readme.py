"""The commands of README.md and of the guides: single steps are run, the others checked."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

from dpo.config.compose import compose
from pipelines import explain, package, submit
from pipelines.request import parameters

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG_README = (ROOT / "config/README.md").read_text(encoding="utf-8")
GUIDES = {
    name: (ROOT / name / "README.md").read_text(encoding="utf-8")
    for name in ("pipelines", "images", "manifests")
}


def commands(text, program):
    """Command lines of the ``sh`` blocks that begin with ``program``, as lists of words."""
    found, variables = [], {}
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(Template(line).safe_substitute(variables), comments=True)
            if len(words) == 1 and re.fullmatch(r"\w+=.+", words[0]):
                variables.update([words[0].split("=", 1)])
            if words[: len(program)] == program:
                found.append(words)
    return found


def submitted(words):
    """The parameters of a run that ``submit.py`` is asked for, checked as it does."""
    options = submit.parser().parse_args(words)
    defaults = package.defaults(package.load_package())
    return parameters(
        defaults,
        preset_name=options.preset,
        assignments=options.assignments,
        store=options.store,
    )


@pytest.mark.long
def test_the_single_steps_work_one_after_the_other(tmp_path):
    """With the tiny model in place of the real one, everything else as written."""
    steps = commands(README, ["dpo"])
    assert [words[1] for words in steps[:9]] == [
        *("ingest", "train", "reference", "train", "evaluate", "gate", "plan", "export", "config")
    ]
    for words in steps:
        if words[1] in ("verify", "pull"):
            continue
        words = [word.replace("model=smollm2", "model=tiny") for word in words]
        if words[1] == "gate":
            # 64 pairs on a random model: whichever way it goes is not the question here
            words = [re.sub(r"accuracy=.*", "accuracy=0", word) for word in words]
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "out/evaluation/report.html").is_file()
    publish = ["dpo", "publish", "policy=out/policy", "evaluation=out/evaluation"]
    publish += ["verdict=out/verdict", "output=out/published", f"publish.store=file://{tmp_path}/s"]
    for words in (
        publish,
        ["dpo", "verify", f"file://{tmp_path}/s/policy"],
        ["dpo", "pull", f"file://{tmp_path}/s/policy", "output=model"],
    ):
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        tmp_path / "out/policy/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("words", commands(README, ["make"]), ids=" ".join)
def test_make_commands_reach_the_pipeline(words):
    """``make -n`` prints the command line that would run; its settings are checked."""
    # what the make that runs these tests was given is not theirs
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        [words[0], "-n", *words[1:]], cwd=ROOT, env=own, capture_output=True, text=True, check=True
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "submit.py" in line]
    if words[1] != "run":
        assert done.stdout
        return
    (command,) = lines
    start = next(i for i, word in enumerate(command) if word.endswith("submit.py"))
    assert submitted(command[start + 1 :])


def test_the_command_for_ci_is_valid():
    every = commands(README, ["python", "pipelines/submit.py"])
    (words,) = [words for words in every if "--deployment" in words]
    values = submitted(words[2:])
    assert values["preference_beta"] == 0.2
    assert values["publish_store"] == "s3://models/team"


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_the_guides_are_taken(guide):
    """Options by the programs' own parsers, settings as a run checks them, targets by make."""
    lines = [
        [word for word in words if word != "..."]
        for program in (["make"], ["python"])
        for words in commands(GUIDES[guide], program)
    ]
    assert len(lines) > 4
    for words in lines:
        if words[0] == "make":
            subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[1:3] == ["-m", "pipelines.package"]:
            package._parser().parse_args(words[3:])
        elif words[2] == "explain":
            explain.parser().parse_args(words[3:])
        else:
            assert words[1] == "pipelines/submit.py", words
            assert submitted(words[2:])


def test_the_table_of_presets_tells_their_numbers():
    quick = submitted(["--preset", "quick"])
    full = submitted(["--preset", "full"])
    for values in (quick, full):
        lr = f"{values['preference_lr']:.0e}".replace("e-0", "e-")
        assert f"lr {lr}, {values['preference_warmup_steps']} warm-up steps" in README
        assert f"| {values['max_length']} tokens" in README
        assert f"{values['gate_min_reward_accuracy']:.2f} |" in README
    assert f"{quick['preference_n_examples']} pairs, 12 steps" in README
    assert f"{quick['sft_n_examples']} examples, 4 steps" in README


def test_own_models_as_the_guide_says(tmp_path):
    (tmp_path / "model").mkdir()
    (text,) = re.findall(r"echo '(.*?)' > conf/model/mine.yaml", CONFIG_README)
    (tmp_path / "model/mine.yaml").write_text(text)
    assert compose(["model=mine", "loss=sft"], user_dir=tmp_path).config.model.name_or_path


@pytest.mark.parametrize("text", [README, CONFIG_README], ids=["README", "config"])
def test_no_placeholder_was_left(text):
    assert not re.search(r"@[A-Z_]+@", text)
