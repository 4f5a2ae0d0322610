"""One service for the tests that only ask."""

import pytest

from tests.service.support import served


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(tmp_path_factory.mktemp("service") / "data", max_body_bytes=200_000) as found:
        yield found
