"""What ends the steps of a local run: its signals, and an engine that goes away meanwhile."""

import os
from types import SimpleNamespace

import pytest
from docker.errors import APIError

from dpo.errors import RequestError
from pipelines import containers, package
from pipelines.display import RunView
from pipelines.local import _failure
from pipelines.local_worker import _Steps
from pipelines.request import local_store, parameters

PARAMETERS = package.defaults(package.load_package())
USER = "1000:1000"


def test_it_changes_nothing_of_how_the_run_is_said_to_have_ended(monkeypatch, capsys):
    def gone():
        raise RequestError("no container engine answers")

    monkeypatch.setattr(containers, "connect", gone)
    containers.stop_containers("20260101-000000-000000")
    assert "containers of this run may go on" in capsys.readouterr().err


def test_an_engine_that_goes_away_is_named(monkeypatch):
    def gone():
        raise RequestError("no container engine answers", where="unix:///nowhere/docker.sock")

    monkeypatch.setattr(containers, "connect", gone)
    assert containers.engine_gone().splitlines() == [
        "the container engine has gone",
        "  where: unix:///nowhere/docker.sock",
        "  fix:   start it, then run the same command again: finished steps are kept",
    ]
    monkeypatch.setattr(containers, "connect", lambda: SimpleNamespace(close=lambda: None))
    assert containers.engine_gone() == ""


def test_the_containers_are_told_to_end_though_one_has_ended_meanwhile(monkeypatch):
    told = []

    def ended(_):
        raise APIError("container is not running")

    found = [SimpleNamespace(kill=ended), SimpleNamespace(kill=told.append)]
    engine = SimpleNamespace(list=lambda **_: found)
    client = SimpleNamespace(containers=engine, close=lambda: None)
    monkeypatch.setattr(containers, "connect", lambda: client)
    containers.stop_containers("20260101-000000-000000", "SIGTERM")
    assert told == ["SIGTERM"]


@pytest.mark.parametrize(
    ("said", "user"),
    [
        (["name=seccomp,profile=default", "name=rootless"], "0:0"),
        (["name=seccomp,profile=default"], f"{os.getuid()}:{os.getgid()}"),
        (None, f"{os.getuid()}:{os.getgid()}"),
    ],
)
def test_what_the_steps_write_is_the_users_also_where_the_engine_is(monkeypatch, said, user):
    """An engine without root maps the user's own id to somebody else: nothing could be written."""
    client = SimpleNamespace(info=lambda: {"SecurityOptions": said}, close=lambda: None)
    monkeypatch.setattr(containers, "connect", lambda: client)
    assert containers.own_user() == user


def test_what_the_steps_write_to_is_made_by_who_starts_them(tmp_path, monkeypatch):
    """The engine made it as root: each first run of another user failed."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    runs = tmp_path / "runs"
    containers.container_settings("run", runs, tmp_path / "e", PARAMETERS, USER)
    assert (runs / "artifacts").is_dir()
    monkeypatch.setattr(os, "access", lambda place, _: place != runs / "artifacts")
    with pytest.raises(RequestError, match="another user made it") as caught:
        containers.container_settings("run", runs, tmp_path / "e", PARAMETERS, USER)
    assert caught.value.where == str(runs / "artifacts")


def test_containers_of_a_run_that_was_killed_are_ended_before_the_next(
    tmp_path, monkeypatch, capsys
):
    """They are no children of it, and would go on training beside the new run."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    asked, done = {}, []

    def ended(_):
        raise APIError("container is not running")

    def one(name, kill):
        return SimpleNamespace(
            name=name,
            kill=kill,
            wait=lambda timeout: done.append((name, "waited for", timeout)),
            remove=lambda force: done.append((name, "removed", force)),
        )

    found = [one("old", ended), one("busy", lambda how: done.append(("busy", how)))]
    engine = SimpleNamespace(list=lambda **given: asked.update(given) or found)
    client = SimpleNamespace(containers=engine, close=lambda: None)
    monkeypatch.setattr(containers, "connect", lambda: client)
    (tmp_path / "link").symlink_to(tmp_path)
    containers.end_left(tmp_path / "link" / "runs")
    settings = containers.container_settings(
        "run", tmp_path / "runs", tmp_path / "e", PARAMETERS, USER
    )
    label = f"{containers.FOLDER_LABEL}={settings['labels'][containers.FOLDER_LABEL]}"
    assert asked == {"all": True, "filters": {"label": label}, "ignore_removed": True}
    assert done == [
        ("old", "removed", True),
        ("busy", "SIGTERM"),
        ("busy", "waited for", 40),
        ("busy", "removed", True),
    ]
    assert "busy, which an earlier run left behind" in capsys.readouterr().err


def test_training_in_containers_keeps_its_checkpoints_in_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DPO_CHECKPOINTS", raising=False)
    runs = tmp_path / "runs"
    values = {**PARAMETERS, "publish_store": "s3://models"}
    found = containers.container_settings("run", runs, runs / "events", values, USER)
    assert found["environment"]["DPO_CHECKPOINTS"] == str(runs / "checkpoints")


def test_a_store_on_this_machine_is_mounted_wherever_it_is(tmp_path, monkeypatch):
    """Else the model is published into its container, and gone with it."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    named, real = tmp_path / "runs", tmp_path / "real runs, ü"
    real.mkdir()
    named.symlink_to(real)

    def mounted(store):
        values = {**PARAMETERS, "publish_store": store}
        found = containers.container_settings("run", named, named / "events", values, USER)
        return [mount["Target"] for mount in found["mounts"] if not mount["ReadOnly"]]

    # the store of a local run that names none; the link is followed in its name
    assert str(real / "published") in mounted(local_store(named))
    assert (real / "published").is_dir()
    assert str(tmp_path / "a b") in mounted((tmp_path / "a b").as_uri())
    assert len(mounted("s3://models")) == 2


@pytest.mark.parametrize(
    ("code", "told", "advice"),
    [
        (137, "step sft was killed (exit code 137), mostly for want of memory", "goes on from its"),
        (-9, "step sft was killed (exit code -9), mostly for want of memory", "goes on from its"),
        (139, "step sft ended with exit code 139 and no message", ""),
    ],
)
def test_a_step_that_could_say_nothing_is_told_by_its_exit_code(
    code, told, advice, tmp_path, capsys
):
    assert _Steps().watched(lambda: code)() == code
    steps = f"loading the model\n    {capsys.readouterr().out}"
    (tmp_path / "log.txt").write_text(f"{steps}Executing task finish\nTask finish: SUCCESS\n")
    view = RunView.of(("sft",))
    view.steps["sft"].state = "failed"
    message, exit_code = _failure(tmp_path, view)
    assert exit_code == 1
    assert message.startswith(told)
    assert advice in message
    assert "  | loading the model\n" in message
    assert "finish" not in message, "what came after it tells nothing of it"


@pytest.mark.parametrize(
    ("setting", "mounted"),
    [
        ("datasets=[pairs.jsonl]", {"here/pairs.jsonl"}),
        ("datasets=[pairs.jsonl,more/*.csv]", {"here/pairs.jsonl", "here/more"}),
        ("datasets=[../here/pairs.jsonl]", {"here/pairs.jsonl"}),
        ("datasets=[.]", {"here"}),
        ("model=./", {"here"}),
        ("model=../round", {"round"}),
        ("datasets=[file://{home}/here/pairs.jsonl]", {"here/pairs.jsonl"}),
        ("sft.chat_template=mine.jinja", {"here/mine.jinja"}),
        # the weights of a hub's cache are links into another folder of it
        ("model={home}/hub/snapshots/ab", {"hub/snapshots/ab", "hub/blobs"}),
        ("sft_model_uri=file://{home}/hub/snapshots/ab", {"hub/snapshots/ab", "hub/blobs"}),
        ("datasets=[hh]", set()),
        ("datasets=[s3://bucket/pairs.jsonl]", set()),
    ],
)
def test_what_a_run_reads_here_is_seen_in_its_containers(setting, mounted, tmp_path, monkeypatch):
    for name in ("here/pairs.jsonl", "here/more/a.csv", "here/mine.jinja", "hub/blobs/12"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    model = tmp_path / "hub/snapshots/ab"
    model.mkdir(parents=True)
    (model / "config.json").symlink_to("../../blobs/12")
    (tmp_path / "round").mkdir()
    (tmp_path / "round/link").symlink_to("link")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    runs = tmp_path / "runs"
    values = parameters(PARAMETERS, assignments=[setting.format(home=tmp_path)], store="s3://m")
    found = containers.container_settings("run", runs, runs / "events", values, USER)
    assert found["working_dir"] == str(tmp_path / "here"), "relative paths are of this folder"
    read = {(m["Source"], m["Target"]) for m in found["mounts"] if m["ReadOnly"]}
    assert read == {(str(tmp_path / name), str(tmp_path / name)) for name in mounted}


@pytest.mark.parametrize(
    ("named", "mounted"),
    [
        ("~/pairs.jsonl", {"pairs.jsonl"}),
        ("~/a [1]/b.jsonl", {"a [1]/b.jsonl"}),
        ("~/more/*.jsonl", {"more"}),
        # not the folder itself: it would lie over /tmp, which steps write to
        ("~/*.jsonl", {"pairs.jsonl"}),
    ],
)
def test_the_home_folder_of_a_container_is_another_one(named, mounted, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("pairs.jsonl", "a [1]/b.jsonl", "more/c.jsonl"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    values = parameters(PARAMETERS, assignments=[f"datasets=['{named}']"], store="s3://m")
    found = containers.container_settings(
        "run", tmp_path / "runs", tmp_path / "events", values, USER
    )
    # images/Dockerfile: HOME=/tmp
    inside = {
        (mount["Source"], mount["Target"])
        for mount in found["mounts"]
        if mount["ReadOnly"] and mount["Target"] != mount["Source"]
    }
    assert inside == {(str(home / name), f"/tmp/{name}") for name in mounted}


def test_a_run_told_to_end_finishes_its_step_and_begins_no_other():
    steps = _Steps()
    assert [steps.watched(lambda code=code: code)() for code in (0, 7)] == [0, 7]

    def step():
        steps.tell()
        return 0

    # not 0: kfp begins nothing after a step that failed
    assert steps.watched(step)() == 1
    with pytest.raises(SystemExit):
        # no step, which would have had the signal, too
        steps.tell()
