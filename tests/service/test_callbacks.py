"""Callbacks: which addresses are refused, and that a check cannot be outrun."""

import socket

import pytest

from dpo.storage.outbound import AddressRefused, addresses_of
from pipelines.service import callbacks
from pipelines.service.callbacks import CallbackFailed, CallbackRefused, check_url, sign
from pipelines.service.settings import Settings
from tests.service.support import TINY, body, served

HOSTS = (
    "hooks.example,localhost,127.0.0.1,10.0.0.1,169.254.169.254,192.168.1.1,::1,::ffff:127.0.0.1,"
    "0.0.0.0,100.64.0.1,fe80::1,fd00::1,224.0.0.1,2130706433,8.8.8.8,a.example:8443"
)


@pytest.fixture(scope="module")
def settings():
    return Settings.from_environment({}, **TINY, callback_hosts=HOSTS, callback_secret="key")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://hooks.example/", "http"),
        ("file:///etc/passwd", "http"),
        ("gopher://hooks.example/", "http"),
        ("hooks.example", "http"),
        ("http://", "http"),
        ("http://other.example/", "allow list"),
        ("http://hooks.example.evil.example/", "allow list"),
        ("http://evil.example#hooks.example", "allow list"),
        ("http://evil.example\\@hooks.example/", "credentials"),
        ("http://hooks.example@evil.example/", "credentials"),
        ("http://user:secret@hooks.example/", "credentials"),
        ("http://a.example/", "allow list"),
        ("http://hooks.example:99999/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://hooks.example/\r\nX: y", "no URL has"),
        ("http://hooks.example/\x1b[2J", "no URL has"),
        ("http://hook\u0455.example/", "no URL has"),
    ],
)
def test_urls_that_are_not_called(settings, url, reason):
    with pytest.raises(CallbackRefused, match=reason):
        check_url(url, settings)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "100.64.0.1", "224.0.0.1"),
        # 127.0.0.1 as one number
        "2130706433",
    ],
)
def test_private_addresses_are_refused_although_listed(settings, host):
    with pytest.raises(CallbackRefused, match="private address"):
        callbacks.call(f"http://{host}/", {"a": 1}, settings)
    parts = check_url(f"http://{host}/", settings)
    with pytest.raises(AddressRefused, match="private address"):
        addresses_of(parts.hostname, 80, "callbackUrl", private=False)


def test_a_public_address_is_called_as_it_was_checked(settings):
    assert check_url("https://8.8.8.8/x", settings).hostname == "8.8.8.8"
    assert addresses_of("8.8.8.8", 443, "callbackUrl", private=False) == ["8.8.8.8"]
    assert check_url("https://a.example:8443/x", settings).port == 8443
    assert check_url("https://HOOKS.example/", settings).hostname == "hooks.example"


def test_a_redirect_is_not_followed():
    """The allowed address redirects to a listening one, which must not be asked."""
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        import threading

        target = second.getsockname()[1]

        def redirect():
            connection, _ = first.accept()
            with connection:
                connection.recv(65536)
                text = f"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:{target}/\r\n"
                connection.sendall(f"{text}Content-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=redirect)
        thread.start()
        host = f"127.0.0.1:{first.getsockname()[1]}"
        allowed = Settings(
            **TINY, callback_hosts=(host,), callback_private=True, callback_secret="key"
        )
        with pytest.raises(CallbackFailed, match="status 307"):
            callbacks.call(f"http://{host}/", {"a": 1}, allowed)
        thread.join()
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.accept()


def test_the_signature_is_hmac_sha256():
    # RFC 4231, test case 2
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert sign(b"what do ya want for nothing?", "Jefe") == f"sha256={expected}"


def test_the_answer_names_the_field(tmp_path):
    with served(tmp_path / "data") as client:
        answer = client.post({**body(), "callbackUrl": "http://169.254.169.254/latest"})
        assert answer.status == 422
        assert answer.json["errors"][0]["field"] == "callbackUrl"
        assert client.post({**body(), "callbackUrl": 3}).status == 422
        assert client.post({**body(), "callbackUrl": None}).status == 202


def test_data_that_is_posted_again_with_a_callback_is_told_of_or_says_why_not(tmp_path):
    allowed = {"callback_hosts": ("a.example",), "callback_secret": "key"}
    with served(tmp_path / "data", **allowed) as client:
        first = client.post(body()).json
        database = client.app.state.service.database

        def again(path):
            return client.post({**body(), "callbackUrl": f"https://a.example/{path}"}).json

        assert first["callback"] is None
        assert (again("1")["callback"], again("1")["runId"]) == (None, first["runId"])
        assert database.get(first["runId"], None).callback_url == "https://a.example/1"
        assert again("2")["callback"] == "not called: the run calls another address"
        database.end(first["runId"], "succeeded")
        assert again("2")["callback"] == "not called: the run has ended"
        assert database.get(first["runId"], None).callback_url == "https://a.example/1"
