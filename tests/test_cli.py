"""The command line as a person uses it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo import handlers
from dpo.cli import COMMANDS, main


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


def test_a_command_ends_without_looking_for_cycles_in_what_it_imported():
    """After `checkpoint: ...` a training took 2 s of processor time to end, of torch's objects."""
    # what was registered first is called last
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count() > 1000))\n"
        "import dpo.cli\n"
        "dpo.cli.main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, frozen = done.stdout.splitlines()[-1].split()
    assert int(left) < 1000
    assert frozen == "True"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["reference", "evaluate", "tokenize", "export", "fetch"])
def test_a_command_that_is_told_to_end_says_so(name, number, monkeypatch, capsys):
    """SIGTERM is as Ctrl-C: it ended commands other than ingest and train without a word."""

    def work(*_):
        os.kill(os.getpid(), number)
        return 0

    monkeypatch.setitem(handlers.RUNNERS, name, work)
    paths = [f"{path}=x" for path in COMMANDS[name].required]
    assert main([name, *paths]) == 130
    assert capsys.readouterr().err.strip() == "dpo: stopped; nothing half-written was kept"


def test_torchrun_does_not_start_it_several_times(tmp_path):
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*started, "-m", "dpo", "train", "loss=sft", f"output={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "dpo train was started 2 times, by torchrun" in done.stderr
    assert "start it once" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "did you mean train"]),
        (["train", "--fast"], ["--fast"]),
        (["train", "loss.bta=1"], ["loss.bta", "beta"]),
        (["ingest"], ["output="]),
        (["ingest", "verdict=x", "output=y"], ["verdict="]),
        # of a shell's variable that is not set: the folder one is in was replaced
        (["ingest", "datasets=[hh_sample]", "output="], ["output= names no place"]),
        (["config", "model=nope"], ["nope", "tiny", "a folder as ./name"]),
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


def test_what_is_printed_is_json_by_one_option(tmp_path):
    """``--output json``, as submit.py has it; --json and format=json mean the same."""
    store = tmp_path.as_uri()
    for one, other in (
        (["config", "--output", "json"], ["config", "--json"]),
        (["list", store, "--output=json"], ["list", store, "format=json"]),
    ):
        done = dpo(*one)
        assert json.loads(done.stdout) == json.loads(dpo(*other).stdout), done.stderr
    done = dpo("help", "export")
    assert done.stdout == dpo("export", "--help").stdout
    assert "output=  file to write" in done.stdout


def test_a_missing_file_is_named(tmp_path):
    done = dpo("ingest", "model=tiny", f"datasets=[{tmp_path}/none.jsonl]", f"output={tmp_path}/o")
    assert done.returncode == 1
    assert "there is no such file or folder" in done.stderr
    assert "none.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_texts_that_the_terminal_cannot_show_are_printed_as_escapes(encoding, tmp_path):
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs–1.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = dpo("ingest", "--check", "pairs–1.jsonl", cwd=tmp_path, environment=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "pairs\\u20131.jsonl: 1 row, 1 pair" in done.stdout


@pytest.mark.parametrize("there", [True, False])
def test_json_is_json_where_the_terminal_is_not_utf8(there, tmp_path):
    name = "hübsch\U0001f600.jsonl"
    if there:
        pair = {"prompt": "Why?", "chosen": "", "rejected": "No."}
        (tmp_path / name).write_text(json.dumps(pair), encoding="utf-8")
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    words = ("ingest", "--check", name, "--output", "json")
    done = dpo(*words, cwd=tmp_path, environment=environment)
    found = json.loads(done.stdout)
    assert found["readable"] == there
    if there:
        (reason,) = found["reasons"].values()
        assert reason["places"][0]["file"] == name
    else:
        assert name in found["problem"]


@pytest.mark.parametrize("stage", ["ingest", "train"])
def test_a_file_that_cannot_be_written_whole_ends_in_one_message(stage, tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails half way."""
    code = (
        "import resource, sys; from dpo.cli import main; "
        "limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
        "sys.exit(main(sys.argv[2:]))"
    )

    def run(limit, *words):
        command = [sys.executable, "-c", code, str(limit), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ingest = ["ingest", "model=tiny", f"output={tmp_path}/data"]
    if stage == "ingest":
        done = run(100_000, *ingest)
    else:
        assert run(1 << 30, *ingest).returncode == 0
        sizes = ["max_length=64", "max_prompt_length=32", "n_examples=4", "n_eval_examples=4"]
        words = ["train", "model=tiny", "loss=sft", *sizes, f"data={tmp_path}/data"]
        done = run(100_000, *words, f"output={tmp_path}/sft")
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left == (set() if stage == "ingest" else {"data"})


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (["-m", "dpo"], ["plan", "--output", "yaml"], ["'yaml'", "see `dpo plan --help`"]),
        (["-m", "dpo"], ["train", "--config-dri=x"], ["did you mean --config-dir?", "dpo train"]),
        (["-m", "dpo"], ["verify", "--json"], ["--json", "see `dpo verify --help`"]),
        (["pipelines/submit.py"], ["--preset", "huge"], ["'huge'", "full", "--help"]),
        (["pipelines/submit.py"], ["--locl"], ["did you mean --local?"]),
        (["pipelines/submit.py"], ["full"], ["'full' is no option"]),
        (["pipelines/submit.py"], ["explain", "--wait"], ["--wait", "explain --help"]),
        (["pipelines/submit.py"], ["--nodes", "two"], ["--nodes", "'two'"]),
    ],
)
def test_a_mistake_in_an_option_is_one_line(command, arguments, words):
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("asked", [["--output", "json"], ["--outp=json"]])
def test_a_mistake_in_an_option_is_json_for_ci(asked):
    command = [sys.executable, "pipelines/submit.py", *asked, "--preset", "huge"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["exit_code"], told["state"]) == (2, 2, "not started")
    assert "huge" in told["message"]


@pytest.mark.parametrize(
    ("given", "state", "beta", "told"),
    [
        (["--preset", "toy"], "succeeded", 0.1, "make run"),
        (["--preset", "quick"], "succeeded", 0.1, "make run PRESET=full"),
        ([], "succeeded", 0.1, "make run PRESET=full"),
        (
            ["--preset", "full"],
            "succeeded",
            0.1,
            "PROGRAM --local --preset full --set loss.beta=0.2 --dry-run",
        ),
        (
            ["--preset", "quick", "--set", "model=a b", "--runs-dir", "r", "--store", "file:///s"],
            "succeeded",
            0.1,
            "PROGRAM --local --preset full --store file:///s --runs-dir r --set 'model=a b'",
        ),
        (
            ["--preset", "toy", "--set", "seed=1"],
            "refused",
            0.1,
            "PROGRAM --local --preset toy --set seed=1 --set loss.beta=0.2 --dry-run",
        ),
        (
            ["--from", "ID"],
            "succeeded",
            0.1,
            "PROGRAM --local --from ID --set loss.beta=0.2 --dry-run",
        ),
        (
            ["--preset", "full", "--set", "preference_beta=0.2", "--set", "seed=1"],
            "succeeded",
            0.2,
            "PROGRAM --local --preset full --set seed=1 --set loss.beta=0.4 --dry-run",
        ),
        (
            ["--from", "ID"],
            "succeeded",
            0.2,
            "PROGRAM --local --from ID --set loss.beta=0.4 --dry-run",
        ),
        (
            ["--preset", "full", "--set", "loss.beta=0.4"],
            "refused",
            0.4,
            "PROGRAM --local --preset full --set loss.beta=0.2 --dry-run",
        ),
        # of these the same run is more than one line
        (["--preset", "quick", "--sweep", "loss.beta=0.1,0.2"], "succeeded", 0.1, ""),
        (["--preset", "quick", "--ingest-shards", "4"], "succeeded", 0.1, ""),
        (["--preset", "quick", "--rerun", "sft"], "succeeded", 0.1, ""),
        (["--preset", "quick", "--images", "images.json"], "succeeded", 0.1, ""),
        (["--preset", "toy"], "failed", 0.1, ""),
    ],
)
def test_the_next_command_is_the_same_run_and_works_as_written(
    given, state, beta, told, monkeypatch
):
    from pipelines import asked, submit

    monkeypatch.chdir(Path(__file__).parents[1])
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    options = submit.parser().parse_args(["--local", *given])
    expected = told.replace("PROGRAM", f"{shown} pipelines/submit.py")
    assert asked.next_command(options, state, beta) == expected


def test_without_the_packages_of_the_project_the_way_to_them_is_named():
    """``-I -S``: a Python without site-packages."""
    command = [sys.executable, "-I", "-S", "pipelines/submit.py", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "make setup" in done.stderr


def test_all_paths_that_are_missing_are_named_at_once():
    done = dpo("evaluate", "data=x")
    assert done.returncode == 2
    for word in ("sft=", "policy=", "output="):
        assert word in done.stderr.splitlines()[0]
