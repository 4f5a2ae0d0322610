"""Who may do what: tokens, OIDC, communities that do not see each other, and what is closed."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dpo.errors import ConfigError
from pipelines.service.auth import Authenticator
from pipelines.service.problems import Problem
from pipelines.service.settings import Settings
from tests.service.support import ROOT, TINY, Client, body, served


def bearer(client, token):
    return Client(client.port, {"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service with a token for everything and one for each of two communities."""
    folder = tmp_path_factory.mktemp("guarded")
    tokens = {"acme-token": ["acme"], "umbrella-token": ["umbrella", "brolly"]}
    digests = {hashlib.sha256(t.encode()).hexdigest(): names for t, names in tokens.items()}
    (folder / "tokens.json").write_text(json.dumps(digests))
    with served(folder / "data", token="root-token", tokens_file=folder / "tokens.json") as client:
        yield SimpleNamespace(
            nobody=client,
            root=bearer(client, "root-token"),
            acme=bearer(client, "acme-token"),
            umbrella=bearer(client, "umbrella-token"),
        )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/trigger-finetune"),
        ("GET", "/runs"),
        ("GET", "/runs/x"),
        ("DELETE", "/runs/x"),
        ("GET", "/runs/x/report"),
        ("GET", "/"),
    ],
)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic !!!", "Digest x"])
def test_without_a_token_nothing_is_said(guarded, method, path, header):
    headers = {"Authorization": header} if header else {}
    answer = guarded.nobody.send(method, path, **headers)
    assert answer.status == 401
    assert answer.json["status"] == 401
    assert "www-authenticate" in answer.headers


def test_probes_need_no_token(guarded):
    assert guarded.nobody.get("/health").json == {"status": "ok"}
    assert guarded.nobody.get("/ready").status == 503  # no worker runs beside this service
    assert "acme" not in guarded.nobody.get("/metrics").body.decode()


def test_a_browser_may_read_with_the_token_as_password_but_not_write(guarded):
    basic = "Basic " + base64.b64encode(b"me:acme-token").decode()
    assert guarded.nobody.get("/", Authorization=basic).status == 200
    assert guarded.nobody.post(body("acme"), Authorization=basic).status == 401
    assert guarded.nobody.send("DELETE", "/runs/x", Authorization=basic).status == 401


def test_one_community_cannot_touch_another(guarded):
    run_id = guarded.acme.post(body("acme")).json["runId"]
    stranger = guarded.umbrella
    assert stranger.post(body("acme")).status == 403
    unknown = stranger.get("/runs/00000000-0000-4000-8000-000000000000")
    for answer in (
        stranger.get(f"/runs/{run_id}"),
        stranger.get(f"/runs/{run_id}/report"),
        stranger.send("DELETE", f"/runs/{run_id}"),
    ):
        # a run of another community and none at all cannot be told apart
        assert answer.status == 404
        assert answer.json["detail"] == unknown.json["detail"]
    assert stranger.get("/runs").json["runs"] == []
    assert run_id not in stranger.get("/").body.decode()
    assert guarded.acme.run(run_id)["state"] == "queued"
    assert guarded.root.run(run_id)["communityId"] == "acme"
    # the same rows of another community are another data set and another run
    own = stranger.post(body("umbrella")).json
    assert own["runId"] != run_id
    assert stranger.post(body("brolly")).status == 202
    listed = {run["communityId"] for run in stranger.get("/runs").json["runs"]}
    assert listed == {"umbrella", "brolly"}


@pytest.fixture(scope="module")
def issuer():
    """An OIDC issuer: discovery document, keys, and tokens on demand."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    documents = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(documents[self.path]).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    documents["/.well-known/openid-configuration"] = {"issuer": url, "jwks_uri": f"{url}/keys"}
    documents["/keys"] = {"keys": [{**public, "kid": "one", "alg": "RS256", "use": "sig"}]}
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def token(signed_with=key, algorithm="RS256", **claims):
        values = {
            "iss": url,
            "aud": "dpo",
            "sub": "somebody",
            "exp": time.time() + 60,
            "communities": ["acme"],
            **claims,
        }
        values = {name: value for name, value in values.items() if value is not None}
        return jwt.encode(values, signed_with, algorithm, headers={"kid": "one"})

    yield SimpleNamespace(url=url, token=token, key=key, documents=documents)
    server.shutdown()
    server.server_close()


def test_tokens_of_an_issuer_name_the_communities(issuer, tmp_path):
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with served(tmp_path / "data", oidc_issuer=issuer.url, oidc_audience="dpo") as client:
        good = bearer(client, issuer.token())
        assert good.post(body("acme")).status == 202
        assert good.post(body("umbrella")).status == 403
        assert bearer(client, issuer.token(communities="a acme")).get("/runs").json["runs"]
        assert bearer(client, issuer.token(communities=None)).get("/runs").json["runs"] == []
        assert bearer(client, issuer.token(communities="*")).get("/runs").json["runs"] == []
        assert bearer(client, issuer.token(communities=7)).get("/runs").json["runs"] == []
        for bad in (
            issuer.token(aud="another"),
            issuer.token(iss="http://elsewhere"),
            issuer.token(exp=time.time() - 3600),
            issuer.token(exp=None),
            issuer.token(signed_with=other),
            issuer.token(signed_with="x" * 64, algorithm="HS256"),
            issuer.token(signed_with=None, algorithm="none"),
            # of a kind that the issuer's key is not: it was answered 500
            issuer.token(signed_with=ec.generate_private_key(ec.SECP256R1()), algorithm="ES256"),
        ):
            answer = bearer(client, bad).get("/runs")
            assert answer.status == 401
            assert bad not in answer.body.decode()


def test_an_issuer_without_keys_is_no_error_of_the_service(issuer):
    """A proxy's page that asks for a login, in place of the discovery document: it was a 500."""
    issuer.documents["/proxy/.well-known/openid-configuration"] = ["please log in"]
    asked = Settings(oidc_issuer=f"{issuer.url}/proxy", oidc_audience="dpo")
    with pytest.raises(Problem, match="the issuer of tokens does not answer") as found:
        Authenticator(asked).caller(f"Bearer {issuer.token()}", reading=True)
    assert found.value.status == 503


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "listens on loopback only"),
        ({"oidc_issuer": "https://issuer"}, "OIDC_AUDIENCE"),
        ({"callback_hosts": "example.org"}, "callbacks are signed"),
        ({"database": "mysql://x"}, "not a postgresql:// URL"),
        ({"settings": {"preference_betta": 1}}, "did you mean preference_beta"),
        ({"preset": "fast"}, "no preset is called fast"),
        ({"deployment": "gpus"}, "there is no deployment gpus (did you mean gpu?)"),
        ({"max_runs": 0}, "max_runs=0"),
        ({"unknown": 1}, "unknown key unknown"),
    ],
)
def test_settings_that_cannot_work_are_named(given, message):
    with pytest.raises(ConfigError) as error:
        Settings.from_environment({}, **{**TINY, **given})
    assert message in str(error.value)


def test_variables_are_settings_and_unknown_ones_are_refused():
    found = Settings.from_environment(
        {
            "DPO_SERVICE_MAX_RUNS": "3",
            "DPO_SERVICE_CORS_ORIGINS": "https://a.example, https://b.example",
            "DPO_SERVICE_SETTINGS": '{"model": "tiny"}',
            "OTHER": "x",
        },
        port=9,
    )
    assert (found.max_runs, found.port) == (3, 9)
    assert found.cors_origins == ("https://a.example", "https://b.example")
    with pytest.raises(ConfigError, match="did you mean max_runs"):
        Settings.from_environment({"DPO_SERVICE_MAX_RUN": "3"})
    # `dpo config` knows none of these
    with pytest.raises(ConfigError, match=r"port='abc'.*\n.*\n.*pipelines.service --help"):
        Settings.from_environment({}, port="abc")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"ab": ["acme"]}', '{"%s": ["../x"]}' % ("a" * 64), '{"%s": []}' % ("a" * 64)],
)
def test_a_wrong_file_of_tokens_stops_the_start(tmp_path, text):
    (tmp_path / "tokens.json").write_text(text)
    with (
        pytest.raises(ConfigError, match="file of tokens"),
        served(tmp_path / "data", tokens_file=tmp_path / "tokens.json"),
    ):
        pass


def test_other_pages_are_closed_out_unless_they_are_listed(tmp_path, client):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.get("/health", **asked).headers
    with served(tmp_path / "data", cors_origins=("https://a.example",)) as listed:
        allowed = listed.send("OPTIONS", "/trigger-finetune", **asked).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        other = listed.get("/health", Origin="https://b.example").headers
        assert "access-control-allow-origin" not in other


def test_the_request_id_is_the_callers_when_it_is_harmless(client):
    assert client.get("/health", X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
    forged = client.get("/health", X_Request_Id='x" level="info').headers["x-request-id"]
    assert len(forged) == 32


def test_the_service_and_its_checks_import_no_torch(tmp_path):
    path = tmp_path / "body.json"
    path.write_text(json.dumps(body("acme")))
    code = f"""
import sys
from pathlib import Path
import pipelines.service.__main__, pipelines.service.worker
from pipelines.service.auth import Authenticator
from pipelines.service.problems import Problem
from pipelines.service.settings import Settings
from pipelines.service.submission import check
settings = Settings(preset="toy", data_dir=Path({str(tmp_path)!r}))
assert check(Path({str(path)!r}), None, settings).pairs == 40
print({{"torch", "transformers", "kfp"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
