"""The allow list of places that a run may read from."""

import json
import shutil

import pytest

from dpo.config.models import ModelConfig
from dpo.config.sources import SourceConfig
from dpo.data.files import located, source_files
from dpo.errors import ConfigError
from dpo.storage.adopt import artifact_store
from dpo.storage.allowed import MODELS, SOURCES, check_allowed, is_below
from dpo.storage.base_model import is_here, local_model, local_tokenizer


@pytest.mark.parametrize(
    ("place", "allowed", "expected"),
    [
        ("s3://bucket/team/x", "s3://bucket/team", True),
        ("s3://bucket/team", "s3://bucket/team/", True),
        ("minio://bucket/team/x", "s3://bucket/team", True),
        ("s3://bucket/teams/x", "s3://bucket/team", False),
        ("s3://other/team/x", "s3://bucket/team", False),
        ("s3://bucket.evil/team", "s3://bucket", False),
        ("gs://bucket/team", "s3://bucket/team", False),
        ("s3://bucket/team/../other", "s3://bucket/team", False),
        ("s3://bucket/team/%2e%2e/other", "s3://bucket/team", False),
        ("s3://bucket/team/..\\other", "s3://bucket/team", False),
        ("s3://", "s3://bucket", False),
        ("S3://bucket/team/x", "s3://bucket/team", True),
        ("hf://owner/name", "hf://owner", True),
        ("hf://datasets/owner/name", "hf://owner", True),
        ("hf://owner-evil/name", "hf://owner", False),
        ("hf://owner/../evil/name", "hf://owner", False),
        ("/data/a.jsonl", "/data", True),
        ("file:///data/a.jsonl", "/data", True),
        ("/data/a.jsonl", "file:///data", True),
        ("/database/a.jsonl", "/data", False),
        ("/data/../etc/passwd", "/data", False),
        ("file:///data/%2e%2e/etc/passwd", "/data", False),
        ("/data/*/../../etc/*", "/data", False),
        ("/data/**/*.jsonl", "/data", True),
        ("/*/a.jsonl", "/data", False),
        ("http://169.254.169.254/latest", "s3://bucket", False),
        ("/etc/passwd", "s3://bucket", False),
        ("https://host/x", "https://host", True),
    ],
)
def test_what_lies_below_a_place(place, allowed, expected):
    assert is_below(place, [allowed]) is expected


def test_without_a_list_everything_is_read_and_an_empty_list_allows_nothing(monkeypatch):
    monkeypatch.delenv(SOURCES, raising=False)
    check_allowed("s3://any/thing", "x")
    monkeypatch.setenv(SOURCES, "")
    with pytest.raises(ConfigError, match="not on the list"):
        check_allowed("s3://any/thing", "x")
    check_allowed("builtin:hh-harmless", "x")


def test_sources_and_earlier_artifacts_are_checked(tmp_path, monkeypatch):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    monkeypatch.setenv(SOURCES, f"{inside}, s3://bucket/team, hf://owner")
    good = SourceConfig(path=str(inside))
    assert [p.name for p in source_files("x", located("x", good))] == ["a.jsonl"]
    assert located("x", SourceConfig(hub="owner/name")).hub == "owner/name"
    assert located("x", SourceConfig(path="s3://bucket/team/x")).path
    for bad in (
        SourceConfig(path=str(outside)),
        SourceConfig(path=f"file://{outside}/a.jsonl"),
        SourceConfig(path=f"{inside}/../outside/a.jsonl"),
        SourceConfig(path=f"{tmp_path}/*/a.jsonl"),
        SourceConfig(path="s3://bucket/others"),
        SourceConfig(path="hf://evil/name"),
        SourceConfig(hub="evil/name"),
    ):
        with pytest.raises(ConfigError, match="not on the list"):
            located("x", bad)
    with pytest.raises(ConfigError, match="not on the list"):
        artifact_store(outside.as_uri())
    assert artifact_store("s3://bucket/team/run").root == "s3://bucket/team/run"


def test_a_link_out_of_an_allowed_folder_is_not_followed(tmp_path, monkeypatch):
    inside, secret = tmp_path / "inside", tmp_path / "secret.jsonl"
    inside.mkdir()
    secret.write_text("{}")
    (inside / "a.jsonl").symlink_to(secret)
    monkeypatch.setenv(SOURCES, str(inside))
    with pytest.raises(ConfigError, match="not on the list"):
        source_files("x", located("x", SourceConfig(path=str(inside))))


def test_a_communitys_place_is_checked_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "acme.json").write_text("[]")
    monkeypatch.setenv("DPO_COMMUNITY_DATA", str(tmp_path))
    monkeypatch.setenv(SOURCES, "s3://bucket")
    with pytest.raises(ConfigError, match="not on the list"):
        source_files("x", located("x", SourceConfig(community="acme")))
    monkeypatch.setenv(SOURCES, str(tmp_path))
    assert source_files("x", located("x", SourceConfig(community="acme")))


def test_base_models_and_tokenizers_have_a_list_of_their_own(tmp_path, tiny_model, monkeypatch):
    inside, outside = tmp_path / "models/tiny", tmp_path / "others/tiny"
    for folder in (inside, outside):
        shutil.copytree(tiny_model, folder)
    monkeypatch.setenv(SOURCES, "s3://bucket")
    monkeypatch.setenv(MODELS, f"{tmp_path / 'models'}, hf://owner, hf://other/one")
    for good in (str(inside), "builtin:tiny"):
        assert (local_model(ModelConfig(name_or_path=good)) / "config.json").is_file()
    for name in ("owner/any", "other/one"):
        assert not is_here(ModelConfig(name_or_path=name))
    for name in (str(outside), f"{inside}/../../others/tiny", "other/two", "evil/model"):
        with pytest.raises(ConfigError, match="not on the list") as caught:
            local_model(ModelConfig(name_or_path=name))
        assert MODELS in str(caught.value)
        with pytest.raises(ConfigError, match="not on the list"):
            local_tokenizer(ModelConfig(name_or_path=str(inside), tokenizer_name_or_path=name))
    monkeypatch.delenv(MODELS)
    assert local_model(ModelConfig(name_or_path=str(outside))) == outside
