"""Accounts of a real MinIO server that may not do everything."""

import pytest
from minio import MinioAdmin
from minio.credentials import StaticProvider

from dpo.cli import main
from dpo.errors import ObjectMissing, StoreAccessDenied
from dpo.publish.verify import pull, verify
from dpo.storage.adopt import adopt, read_artifact
from dpo.storage.s3 import S3Store
from dpo.storage.s3_client import Client
from dpo.storage.store import open_store
from tests.publish.conftest import MIB, Model, check_store
from tests.publish.pipeline import output

pytestmark = pytest.mark.minio

READ, WRITE, DELETE = "s3:GetObject", "s3:PutObject", "s3:DeleteObject"
LIST = "s3:ListBucket"


@pytest.fixture
def become(minio_environment, bucket_url, monkeypatch):
    """Makes an account with a policy on the bucket, and asks as it from now on."""
    open_store(bucket_url).check(create=True)
    bucket = bucket_url.removeprefix("s3://")
    admin = MinioAdmin(
        endpoint=minio_environment.endpoint.removeprefix("http://"),
        credentials=StaticProvider(minio_environment.access_key, minio_environment.secret_key),
        secure=False,
    )

    def account(*actions, below="", names_below=None):
        where = f"arn:aws:s3:::{bucket}"
        statements = [{"Effect": "Allow", "Action": [*actions], "Resource": [f"{where}/{below}*"]}]
        if names_below is not None:
            limit = {"Condition": {"StringLike": {"s3:prefix": [f"{names_below}*"]}}}
            listing = {"Effect": "Allow", "Action": [LIST], "Resource": [where]}
            statements.append({**listing, **(limit if names_below else {})})
        admin.user_add(bucket, "secret-of-it")
        admin.policy_add(bucket, policy={"Version": "2012-10-17", "Statement": statements})
        admin.attach_policy(policies=[bucket], user=bucket)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-it")

    return account


def test_an_account_that_is_limited_to_a_prefix(become, bucket_url, models):
    become(READ, WRITE, DELETE, below="team/", names_below="team/")
    first = models[0].publish(f"{bucket_url}/team")
    assert models[0].publish(f"{bucket_url}/team").unchanged
    check_store(f"{bucket_url}/team", [first])
    for outside in (bucket_url, f"{bucket_url}/teams"):
        with pytest.raises(StoreAccessDenied, match="may not do this here"):
            models[0].publish(outside)


def test_a_reader_that_may_not_list(become, bucket_url, tmp_path, monkeypatch):
    """AWS refuses what is missing then; MinIO says that it is missing."""
    done = Model(tmp_path / "model", 1, sizes=(MIB,)).publish(bucket_url)
    become(READ)
    read = S3Store._read

    def as_aws(self, *arguments):
        try:
            return read(self, *arguments)
        except ObjectMissing:
            raise StoreAccessDenied("the account may not do this here") from None

    for answer in (read, as_aws):
        monkeypatch.setattr(S3Store, "_read", answer)
        for url in (f"{bucket_url}/policy", done.url):
            assert verify(url)["content_hash"] == done.content_hash
    pull(f"{bucket_url}/policy", tmp_path / "pulled")
    with pytest.raises(StoreAccessDenied) as caught:
        open_store(f"{bucket_url}/policy").list().__next__()
    assert "s3:ListBucket" in caught.value.fix


def test_a_step_starts_from_an_earlier_one_though_it_may_not_list(
    become, bucket_url, tmp_path, monkeypatch
):
    """AWS refuses to say of ``latest.json`` that it is missing; MinIO says it."""
    made = output(tmp_path / "sft", "sft", {"w.json": 1})
    for name in ("w.json", "manifest.json"):
        open_store(bucket_url).write(f"sft/{name}", (tmp_path / "sft" / name).read_bytes())
    done = Model(tmp_path / "model", 1, sizes=(MIB,)).publish(bucket_url)
    become(READ)
    stat = S3Store.stat

    def as_aws(self, key):
        found = stat(self, key)
        if found is None:
            raise StoreAccessDenied("the account may not do this here")
        return found

    for number, answer in enumerate((stat, as_aws)):
        monkeypatch.setattr(S3Store, "stat", answer)
        out = tmp_path / f"out-{number}"
        assert adopt(f"{bucket_url}/sft", out, "sft").content_hash == made.content_hash
        assert read_artifact(f"{bucket_url}/policy", "sft").content_hash == done.content_hash
        assert read_artifact(done.url, "sft").content_hash == done.content_hash


def test_an_account_that_may_not_ask_for_the_region_asks_once(become, bucket_url, monkeypatch):
    become(READ, WRITE)
    asked, open_url = [], Client._url_open

    def noted(self, method, region, **options):
        asked.append((method, options.get("query_params")))
        return open_url(self, method, region, **options)

    monkeypatch.setattr(Client, "_url_open", noted)
    store = open_store(bucket_url)
    for number in range(2):
        store.write("key", b"x" * number)
        assert store.read("key") == b"x" * number
    assert asked.count(("GET", {"location": ""})) == 1


def test_a_publisher_that_may_not_remove(become, bucket_url, tmp_path, capsys):
    become(READ, WRITE, names_below="")
    done = Model(tmp_path / "model", 1, sizes=(MIB,)).publish(bucket_url)
    assert "stays until its time is over" in capsys.readouterr().err
    check_store(bucket_url, [done])
    assert main(["retain", f"{bucket_url}/policy", "keep=1"]) == 1
    check_store(bucket_url, [done])


def test_forgetting_says_where_older_versions_are_not_known(
    become, bucket_url, capsys, monkeypatch
):
    """AWS refuses an account without ``s3:ListBucketVersions``; MinIO lists them all the same."""
    key = "communities/acme/data/posted.jsonl"
    open_store(bucket_url).write(key, b"text")
    become(READ, WRITE, DELETE, names_below="")
    assert main(["forget", bucket_url, "community=acme"]) == 0
    open_store(bucket_url).write(key, b"text")

    def refused(self):
        raise StoreAccessDenied("the account may not do this here")

    monkeypatch.setattr(S3Store, "versions", refused)
    capsys.readouterr()
    assert main(["forget", bucket_url, "community=acme"]) == 1
    told = capsys.readouterr().out
    assert "removed 1 data sets of acme" in told
    assert f"not known {bucket_url}  older versions: the account may not do this here" in told
    assert open_store(bucket_url).stat(key) is None
