"""The gate's rules by hand, and what is published in a folder and in a real MinIO."""

import json

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ArtifactError, ConfigError
from dpo.evaluate.gate import run_gate
from dpo.evaluate.verdict_text import with_verdict
from dpo.storage.manifest import staged, write_manifest
from dpo.storage.store import open_store

MARK = "<!-- verdict -->"
HASH = "a" * 64


def figure(value, low=None):
    return {"value": value, "low": value if low is None else low, "high": value}


def evaluation(folder, low=0.6, value=0.7, **more):
    figures = {
        "after": {"reward_accuracy": figure(value, low)},
        "held_out": "pairs",
        "policy": {"content_hash": "policy", "files": {"model.safetensors": "w", "a.json": "a"}},
        "change": {"perplexity_growth": figure(1.2)},
        "kl": {"per_answer": figure(4.0)},
        "answers": {"length_growth": figure(1.5), "policy": {"repetition": figure(0.25)}},
    }
    figures |= more
    with staged(folder) as partial:
        (partial / "evaluation.json").write_text(json.dumps(figures), encoding="utf-8")
        page = f"<!doctype html><body>{MARK}<p>{MARK}</p></body>"
        (partial / "report.html").write_text(page, encoding="utf-8")
        (partial / "report.md").write_text(f"# Evaluation\n\n{MARK}\n", encoding="utf-8")
        write_manifest(partial, "evaluate")
    return folder


def gate(folder, judged, *overrides):
    return run_gate(restrict(compose(list(overrides)).config, "gate"), folder, evaluation=judged)


def rule(verdict, name):
    (found,) = (rule for rule in verdict.rules if rule.name == name)
    return found


@pytest.mark.parametrize(("low", "approved"), [(0.56, True), (0.55, False), (0.54, False)])
def test_the_lower_bound_must_exceed_the_limit(tmp_path, low, approved):
    judged = evaluation(tmp_path / "e", low)
    assert gate(tmp_path / "v", judged, "gate.min_reward_accuracy=0.55").approved is approved


@pytest.mark.parametrize(
    ("kl", "approved", "said"),
    [
        # 0.1 + 0.2 is 0.30000000000000004
        (0.1 + 0.2, True, "0.300 is within 0.300"),
        (0.3001, False, "0.3001 exceeds 0.3000"),
        (0.3, True, "0.300 is within 0.300"),
    ],
)
def test_a_figure_just_over_its_limit_can_be_told_from_it(tmp_path, kl, approved, said):
    judged = evaluation(tmp_path / "e", kl={"per_answer": figure(kl)})
    verdict = gate(tmp_path / "v", judged, "gate.max_kl=0.3")
    assert rule(verdict, "max_kl").passed is approved
    assert said in rule(verdict, "max_kl").explanation


def test_a_small_limit_is_not_shown_as_0(tmp_path):
    verdict = gate(tmp_path / "v", evaluation(tmp_path / "e"), "gate.max_kl=0.0002")
    assert "4.0000 exceeds 0.0002" in rule(verdict, "max_kl").explanation


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (0.5504, "0.5504 exceeds 0.5500"),
        (0.5496, "0.5496 does not exceed 0.5500"),
        (0.55, "0.550 does not exceed 0.550"),
    ],
)
def test_a_bound_just_beside_its_limit_can_be_told_from_it(tmp_path, low, said):
    verdict = gate(tmp_path / "v", evaluation(tmp_path / "e", low), "gate.min_reward_accuracy=0.55")
    assert said in rule(verdict, "min_reward_accuracy").explanation


def test_force_is_recorded(tmp_path):
    judged = evaluation(tmp_path / "e", 0.1)
    verdict = gate(tmp_path / "v", judged, "gate.force=true")
    assert verdict.approved
    assert verdict.forced
    assert json.loads((tmp_path / "v/verdict.json").read_text())["forced"] is True


def test_force_on_a_good_policy_is_no_force(tmp_path):
    assert not gate(tmp_path / "v", evaluation(tmp_path / "e", 0.9), "gate.force=true").forced


def test_an_evaluation_without_its_figure_is_refused(tmp_path):
    with staged(tmp_path / "e") as partial:
        (partial / "evaluation.json").write_text("{}", encoding="utf-8")
        write_manifest(partial, "evaluate")
    with pytest.raises(ArtifactError, match="evaluation"):
        gate(tmp_path / "v", tmp_path / "e")


def test_nan_is_not_good_enough(tmp_path):
    judged = evaluation(tmp_path / "e", float("nan"))
    assert not gate(tmp_path / "v", judged).approved


@pytest.mark.parametrize(
    ("setting", "limit", "passed"),
    [
        ("max_kl", 4.0, True),
        ("max_kl", 3.99, False),
        ("max_length_growth", 1.5, True),
        ("max_length_growth", 1.49, False),
        ("max_repetition", 0.25, True),
        ("max_repetition", 0.24, False),
        ("max_perplexity_growth", 1.2, True),
        ("max_perplexity_growth", 1.19, False),
    ],
)
def test_each_maximum_with_its_figure_and_limit(tmp_path, setting, limit, passed):
    verdict = gate(tmp_path / "v", evaluation(tmp_path / "e"), f"gate.{setting}={limit}")
    found = rule(verdict, setting)
    assert (found.passed, found.limit, verdict.approved) == (passed, limit, passed)
    assert f"{found.value:.3f}" in found.explanation
    assert f"{limit:.3f}" in found.explanation


@pytest.mark.parametrize(
    ("policy", "sft", "words"),
    [
        (0.75, 0.5, "75 % of the policy's answers and 50 % of the SFT model's"),
        (0.004, 0.0, "fewer than 1 % of the policy's answers and 0 % of the SFT model's"),
        (0.996, 1.0, "more than 99 % of the policy's answers and 100 % of the SFT model's"),
        (0.0, 0.25, "0 % of the policy's answers and 25 % of the SFT model's"),
        (0.75, None, "75 % of the policy's answers"),
    ],
)
def test_a_growth_of_answers_that_did_not_end_says_so(tmp_path, policy, sft, words):
    answers = {"length_growth": figure(1.1), "policy": {"cut_off": figure(policy)}}
    if sft is not None:
        answers["sft"] = {"cut_off": figure(sft)}
    judged = evaluation(tmp_path / "e", answers=answers)
    found = rule(gate(tmp_path / "v", judged, "gate.max_length_growth=1.5"), "max_length_growth")
    assert found.passed
    limit = "did not end within evaluation.max_new_tokens or the model's context"
    whole = f"({words} {limit}, so growth beyond that is not measured): 1.100 is within"
    assert whole in found.explanation


@pytest.mark.parametrize(
    ("setting", "what"), [("max_kl", "kl"), ("max_repetition", "answers")], ids=["kl", "answers"]
)
@pytest.mark.parametrize("broken", [None, {}, {"per_answer": {"value": "many"}}, [1]])
def test_a_figure_that_is_missing_or_no_number_fails_its_rule(tmp_path, setting, what, broken):
    judged = evaluation(tmp_path / "e", **{what: broken})
    found = rule(gate(tmp_path / "v", judged, f"gate.{setting}=1"), setting)
    assert not found.passed
    assert found.value is None
    assert "no such figure" in found.explanation


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("max_kl", "n_kl_samples"),
        ("max_length_growth", "n_samples"),
        ("max_repetition", "n_samples"),
    ],
)
def test_a_rule_whose_figure_is_switched_off_is_refused_before_anything_is_trained(rule, source):
    with pytest.raises(ConfigError, match=f"gate.{rule} is set, but evaluation.{source} is 0"):
        compose([f"gate.{rule}=1", f"evaluation.{source}=0"])


def test_rules_that_are_not_set_are_not_checked(tmp_path):
    verdict = gate(tmp_path / "v", evaluation(tmp_path / "e"))
    assert [found.name for found in verdict.rules] == ["min_reward_accuracy"]


def test_the_report_gets_the_verdict_and_keeps_the_rest(tmp_path):
    gate(tmp_path / "v", evaluation(tmp_path / "e", 0.1))
    page = (tmp_path / "v/report.html").read_text(encoding="utf-8")
    assert "Refused." in page
    assert page.count(MARK) == 1
    text = (tmp_path / "v/report.md").read_text(encoding="utf-8")
    assert "**Refused.**" in text
    assert "0.100 does not exceed 0.500" in text


def test_a_rule_cannot_bring_markup_into_the_report():
    verdict = {
        "approved": False,
        "forced": False,
        "rules": [{"passed": False, "explanation": "<script>alert(1)</script>"}],
    }
    page = with_verdict(f"<!doctype html>{MARK}", verdict)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    verdict["rules"][0]["explanation"] = "<img src=x> ![x](https://x.example/x.png)"
    text = with_verdict(f"# Evaluation\n{MARK}", verdict)
    assert "<img" not in text
    assert "![x](" not in text


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.minio)])
def store_url(request, tmp_path):
    if request.param == "folder":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue("bucket_url")


def publish(url, *, accuracy=0.6, held_out="pairs", files=None, run_id="run-1", policy="other"):
    """What publish leaves in a store, as far as the gate reads it."""
    store = open_store(url)
    store.check(create=True)
    entries = files or {"model.safetensors": "other", "README.md": "card"}
    version = {
        "format_version": 2,
        "name": "policy",
        "content_hash": HASH,
        "run_id": run_id,
        "files": [{"path": path, "size": 1, "sha256": hash_} for path, hash_ in entries.items()],
    }
    run = {
        "evaluation": {"after": {"reward_accuracy": figure(accuracy)}, "held_out": held_out},
        "policy": {"content_hash": policy},
        "published": {"content_hash": HASH},
    }
    store.write(f"policy/{HASH}/manifest.json", json.dumps(version).encode())
    store.write("runs/run-1/manifest.json", json.dumps(run).encode())
    latest = {"format_version": 1, "content_hash": HASH}
    store.write("policy/latest.json", json.dumps(latest).encode())
    return store


def judged_against(url, tmp_path, *overrides, **more):
    judged = evaluation(tmp_path / "e", **more)
    return gate(tmp_path / "v", judged, f"publish.store={url}", *overrides)


def test_the_first_version_has_nothing_to_improve_on(store_url, tmp_path):
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0.5")
    assert verdict.approved
    assert "nothing is published yet" in rule(verdict, "min_improvement").explanation


@pytest.mark.parametrize(("limit", "passed"), [(0.1, True), (0.11, False), (-0.5, True)])
def test_improvement_over_the_published_version(store_url, tmp_path, limit, passed):
    """0.7 here, 0.6 there: 0.1, which in binary is a little less."""
    publish(store_url, accuracy=0.6)
    verdict = judged_against(store_url, tmp_path, f"gate.min_improvement={limit}")
    found = rule(verdict, "min_improvement")
    assert found.value == pytest.approx(0.1)
    assert found.passed is passed
    assert "on the same pairs" in found.explanation
    assert verdict.published == {"content_hash": HASH, "run_id": "run-1", "problem": ""}


def test_other_held_out_pairs_are_said(store_url, tmp_path):
    publish(store_url, held_out="others")
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0")
    assert "other held-out pairs" in rule(verdict, "min_improvement").explanation


def test_pairs_that_nobody_noted_are_not_called_the_same(store_url, tmp_path):
    """As of two evaluations of format 1."""
    publish(store_url, held_out=None)
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0", held_out=None)
    assert "on pairs that nobody noted" in rule(verdict, "min_improvement").explanation


def test_what_was_measured_here_on_the_same_pairs_comes_first(store_url, tmp_path):
    publish(store_url, accuracy=0.1)
    here = {
        "url": f"{store_url}/policy/{HASH}",
        "improvement": {"reward_accuracy": figure(-0.02)},
    }
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0", published=here)
    assert rule(verdict, "min_improvement").value == -0.02
    assert not verdict.approved


def test_a_version_of_the_first_format_names_no_run(store_url, tmp_path):
    publish(store_url, run_id="")
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0")
    assert rule(verdict, "min_improvement").value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("policy/latest.json", b"{"),
        ("policy/latest.json", b'{"format_version": 1, "content_hash": "../.."}'),
        ("policy/latest.json", b"[]"),
        (f"policy/{HASH}/manifest.json", b"nonsense"),
        (f"policy/{HASH}/manifest.json", None),
        ("runs/run-1/manifest.json", b"{}"),
        ("runs/run-1/manifest.json", None),
        ("runs/run-1/manifest.json", b'{"evaluation": {"after": {}}}'),
    ],
)
def test_a_published_version_that_cannot_be_read_fails_its_rule_alone(
    store_url, tmp_path, key, text
):
    store = publish(store_url)
    store.delete(key)
    if text is not None:
        store.write(key, text)
    verdict = judged_against(store_url, tmp_path, "gate.min_improvement=0")
    found = rule(verdict, "min_improvement")
    assert not found.passed
    assert found.value is None
    assert "cannot be compared with" in found.explanation
    assert not verdict.approved
    assert (tmp_path / "v/verdict.json").is_file()
    assert judged_against(store_url, tmp_path).approved


def test_without_a_store_the_rule_says_so(tmp_path):
    verdict = gate(tmp_path / "v", evaluation(tmp_path / "e"), "gate.min_improvement=0")
    assert "publish.store is not set" in rule(verdict, "min_improvement").explanation


def test_the_published_model_again_passes_as_unchanged(store_url, tmp_path):
    files = {"model.safetensors": "w", "a.json": "a", "README.md": "card"}
    publish(store_url, accuracy=0.7, files=files)
    settings = ["gate.min_improvement=0.5", "gate.min_reward_accuracy=0.9", "gate.force=true"]
    verdict = judged_against(store_url, tmp_path, *settings)
    assert (verdict.approved, verdict.unchanged, verdict.forced) == (True, True, False)
    assert not any(found.passed for found in verdict.rules)
    assert "Unchanged." in (tmp_path / "v/report.html").read_text(encoding="utf-8")


def test_a_version_made_of_the_same_policy_is_unchanged(store_url, tmp_path):
    publish(store_url, policy="policy")
    assert judged_against(store_url, tmp_path, "gate.min_reward_accuracy=0.9").unchanged


def test_a_run_that_was_used_again_says_nothing_of_the_version(store_url, tmp_path):
    """The store has the version of one policy, and its run the figures of the one judged here."""
    store = publish(store_url, accuracy=0.1, policy="policy")
    key = f"policy/{HASH}/manifest.json"
    version = json.loads(store.read(key))
    store.write(key, json.dumps({**version, "policy": "other"}).encode())
    run = json.loads(store.read("runs/run-1/manifest.json"))
    run["evaluation"]["policy"] = {"content_hash": "policy"}
    store.write("runs/run-1/manifest.json", json.dumps(run).encode())
    settings = ["gate.min_improvement=0.5", "gate.min_reward_accuracy=0.99"]
    verdict = judged_against(store_url, tmp_path, *settings)
    assert (verdict.approved, verdict.unchanged) == (False, False)
    assert "used again for another policy" in rule(verdict, "min_improvement").explanation
    url = f"{store_url}/policy/{HASH}"
    here = {"url": url, "improvement": {"reward_accuracy": figure(0.6)}}
    verdict = judged_against(store_url, tmp_path, *settings, published=here)
    assert rule(verdict, "min_improvement").passed
    # and the version's own policy is known all the same
    store.write(key, json.dumps({**version, "policy": "policy"}).encode())
    run["evaluation"]["policy"] = {"content_hash": "other"}
    store.write("runs/run-1/manifest.json", json.dumps(run).encode())
    assert judged_against(store_url, tmp_path, *settings).unchanged


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": "w", "a.json": "other"},
        {"model.safetensors": "other", "a.json": "a"},
        {"model.safetensors": "w", "more.safetensors": "x", "a.json": "a"},
        {"a.json": "a"},
    ],
)
def test_one_other_file_is_a_change(store_url, tmp_path, files):
    publish(store_url, files=files)
    assert not judged_against(store_url, tmp_path).unchanged


@pytest.mark.minio
def test_a_server_that_is_down_fails_the_rule_and_nothing_else(
    minio_environment, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("S3_ENDPOINT", "MINIO_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    verdict = judged_against("s3://models/team", tmp_path, "gate.min_improvement=0")
    assert not rule(verdict, "min_improvement").passed
    assert verdict.published["problem"]
