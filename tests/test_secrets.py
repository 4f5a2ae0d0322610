"""Planted secrets and hostile characters: no message, page or recorded setting shows them.

``tests/service/test_runs.py`` searches all that a run of the service leaves; here every mistake
that a secret can be part of is made, and what is said about it is read.
"""

import pytest

from dpo.cli import main
from dpo.errors import DpoError, holds_password, masked, printable
from pipelines import submit
from pipelines.service.__main__ import main as start

PASSWORD = "planted-password"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pw@host/x", "http://***@host/x"),
        ("http://token@host/x", "http://***@host/x"),
        ("s3://a:b@c@host/x, file:///y", "s3://***@host/x, file:///y"),
        # not encoded as it should be: no URL parser takes it for a password
        ("http://user:p/w#x@host/x", "http://***@host/x"),
        ("https://host/x?X-Amz-Signature=abc&part=1", "https://host/x?X-Amz-Signature=***&part=1"),
        ("https://host/?a=1&token=abc", "https://host/?a=1&token=***"),
        ("http://host:9000/a@b", "http://host:9000/a@b"),
        ("hf://owner/name@main", "hf://owner/name@main"),
        ("mail a@b.example: it says http://host/x", "mail a@b.example: it says http://host/x"),
        ("no URL, user:pw@host", "no URL, user:pw@host"),
    ],
)
def test_what_is_masked_and_what_is_left(text, expected):
    assert masked(text) == expected
    assert str(DpoError(text, where=text, fix=text)).count(expected) == 3
    assert holds_password(text) == ("***@" in expected)


def test_an_error_keeps_no_secret_in_its_arguments():
    error = DpoError(f"http://user:{PASSWORD}@host/", where=f"http://user:{PASSWORD}@host/")
    assert PASSWORD not in repr(error)


def test_control_characters_of_a_text_do_not_reach_a_terminal():
    text = "a\x1b[2J\x9b31m\x07\r\u202eevil\u2066\u2028x\ny\tz"
    assert printable(text) == (
        "a\\u001b[2J\\u009b31m\\u0007\\u000d\\u202eevil\\u2066\\u2028x\ny\tz"
    )
    assert str(DpoError(text)) == printable(text)
    assert printable("عربي 日本語 🙂 é") == "عربي 日本語 🙂 é"


URL = f"https://user:{PASSWORD}@host/v1"


@pytest.mark.parametrize(
    "words",
    [
        ["config", f"evaluation.judge.url={URL}"],
        ["config", f"evaluation.published={URL}"],
        ["config", "datasets=[novalto]", f"sources.novalto.path={URL}"],
        ["config", f"datasets=[{URL}]"],
        ["config", f"model.name_or_path={URL}"],
        ["config", f"model.archive={URL}"],
        ["config", f"publish.store=s3://user:{PASSWORD}@bucket"],
        ["config", f"checkpoint_uri=s3://user:{PASSWORD}@bucket"],
        ["config", "prompt_format=chat", f"chat_template={URL}"],
        ["config", f"trainer={URL}"],
        ["config", f"lr={URL}"],
        ["config", f"nothing={URL}"],
        ["ingest", "--check", URL],
        ["train", URL],
        ["verify", f"s3://user:{PASSWORD}@bucket/policy"],
        ["verify", URL],
        ["list", URL],
        ["pull", URL, "output=x"],
        ["lineage", URL],
        ["forget", URL, "community=x"],
        ["compare", URL, URL],
        [URL],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_password_in_a_url_is_refused_and_not_shown(words, capsys):
    assert main(words) != 0
    said = capsys.readouterr()
    assert said.err.startswith("dpo: ")
    assert PASSWORD not in said.out + said.err


@pytest.mark.parametrize(
    "words",
    [
        ["--set", f"publish_store=s3://user:{PASSWORD}@bucket"],
        ["--set", f"data_uri=s3://user:{PASSWORD}@bucket/x"],
        ["--set", f"evaluation.judge.url={URL}"],
        ["--set", f"datasets=[{URL}]"],
        ["--store", f"s3://user:{PASSWORD}@bucket"],
        ["--deploy", f"notification.url={URL}"],
        ["--deploy", f"environment.AWS_ENDPOINT_URL={URL}"],
        ["--deploy", f"environment.MY_SECRET={PASSWORD}"],
        ["--endpoint", URL],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_password_is_in_no_package_and_no_message(words, capsys, tmp_path):
    package = tmp_path / "package.yaml"
    images = "--image data=a@sha256:{0} --image train=a@sha256:{0}".format("0" * 64).split()
    target = [] if "--endpoint" in words else ["--dry-run", "--package", str(package)]
    assert submit.main(["--preset", "toy", *images, *target, *words]) != 0
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err
    assert not package.exists()


@pytest.mark.parametrize("value", [f"{PASSWORD}\n{PASSWORD}", f"{PASSWORD}é", f"a {PASSWORD}"])
def test_a_key_that_no_header_can_hold_is_not_shown(value, monkeypatch):
    from dpo.config.schema import JudgeConfig
    from dpo.evaluate.judge import Service

    monkeypatch.setenv("DPO_JUDGE_HOSTS", "127.0.0.1")
    monkeypatch.setenv("DPO_JUDGE_API_KEY", value)
    with pytest.raises(DpoError, match="holds a character") as error:
        Service(JudgeConfig(url="http://127.0.0.1:1/v1", model="m"))
    assert PASSWORD not in str(error.value)


def test_a_signing_key_that_is_none_is_not_shown(monkeypatch):
    from dpo.publish.signing import sign

    for text in (PASSWORD, f"-----BEGIN PRIVATE KEY-----\n{PASSWORD}\n-----END PRIVATE KEY-----"):
        monkeypatch.setenv("DPO_SIGNING_KEY", text)
        with pytest.raises(DpoError, match="DPO_SIGNING_KEY") as error:
            sign({})
        assert PASSWORD not in str(error.value)


STORE = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "planted-access-key",
    "AWS_SECRET_ACCESS_KEY": PASSWORD,
    "AWS_SESSION_TOKEN": f"{PASSWORD}-session",
}


def test_a_dead_store_shows_no_credentials(no_store_variables, monkeypatch, capsys):
    for name, value in STORE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dpo.storage.store._RETRY_SECONDS", 0.1)
    assert main(["verify", "s3://bucket/policy"]) == 1
    said = capsys.readouterr().err
    assert "does not answer" in said
    assert PASSWORD not in said


def test_an_endpoint_of_a_store_with_a_password_is_not_shown(
    no_store_variables, monkeypatch, capsys
):
    for name, value in {**STORE, "AWS_ENDPOINT_URL": f"http://u:{PASSWORD}@127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "s3://bucket/policy"]) != 0
    said = capsys.readouterr().err
    assert "AWS_ENDPOINT_URL" in said
    assert PASSWORD not in said


@pytest.mark.minio
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", PASSWORD),
        ("AWS_ACCESS_KEY_ID", f"{PASSWORD}-id"),
        ("AWS_SECRET_ACCESS_KEY", f"{PASSWORD}\n"),
        ("AWS_SESSION_TOKEN", f"{PASSWORD}\r\nX: y"),
        ("AWS_SESSION_TOKEN", f"{PASSWORD}é"),
    ],
)
def test_wrong_credentials_are_not_shown(minio_environment, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("dpo.storage.store._RETRY_SECONDS", 0.1)
    assert main(["verify", "s3://bucket/policy"]) != 0
    said = capsys.readouterr()
    assert said.err.startswith("dpo: ")
    assert PASSWORD not in said.out + said.err


@pytest.mark.parametrize(
    "variables",
    [
        {"DPO_SERVICE_DATABASE": f"postgresql://user:{PASSWORD}@127.0.0.1:1/x"},
        {"DPO_SERVICE_DATABASE": f"mysql://user:{PASSWORD}@127.0.0.1:1/x"},
        {"DPO_SERVICE_DATABASE": f"postgresql://user:{PASSWORD}@127.0.0.1:port/x"},
        {"DPO_SERVICE_STORE": f"s3://user:{PASSWORD}@bucket"},
        {"DPO_SERVICE_OIDC_ISSUER": URL, "DPO_SERVICE_OIDC_AUDIENCE": "x"},
        {"DPO_SERVICE_SETTINGS": f'{{"evaluation.judge.url": "{URL}"}}'},
        {"DPO_SERVICE_SETTINGS": f'{{"{PASSWORD}'},
        {"DPO_SERVICE_TOKEN": PASSWORD, "DPO_SERVICE_MAX_UPLOADS": "x"},
        {"DPO_SERVICE_CALLBACK_SECRET": PASSWORD, "DPO_SERVICE_MAX_RUNS": "0"},
    ],
    ids=lambda variables: " ".join(variables),
)
def test_a_service_that_cannot_start_shows_no_secret(variables, tmp_path, monkeypatch, capfd):
    for name, value in {"DPO_SERVICE_DATA_DIR": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipelines.service.__main__.start_logging", lambda: None)
    assert start(["--port", "0", "--no-worker"]) != 0
    said = capfd.readouterr()
    assert said.err
    assert PASSWORD not in said.out + said.err
    assert "Traceback" not in said.err
