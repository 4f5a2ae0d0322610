"""Proxies of the environment: which address goes through which, and a store behind one."""

import pytest

from dpo.errors import ConfigError, StoreUnavailable
from dpo.storage.proxies import proxy_for
from dpo.storage.store import open_store
from tests.support.programs import free_port
from tests.support.proxy import proxy_to

_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "variables", "address"),
    [
        ("https://store.internal", {"HTTPS_PROXY": "http://gate:3128"}, "http://gate:3128"),
        ("https://store.internal", {"https_proxy": "gate:3128"}, "http://gate:3128"),
        ("http://store.internal", {"HTTPS_PROXY": "http://gate:3128"}, None),
        ("http://store.internal:9000", {"ALL_PROXY": "http://gate:3128/"}, "http://gate:3128"),
        ("https://store.internal", {}, None),
        ("http://127.0.0.1:9000", {"HTTP_PROXY": "http://gate:3128"}, None),
    ],
)
def test_which_proxy(url, variables, address, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(url)
    assert (found and found.address) == address


@pytest.mark.parametrize("no_proxy", ["store.internal", ".internal", "other, store.internal", "*"])
def test_what_no_proxy_names_is_reached_directly(no_proxy, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://gate:3128")
    assert proxy_for("https://store.internal:9000")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for("https://store.internal:9000") is None


@pytest.mark.parametrize("no_proxy", ["10.0.0.0/8", "other, 10.1.0.0/16", "10.1.2.3", "fd00::/8"])
def test_networks_of_no_proxy_are_reached_directly(no_proxy, monkeypatch):
    """As requests and curl read them; clusters name their pods and services so."""
    url = "https://[fd00::7]:9000" if ":" in no_proxy else "https://10.1.2.3:9000"
    monkeypatch.setenv("HTTPS_PROXY", "http://gate:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for(url) is None
    assert proxy_for("https://11.1.2.3:9000")
    assert proxy_for("https://[fe00::7]:9000")


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("ALL_PROXY", "socks5://gate:1080", "a proxy with socks5:// is not supported"),
        ("HTTPS_PROXY", "http://me:secret@gate:port", "this is no address of a proxy"),
        ("https_proxy", "http://me:sec/ret@gate:3128", "this is no address of a proxy"),
        ("HTTPS_PROXY", "http://", "this is no address of a proxy"),
    ],
)
def test_what_is_no_proxy_is_refused_without_its_password(variable, value, found, monkeypatch):
    """It ended in urllib3's traceback."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.internal")
    with pytest.raises(ConfigError) as caught:
        open_store("s3://bucket/folder")
    assert caught.value.found == found
    assert caught.value.where == f"{variable.upper()} in the environment"
    assert "add store.internal to NO_PROXY" in caught.value.fix
    assert "sec" not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "store.internal")
    open_store("s3://bucket/folder")


def test_credentials_of_a_proxy_are_no_part_of_its_address(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss@gate:3128")
    found = proxy_for("https://store.internal")
    assert found.address == "http://gate:3128"
    # base64 of me:p@ss
    assert found.headers == {"proxy-authorization": "Basic bWU6cEBzcw=="}


@pytest.mark.minio
def test_a_store_that_only_the_proxy_knows(minio_server, bucket_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid:9000")
    with proxy_to(minio_server.port) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        store = open_store(bucket_url)
        store.check(create=True)
        store.write("a.json", b"{}")
        assert store.read("a.json") == b"{}"
        assert proxy.sent > 0


@pytest.mark.minio
def test_a_proxy_that_does_not_answer_is_named(bucket_url, monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid:9000")
    monkeypatch.setenv("HTTP_PROXY", address.replace("//", "//me:secret@"))
    store = open_store(bucket_url)
    store.retry_seconds = 0
    with pytest.raises(StoreUnavailable) as caught:
        store.read("a.json")
    assert f"through the proxy {address}" in caught.value.found
    assert "NO_PROXY" in caught.value.fix
    assert "secret" not in str(caught.value)
