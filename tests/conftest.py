"""What tests of several packages share: golden values, the tiny model, a real MinIO server."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

# two threads on a machine that is busy with something else run slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell starts what it puts in the background deaf to Ctrl-C, and so would be what tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from dpo.config.places import builtin
from tests.support.minio import MinioServer, running_server
from tests.support.programs import NotHere

_STORE_VARIABLES = [
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT", "MINIO_ENDPOINT", "MINIO_SECURE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_REGION", "AWS_DEFAULT_REGION"),
    *("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"),
]


@pytest.fixture(scope="session", autouse=True)
def own_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The token cache of the tests' own small data does not fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_TOKENS_DIR", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(scope="session", autouse=True)
def callers_by_name_alone() -> Iterator[None]:
    """kfp asks 56 times a compilation who called; with the source of each frame that takes seconds
    where thousands of modules are loaded, as beside other tests."""

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        frame, found = inspect.currentframe(), []
        while frame := frame and frame.f_back:
            code = frame.f_code
            place = (code.co_filename, frame.f_lineno, code.co_name)
            found.append(inspect.FrameInfo(frame, *place, None, None))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", stack)
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Values of the reference implementation; ``DPO_GOLDEN_DIR`` names another copy."""
    return Path(os.environ.get("DPO_GOLDEN_DIR") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of the 2-layer random GPT-NeoX that travels with the package."""
    folder = builtin("builtin:tiny")
    assert folder is not None
    return folder


@pytest.fixture
def no_store_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own stores is in the environment."""
    for name in _STORE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    """A real server, one for all tests; each test takes a bucket of its own."""
    try:
        with running_server(tmp_path_factory.mktemp("minio") / "data") as server:
            yield server
    except NotHere as error:
        pytest.skip(f"{error} (or run: python -m tests.support.minio --ensure)")


@pytest.fixture
def minio_environment(
    minio_server: MinioServer, no_store_variables: None, monkeypatch: pytest.MonkeyPatch
) -> MinioServer:
    """The environment points at the server."""
    for name, value in minio_server.environment().items():
        monkeypatch.setenv(name, value)
    return minio_server


@pytest.fixture
def bucket_url(minio_environment: MinioServer) -> str:
    """URL of a bucket that does not exist yet."""
    return f"s3://test-{uuid4().hex[:12]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first: begun last, one processor would wait for them."""
    long_ones = ("test_run.py", "test_resume.py", "test_parallel.py", "test_runs.py")
    items.sort(key=lambda item: item.path.name not in long_ones)
