"""Where models come from, what was made of a community's data, and runs' manifests."""

import json
import shutil
import threading

import pytest

from dpo.cli import main
from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ArtifactError
from dpo.publish.lineage import chain, dependents, forget
from dpo.publish.stage import run_publish
from dpo.publish.verify import verify
from dpo.storage.adopt import adopt
from dpo.storage.fingerprint import path_fingerprint
from dpo.storage.given_model import FOREIGN, read_model
from dpo.storage.manifest import read_manifest, staged, write_manifest
from dpo.storage.runs import artifact_records, read_run_manifest, write_run_manifest
from dpo.storage.store import open_store
from tests.publish.pipeline import output, source
from tests.publish.test_given_model import judged


def test_the_chain_leads_from_the_model_to_the_data(pipeline):
    published = pipeline.run("run-1", source("pairs.jsonl"))
    manifest, records = chain(f"{pipeline.root}/policy")
    assert manifest["content_hash"] == published["content_hash"]
    assert [entry["step"] for entry in records] == ["ingest", "sft", "preference"]
    ingest, sft, policy = records
    assert ingest["sources"] == {"novalto": "etag:run-1"}
    assert ingest["code"] == "c" * 64
    assert sft["parents"] == {"pairs": ingest["content_hash"]}
    assert policy["parents"]["base"] == sft["content_hash"]
    for entry in records:
        assert entry["made_by"]["image"] == "registry/train@sha256:" + "9" * 64
        assert entry["made_by"]["commit"] == "0123abc"
        assert entry["made_by"]["processes"] == 1
        assert entry["made_by"]["processor"]


def test_a_lineage_that_is_none_is_said(pipeline, capsys):
    published = pipeline.run("run-1", source("pairs.jsonl"))
    key = f"policy/{published['content_hash']}/manifest.json"
    store = open_store(pipeline.root)
    manifest = json.loads(store.read(key))
    store.write(key, json.dumps({**manifest, "lineage": {"h": "x"}}).encode())
    assert main(["lineage", published["url"]]) == 1
    assert "where it comes from cannot be read" in capsys.readouterr().err


def test_the_runs_manifest_links_every_artifact(pipeline):
    published = pipeline.run("run-1", source("pairs.jsonl"))
    run = read_run_manifest(pipeline.root, "run-1")
    artifacts = run["artifacts"]
    assert set(artifacts) == {"ingest", "sft", "preference", "evaluate", "gate"}
    assert artifacts["evaluate"]["parents"] == {"policy": artifacts["preference"]["content_hash"]}
    assert artifacts["gate"]["parents"] == {"evaluation": artifacts["evaluate"]["content_hash"]}
    assert artifacts["ingest"]["configuration"]["datasets"] == ["novalto"]
    assert run["published"]["url"] == published["url"]
    keys = set(open_store(pipeline.root).list("runs/run-1/"))
    assert {f"runs/run-1/{name}" for name in ("report.html", "configuration.json")} <= keys


def test_steps_that_write_the_runs_manifest_at_once_lose_nothing(tmp_path):
    store = open_store(f"file://{tmp_path}")
    threads = [
        threading.Thread(
            target=write_run_manifest,
            args=(store, "run-1"),
            kwargs={f"step_{n}": n, "artifacts": {f"a{n}": {"content_hash": str(n)}}},
        )
        for n in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = read_run_manifest(store.root, "run-1")
    assert [run[f"step_{n}"] for n in range(5)] == list(range(5))
    assert set(run["artifacts"]) == {f"a{n}" for n in range(5)}


@pytest.fixture
def communities(pipeline):
    """Three models of acme's data (one indirectly, one by name), one of another community's."""
    store = open_store(pipeline.root)
    for name in ("acme", "acme-2"):
        store.write(f"communities/{name}/data/{name}.jsonl", b"{}")
    of = lambda name: f"{pipeline.root}/communities/{name}"  # noqa: E731
    own = pipeline.run(
        "acme-run", source(f"{of('acme')}/data/acme.jsonl"), store=of("acme"), weight=1
    )
    other = pipeline.run(
        "other-run", source(f"{of('acme-2')}/data/acme-2.jsonl"), store=of("acme-2"), weight=2
    )
    named = pipeline.run("named-run", source(community="acme"), weight=3)
    # somebody pulls acme's model and trains it further, on other data
    place = pipeline.folder / "pulled"
    assert main(["pull", f"{of('acme')}/policy", f"output={place}"]) == 0
    grown = pipeline.run("grown-run", source("more.jsonl"), weight=4, base=path_fingerprint(place))
    return {"own": own, "other": other, "named": named, "grown": grown}


def test_every_model_made_of_a_communitys_data_is_found(pipeline, communities):
    found = dependents(pipeline.root, "acme")
    assert {model.url for model in found.models} == {
        communities[name]["url"] for name in ("own", "named", "grown")
    }
    assert found.fingerprints == {"etag:acme-run", "etag:named-run"}
    assert {run.rpartition("/")[2] for run in found.runs} == {
        "acme-run",
        "named-run",
        "grown-run",
    }
    assert found.data == [f"{pipeline.root}/communities/acme/data/acme.jsonl"]


def test_what_is_made_of_a_pulled_folder_that_a_step_was_given_is_found(
    pipeline, communities, tiny_model, capsys
):
    place = pipeline.folder / "pulled"
    given = read_model(place)
    assert given.stage == FOREIGN
    sft = output(pipeline.folder / "sft", "sft", {"w.json": 1}, inputs={"base": given.content_hash})
    policy = pipeline.folder / "policy"
    with staged(policy) as partial:
        shutil.copytree(tiny_model, partial, dirs_exist_ok=True)
        write_manifest(partial, "base model", inputs={"base": sft.content_hash})
    paths = judged(pipeline.folder, policy)
    config = compose([f"publish.store='{pipeline.root}'", "publish.name=again"]).config
    run_publish(
        restrict(config, "publish"), pipeline.folder / "out", policy=policy, run_id="", **paths
    )
    found = {model.url.split("/")[-2] for model in dependents(pipeline.root, "acme").models}
    assert "again" in found
    capsys.readouterr()
    assert main(["lineage", f"{pipeline.root}/again"]) == 0
    shown = capsys.readouterr().out
    # what was given comes before what was made of it, and is no data
    assert shown.index(f"sft {sft.content_hash}") < shown.index(f"model {given.content_hash}")
    assert "  folder: pulled\n" in shown
    assert "data folder" not in shown


def test_a_community_without_data_has_no_models(pipeline, communities):
    found = dependents(pipeline.root, "acm")
    assert [found.data, found.models, found.runs, found.artifacts] == [[], [], {}, {}]


def test_forgetting_removes_the_data_and_lists_what_is_left(pipeline, communities):
    store = open_store(pipeline.root)
    before = set(store.list())
    found = forget(pipeline.root, "acme")
    assert before - set(store.list()) == {"communities/acme/data/acme.jsonl"}
    assert len(found.models) == 3
    # what depends on it is still told afterwards
    assert len(dependents(pipeline.root, "acme").models) == 3
    assert dependents(pipeline.root, "acme").data == []


def test_forgetting_may_remove_what_shows_its_text(pipeline, communities):
    store = open_store(pipeline.root)
    forget(pipeline.root, "acme", reports=True)
    keys = set(store.list())
    assert "communities/acme/runs/acme-run/report.html" not in keys
    assert "communities/acme/runs/acme-run/manifest.json" in keys
    assert "communities/acme-2/runs/other-run/report.html" in keys
    verify(f"{pipeline.root}/communities/acme/policy")


def test_forgetting_removes_the_tokens_of_its_texts(pipeline, communities, monkeypatch, capsys):
    cache = pipeline.folder / "tokens"
    monkeypatch.setenv("DPO_TOKENS_DIR", str(cache))
    for run_id in ("acme-run", "other-run"):
        pairs = read_manifest(pipeline.folder / run_id / "pairs").content_hash
        output(cache / run_id, "tokens", {"tokens.json": [1]}, inputs={"pairs": pairs})
    (cache / "broken").mkdir()
    (cache / "broken/manifest.json").write_text("{")
    assert dependents(pipeline.root, "acme").tokens == [str(cache / "acme-run")]
    assert main(["forget", pipeline.root, "community=acme"]) == 0
    assert "removed 1 data sets of acme and 1 caches of its tokens" in capsys.readouterr().out
    assert sorted(path.name for path in cache.iterdir()) == ["broken", "other-run"]


def test_forgetting_leaves_the_reports_of_another_community_with_equal_data(pipeline):
    store = open_store(pipeline.root)
    for name in ("acme", "other"):
        record = {
            **{"step": "ingest", "content_hash": "a" * 64},
            "configuration": {"sources": {"s": {"path": f"s3://b/communities/{name}/data/x"}}},
        }
        place = open_store(f"{pipeline.root}/communities/{name}")
        write_run_manifest(place, f"{name}-run", artifacts={"ingest": record})
        store.write(f"communities/{name}/runs/{name}-run/report.html", b"<p>")
    found = forget(pipeline.root, "acme", reports=True)
    left = set(store.list())
    assert "communities/acme/runs/acme-run/report.html" not in left
    assert "communities/other/runs/other-run/report.html" in left
    # and it is said that it is there
    (told,) = [texts for run, texts in found.runs.items() if run.endswith("other-run")]
    assert [text.rpartition("/")[2] for text in told] == ["report.html"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("runs/broken/manifest.json", b"{"),
        ("runs/broken/manifest.json", b"[]"),
        ("runs/broken/manifest.json", b'{"format_version": 99}'),
        ("runs/broken/manifest.json", b'{"format_version": 2, "artifacts": {"ingest": 5}}'),
        (
            "runs/broken/manifest.json",
            b'{"format_version": 2, "artifacts": {"i": {"step": "ingest", "content_hash": "h", '
            b'"configuration": {"sources": {"s": "x"}}}}}',
        ),
        (f"policy/{'a' * 64}/manifest.json", b"{"),
        (
            f"policy/{'a' * 64}/manifest.json",
            b'{"format_version": 2, "name": "p", "content_hash": "h", "files": [], '
            b'"lineage": {"h": {}}}',
        ),
    ],
)
def test_one_broken_manifest_keeps_no_data_from_being_forgotten(
    pipeline, communities, capsys, key, text
):
    store = open_store(pipeline.root)
    store.write(key, text)
    code, out, _ = run_command(capsys, "lineage", pipeline.root, "community=acme")
    assert (code, out.count("\nmodel ")) == (1, 3)
    code, out, _ = run_command(capsys, "forget", pipeline.root, "community=acme")
    assert code == 1
    assert f"not known {pipeline.root}/{key}" in out
    assert "communities/acme/data/acme.jsonl" not in set(store.list())


def test_a_name_is_not_the_beginning_of_another(pipeline):
    entry = {"step": "ingest", "content_hash": "a" * 64}
    for number, path in enumerate(
        ("/communities/acme.eu/data/x.jsonl", "/communities/acmex/x", "/communities/acme.jsonl")
    ):
        sources = {"s": {"path": f"s3://b{path}"}}
        write_run_manifest(
            open_store(pipeline.root),
            f"run-{number}",
            artifacts={
                "ingest": {
                    **entry,
                    "content_hash": str(number) * 64,
                    "configuration": {"sources": sources},
                }
            },
        )
    assert [run[-5:] for run in dependents(pipeline.root, "acme").runs] == ["run-2"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "*"])
def test_what_is_no_community_is_refused(pipeline, name):
    with pytest.raises(ArtifactError, match="not a community's name"):
        forget(pipeline.root, name)


def test_a_model_that_began_from_a_published_one_depends_on_its_data_too(pipeline, communities):
    place = pipeline.folder / "adopted"
    adopt(communities["own"]["url"], place, "sft")
    manifest = read_manifest(place, stage="sft")
    steps = {entry["step"] for entry in manifest.lineage.values()}
    assert steps == {"ingest", "sft", "preference"}
    made = output(
        pipeline.folder / "next", "preference", {"w": 1}, inputs={"base": manifest.content_hash}
    )
    write_run_manifest(open_store(pipeline.root), "adopting", artifacts=artifact_records(made))
    runs = dependents(pipeline.root, "acme").runs
    assert f"{pipeline.root}/runs/adopting" in runs
    assert f"{pipeline.root}/runs/adopting" not in dependents(pipeline.root, "acme-2").runs


# --- the commands ---


def run_command(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands_on_published_models(pipeline, communities, capsys):
    root, url = pipeline.root, f"{pipeline.root}/policy"
    named, grown = communities["named"], communities["grown"]
    code, out, _ = run_command(capsys, "list", root)
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines() if " policy " in line] == [
        ["latest", "policy", grown["content_hash"]],
        ["policy", named["content_hash"], out.splitlines()[-1].split()[2]],
    ]
    code, out, _ = run_command(capsys, "list", url, "format=json")
    assert [entry["run_id"] for entry in json.loads(out)] == ["grown-run", "named-run"]
    code, out, _ = run_command(capsys, "lineage", url)
    assert code == 0
    assert "etag:grown-run" in out
    assert "sha256:999" in out
    code, out, _ = run_command(capsys, "lineage", root, "community=acme")
    assert out.count("\nmodel ") == 3
    code, out, _ = run_command(capsys, "publish", "--rollback", url)
    assert (code, named["content_hash"] in out) == (0, True)
    code, out, _ = run_command(capsys, "verify", url)
    assert named["content_hash"] in out
    store = f"publish.store={root}"
    code, _, err = run_command(capsys, "publish", "--rollback", store, "publish.name=policy")
    assert (code, "no earlier version" in err) == (1, True)
    code, out, _ = run_command(
        capsys, "publish", "--rollback", url, f"version={grown['content_hash'][:12]}"
    )
    assert grown["content_hash"] in out
    code, out, _ = run_command(capsys, "retain", url, "keep=1")
    assert f"removed . {named['content_hash']}" in out
    code, out, _ = run_command(capsys, "forget", root, "community=acme")
    assert "removed 1 data sets of acme" in out
    assert out.count("\nmodel ") == 2
    # what is gone is not told as what is there, whatever else was asked for
    assert out.count("\nremoved   ") == 1
    assert f"\ndata      {root}" not in out


def test_a_url_may_have_an_equals_sign_in_its_path(pipeline, capsys):
    root = f"{pipeline.root}/env=prod"
    pipeline.run("run-1", source("pairs.jsonl"), store=root)
    assert main(["verify", f"{root}/policy"]) == 0
    assert main(["list", root, "format=json"]) == 0
    assert main(["publish", "--rollback", f"publish.store={root}"]) == 1
    assert "no earlier version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], "takes one URL"),
        (["list", "file:///a", "file:///b"], "takes one URL"),
        (["list", "file:///a", "keep=1"], "knows no keep="),
        (["list", "file:///a", "format=xml"], "choose text or json"),
        (["retain", "file:///a"], "keep is missing"),
        (["retain", "file:///a", "keep=0"], "from 1 on"),
        (["retain", "file:///a", "keep=many"], "not a whole number"),
        (["retain", "file:///a", "keep=1.5"], "not a whole number"),
        (["retain", "file:///a", "keep=inf"], "not a whole number"),
        (["retain", "file:///a", "keep=1", "grace_hours=nan"], "not a number from 0 on"),
        (["forget", "file:///a"], "needs community="),
        (["forget", "file:///a", "community=x", "reports=yes"], "write true or false"),
        (["pull", "file:///a"], "needs output="),
        (["verify", "s3://b", "x=1"], "it takes none"),
        (["retain", "nowhere", "keep=1"], "not the URL of a store"),
    ],
)
def test_mistakes_in_commands_exit_with_2(capsys, arguments, words):
    code, _, err = run_command(capsys, *arguments)
    assert (code, words in err) == (2, True), err
