"""Which addresses are called: in every way to write one, and when a name changes its meaning."""

import http.client
import socket
import threading
import urllib.error
from urllib.parse import urlsplit

import pytest

from dpo.storage import outbound
from dpo.storage.outbound import AddressRefused, NameUnknown, addresses_of, is_public, web_url


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        # IPv4 inside IPv6: mapped, of old, 6to4, Teredo, translated
        *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "2002:7f00:1::"),
        *("2002:a9fe:a9fe::1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1"),
        "2001:0:a9fe:a9fe:0:0:8080:8080",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        # one machine in the ways that the C library reads
        *("2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.1", "0177.0.0.1", "127.0.1"),
        # the metadata service likewise
        *("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"),
        *("localhost", "LOCALHOST", "localhost.", "::1", "::ffff:127.0.0.1"),
    ],
)
def test_no_way_to_write_a_private_address_gets_past(host):
    with pytest.raises((AddressRefused, NameUnknown)):
        addresses_of(host, 80, "x", private=False)


def resolves(monkeypatch, *answers):
    """Each look-up of a name gets the next answer."""
    asked = []

    def look_up(host, port, **_):
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (item, port)) for item in found]

    monkeypatch.setattr(outbound.socket, "getaddrinfo", look_up)
    return asked


def test_a_name_with_one_private_address_among_others_is_refused(monkeypatch):
    resolves(monkeypatch, ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(AddressRefused, match="private address"):
        addresses_of("rebound.example", 80, "x", private=False)


def test_the_address_that_was_checked_is_the_one_that_is_called(monkeypatch):
    """The name is public when it is checked and loopback when it would be asked for again."""
    asked = resolves(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    called = []

    def connect(address, timeout):
        called.append(address)
        raise OSError("not in a test")

    monkeypatch.setattr(outbound.socket, "create_connection", connect)
    parts = urlsplit("http://rebound.example:81/")
    connection = outbound.connection_to(parts, "x", private=False, timeout_seconds=1)
    with pytest.raises(OSError, match="not in a test"):
        connection.request("GET", "/")
    assert (asked, called) == (["rebound.example"], [("8.8.8.8", 81)])
    connection.close()
    with pytest.raises(AddressRefused):
        connection.request("GET", "/")
    assert called == [("8.8.8.8", 81)]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_opener_of_urllib_checks_too(scheme, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    resolves(monkeypatch, ["169.254.169.254"])
    with pytest.raises(AddressRefused, match="private address"):
        outbound.opener("x", private=False).open(f"{scheme}://name.example/", timeout=1)


def answering(server, answer):
    def once():
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=once, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status):
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        target = second.getsockname()[1]
        text = f"HTTP/1.1 {status} x\r\nLocation: http://127.0.0.1:{target}/\r\n"
        thread = answering(first, f"{text}Content-Length: 0\r\n\r\n".encode())
        with pytest.raises(urllib.error.HTTPError) as error:
            outbound.opener("x", private=True).open(
                f"http://127.0.0.1:{first.getsockname()[1]}/", timeout=5
            )
        error.value.close()
        thread.join()
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.accept()


def test_a_private_address_is_called_where_it_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = answering(server, b"HTTP/1.1 204 x\r\n\r\n")
        parts = web_url(f"http://localhost:{server.getsockname()[1]}/", "x")
        connection = outbound.connection_to(parts, "x", private=True, timeout_seconds=5)
        connection.request("GET", "/")
        assert connection.getresponse().status == http.client.NO_CONTENT
        connection.close()
        thread.join()


def test_a_name_with_several_addresses_is_reached_at_the_one_that_answers(monkeypatch):
    """``localhost`` is ::1 first on many machines, where a server listens at 127.0.0.1 alone."""
    resolves(monkeypatch, ["::1", "127.0.0.1"], ["::1", "::2"])
    called = []

    def connect(address, _):
        called.append(address[0])
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError(address[0])
        return here

    monkeypatch.setattr(outbound.socket, "create_connection", connect)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"HTTP/1.1 204 x\r\n\r\n")
        parts = web_url("http://judge.example:8000/", "x")
        connection = outbound.connection_to(parts, "x", private=True, timeout_seconds=5)
        connection.request("GET", "/")
        assert connection.getresponse().status == http.client.NO_CONTENT
        assert called == ["::1", "127.0.0.1"]
        connection.close()
    with pytest.raises(ConnectionRefusedError, match="::2"):
        connection.request("GET", "/")
