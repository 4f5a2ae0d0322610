"""Steps of a local run in containers: what they see of this machine, and how they end.

Paths are mounted where they are here, so settings mean the same inside and outside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dpo.config.places import cache_dir
from dpo.errors import RequestError
from dpo.storage import progress
from dpo.storage.processes import END_WITH
from pipelines.deployment import CHECKPOINTS_VARIABLE
from pipelines.shared_places import inputs, local_place

RUN_LABEL = "dpo.run"
FOLDER_LABEL = "dpo.runs"
_LEFT_SECONDS = 40
"""For a training step that is told to end to write its checkpoint."""
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")
_PASSED_ON = (
    *("AWS_", "MINIO_", "S3_", "HF_", "OMP_NUM_THREADS", "DPO_"),
    *_PROXIES,
    *map(str.lower, _PROXIES),
)
_NOT_PASSED_ON = {END_WITH, "DPO_RUNS_DIR", "HF_HOME"}
_SHARED_MEMORY = "1g"
_HOME_INSIDE = Path("/tmp")  # nosec B108
"""HOME of the images, which ``~`` means there."""


def container_settings(
    run_id: str, runs: Path, events: Path, parameters: Mapping[str, Any], user: str
) -> dict[str, Any]:
    """Arguments of ``kfp.local.DockerRunner`` for one run.

    Args:
        run_id: Labels the containers, so that they can be ended with the run.
        runs: Folder of local runs; steps write there.
        events: File that steps append their progress to.
        parameters: The run's parameters; files and folders they name become readable.
        user: As whom the steps run, from ``own_user``.

    Raises:
        RequestError: another user's folder is where the steps write.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    _make_own(runs / "artifacts")
    writable = {path: path for path in (runs, cache, *_file_store(parameters, runs))}
    readable = {
        inside: here for inside, here in _named_places(parameters) if inside not in writable
    }
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_ON) and name not in _NOT_PASSED_ON
    }
    return {
        "environment": {
            **environment,
            "DPO_CACHE_DIR": str(cache),
            CHECKPOINTS_VARIABLE: environment.get(CHECKPOINTS_VARIABLE)
            or str(runs / "checkpoints"),
            progress.FILE_VARIABLE: str(events),
            # no file of the folder that is worked in is taken for a module
            "PYTHONSAFEPATH": "1",
        },
        # stores on this machine are reached as from outside
        "network": "host",
        "user": user,
        "shm_size": _SHARED_MEMORY,
        "labels": {RUN_LABEL: run_id, FOLDER_LABEL: str(runs.resolve())},
        "mounts": [
            *(_mount(path, path, read_only=False) for path in writable),
            *(_mount(here, inside, read_only=True) for inside, here in sorted(readable.items())),
        ],
        # relative paths mean this folder there, too; of it nothing is there but what is mounted
        "working_dir": str(Path.cwd()),
    }


def own_user() -> str:
    """Ids in a container with which what it writes belongs to whoever started it.

    Raises:
        RequestError: no engine answers.
    """
    client = connect()
    try:
        options = client.info().get("SecurityOptions") or []
    finally:
        client.close()
    if any("name=rootless" in option for option in options):
        # root in there is the user outside, and the user's own id somebody else
        return "0:0"
    return f"{os.getuid()}:{os.getgid()}"


def _make_own(folder: Path) -> None:
    """kfp mounts it, and an engine makes a missing folder as root: the steps could not write there.

    Raises:
        RequestError: an engine has made it so already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise RequestError(
            "the steps cannot write to the folder of their outputs: another user made it",
            where=str(folder),
            fix="remove it, or choose another folder with --runs-dir",
        )


def _mount(here: Path, inside: Path, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(here), "Target": str(inside), "ReadOnly": read_only}


def _named_places(parameters: Mapping[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Where a step looks for what the parameters name, and where that is on this machine."""
    for _, place in inputs(parameters):
        if (named := local_place(place)) is None:
            continue
        try:
            here = _without_pattern(Path(os.path.normpath(Path.cwd() / named.expanduser())))
            if not here.exists():
                continue
        except (OSError, RuntimeError, ValueError):
            # ~ of nobody, or a text that can be no file's name: the step says so
            continue
        yield here, here
        if named.parts[:1] == ("~",):
            yield from _in_home(here, named.parts[1:])
        for linked in _linked(here):
            yield linked, linked


def _in_home(here: Path, names: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """What lies in the home folder, as ``~`` names it in a container."""
    home = Path(os.path.normpath(Path.home()))
    if here != home:
        yield _HOME_INSIDE / here.relative_to(home), here
    elif names:
        # what a pattern finds, one by one: steps write to the folder that is home there
        for found in home.glob(str(Path(*names))):
            yield _HOME_INSIDE / found.relative_to(home), found


def _without_pattern(path: Path) -> Path:
    """The folder in which a glob looks; other paths as they are."""
    if path.exists():
        return path
    for folder in reversed(path.parents):
        if has_magic(str(path.relative_to(folder).parts[0])):
            return folder
    return path


def _linked(folder: Path) -> set[Path]:
    """Folders that hold what the links of a folder lead to, as in the cache of a hub's models."""
    found = set()
    with suppress(OSError):
        # a folder that cannot be read is the step's to tell
        for path in folder.iterdir() if folder.is_dir() else ():
            # nor does a link in a circle lead anywhere
            with suppress(RuntimeError, OSError):
                found.add(path.resolve().parent if path.is_symlink() else folder)
    return {path for path in found if path.is_dir() and not path.is_relative_to(folder.resolve())}


def _file_store(parameters: Mapping[str, Any], runs: Path) -> Iterable[Path]:
    """The folder of a store on this machine, where it is not in ``runs`` as that is named.

    What is written to a folder that is not mounted is gone with its container.
    """
    parts = urlsplit(str(parameters["publish_store"]))
    if parts.scheme != "file":
        return
    folder = Path(unquote(parts.path))
    if not folder.is_relative_to(runs):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def connect() -> Any:
    """A client of the container engine.

    Raises:
        RequestError: none answers.
    """
    import docker

    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException:
        raise RequestError(
            "no container engine answers",
            where=os.environ.get("DOCKER_HOST", "the default socket of Docker"),
            fix="start Docker, or point DOCKER_HOST at its socket; without one, use --local",
        ) from None
    return client


def engine_gone() -> str:
    """What to say of a run whose engine has gone meanwhile; empty where it answers."""
    try:
        connect().close()
    except RequestError as error:
        fix = "start it, then run the same command again: finished steps are kept"
        return str(RequestError("the container engine has gone", where=error.where, fix=fix))
    return ""


def check_images(documents: list[dict[str, Any]]) -> None:
    """Find out before the run that an image is missing.

    Raises:
        RequestError: an image of the package is not on this machine, or no engine answers.
    """
    import docker

    client = connect()
    executors = documents[0]["deploymentSpec"]["executors"]
    try:
        for image in sorted({item["container"]["image"] for item in executors.values()}):
            try:
                client.images.get(image)
            except docker.errors.ImageNotFound:
                raise RequestError(
                    f"the image {image} is not on this machine",
                    fix="run `make images`, or pull it",
                ) from None
    finally:
        client.close()


def stop_containers(run_id: str, how: str = "SIGKILL") -> None:
    """End the containers of a run: they are no children of ours and would go on.

    Where the engine has gone, a message says so: how the run ended is told by others.

    Args:
        run_id: Their label.
        how: The signal; with SIGTERM a training step writes a checkpoint first.
    """
    from docker.errors import APIError

    try:
        client = connect()
    except RequestError as error:
        print(f"{error.found}: containers of this run may go on", file=sys.stderr, flush=True)
        return
    try:
        ours = {"label": f"{RUN_LABEL}={run_id}"}
        # each may end meanwhile
        for container in client.containers.list(filters=ours, ignore_removed=True):
            with suppress(APIError):
                container.kill(how)
    finally:
        client.close()


def end_left(runs: Path) -> None:
    """End the containers of an earlier run of this folder: one that was killed could not end them.

    They would train on beside the new run, and write to the same checkpoints. For whoever holds
    the folder's lock: no run of it is under way.

    Args:
        runs: Folder of local runs.
    """
    from docker.errors import APIError

    client = connect()
    try:
        # by one name, whichever link led to it: its lock is one as well
        ours = {"label": f"{FOLDER_LABEL}={runs.resolve()}"}
        # those that have ended meanwhile too: nobody has removed them
        left = client.containers.list(all=True, filters=ours, ignore_removed=True)
        for container in left:
            print(
                f"ending the step's container {container.name}, which an earlier run left behind: "
                "a training step writes a checkpoint first",
                file=sys.stderr,
                flush=True,
            )
            # of the time that is over as well
            with suppress(APIError, OSError):
                container.kill("SIGTERM")
                container.wait(timeout=_LEFT_SECONDS)
            with suppress(APIError):
                container.remove(force=True)
    finally:
        client.close()


def run_container(
    client: Any, image: str, command: list[str], volumes: Mapping[str, Any], **settings: Any
) -> int:
    """Run one container to its end, print its log and return its exit code.

    Takes the place of kfp's own function, which asks for the exit code of a container that may be
    removed already and then reports success (kubeflow/pipelines#13332).
    """
    container = client.containers.run(
        image=image, command=command, volumes=dict(volumes), detach=True, **settings
    )
    try:
        for line in container.logs(stream=True):
            print(line.decode(errors="replace"), end="", flush=True)
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)
