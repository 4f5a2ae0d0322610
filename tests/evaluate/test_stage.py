"""The whole step on a small model: answers, divergence, parts, a published version, equal runs."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config.compose import compose
from dpo.config.stages import restrict, stage_json
from dpo.data.log_probs import PairLogProbs, read_log_probs
from dpo.data.stage import run_ingest
from dpo.errors import ConfigError, DataError, ModelError
from dpo.evaluate import inputs, measure
from dpo.evaluate.measure import Measurement
from dpo.evaluate.stage import run_evaluate
from dpo.modeling import budget, load
from dpo.modeling.budget import scoring_budget
from dpo.storage.manifest import read_manifest, write_manifest
from dpo.train.reference import run_reference
from dpo.train.stage import run_train

SETTINGS = [
    *("model=tiny", "max_length=64", "max_prompt_length=24", "do_first_eval=false"),
    *("do_last_eval=false", "n_eval_examples=null", "batch_size=8", "n_examples=32"),
    *("optimizer=AdamW", "lr=3e-3", "warmup_steps=1", "evaluation.max_new_tokens=8"),
    *("evaluation.n_kl_samples=6", "evaluation.n_samples=3", "evaluation.n_bootstrap=100"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data of two sources, an SFT model, its log-probabilities and a policy."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("one", "two"):
        rows = [
            {"prompt": f"Say {name} {i // 2}:", "chosen": f" yes {i}", "rejected": f" no no {i}"}
            for i in range(60)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    settings = [*SETTINGS, f"datasets=[{folder / 'one.jsonl'},{folder / 'two.jsonl'}]"]
    settings += ["test_fraction=0.4"]
    config, base = compose(settings).config, compose([*settings, "loss=sft"]).config
    run_ingest(restrict(config, "ingest"), folder / "data")
    run_train(restrict(base, "sft"), folder / "sft", pairs=folder / "data")
    run_reference(
        restrict(config, "reference"), folder / "ref", pairs=folder / "data", model=folder / "sft"
    )
    run_train(
        restrict(config, "preference"),
        folder / "policy",
        pairs=folder / "data",
        base=folder / "sft",
        reference=folder / "ref",
    )
    return folder


def evaluate(folder, output, *overrides, published=None, policy=None):
    config = compose([*SETTINGS, *overrides]).config
    run_evaluate(
        restrict(config, "evaluate"),
        output,
        pairs=folder / "data",
        sft=folder / "sft",
        policy=policy or folder / "policy",
        reference=folder / "ref",
        published=published,
    )
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "evaluation"
    return evaluate(trained, output, published=trained / "policy"), output


def test_pairs_of_another_division_may_have_been_trained_on(trained, tmp_path):
    """The same rows held out otherwise: prompts of the old training part are in the new test."""
    quick = ("evaluation.n_samples=0", "evaluation.n_kl_samples=0")
    config = compose([*SETTINGS, f"datasets=[{trained / 'one.jsonl'}]", "test_fraction=0.9"]).config
    run_ingest(restrict(config, "ingest"), tmp_path / "data")
    for name in ("sft", "policy"):
        (tmp_path / name).symlink_to(trained / name)
    run_evaluate(
        restrict(compose([*SETTINGS, *quick]).config, "evaluate"),
        tmp_path / "other",
        pairs=tmp_path / "data",
        sft=tmp_path / "sft",
        policy=tmp_path / "policy",
    )
    evaluate(trained, tmp_path / "own", *quick)
    shown = {}
    for name in ("other", "own"):
        found = json.loads((tmp_path / name / "evaluation.json").read_text())["findings"]
        shown[name] = [(f["tone"], f["text"]) for f in found if f["kind"] == "other_pairs"]
        html = (tmp_path / name / "report.html").read_text()
        assert ("that neither model was trained on" in html) == (name == "own")
    assert [tone for tone, _ in shown["other"]] == ["warning", "note"]
    hash_ = read_manifest(trained / "data").content_hash[:12]
    assert all(hash_ in text and "may have seen them" in text for _, text in shown["other"])
    assert shown["own"] == []


def test_models_are_loaded_with_the_kernels_of_training(trained, tmp_path, monkeypatch):
    chosen = []
    apply = load.apply_kernels

    def noted(model, kernels, **others):
        chosen.append(kernels)
        apply(model, kernels, **others)

    monkeypatch.setattr(load, "apply_kernels", noted)
    evaluate(trained, tmp_path / "plain", "model.kernels=plain")
    assert chosen
    assert set(chosen) == {"plain"}


def test_two_processes_measure_what_one_measures(trained, tmp_path, monkeypatch):
    """Sampled answers: each prompt has a stream of its own, whoever answers it.

    Batches of one, so processes exchange what they have after 8 prompts: 13 take two exchanges,
    and in the second one process has fewer.
    """
    settings = ["trainer=FSDPTrainer", "evaluation.temperature=0.8", "evaluation.n_samples=13"]
    settings += ["evaluation.batch_size=1"]
    found, samples = {}, {}
    for processes in ("1", "2"):
        monkeypatch.setenv("DPO_PROCESSES", processes)
        output = tmp_path / processes
        found[processes] = evaluate(trained, output, *settings, published=trained / "policy")
        samples[processes] = json.loads((output / "samples.json").read_text(encoding="utf-8"))
    assert len(samples["1"]) == 13
    assert_alike(found["2"], found["1"])
    assert_alike(samples["2"], samples["1"])
    manifests = [read_manifest(tmp_path / processes) for processes in found]
    assert manifests[0].settings == manifests[1].settings
    assert manifests[0].inputs == manifests[1].inputs


def test_models_that_no_device_can_hold_are_measured_in_shards(trained, tmp_path):
    """Reference pass and evaluation, each over two processes that hold every model together."""
    config = compose([*SETTINGS, "evaluation.temperature=0.8"]).config
    data, reference = trained / "data", tmp_path / "ref"
    paths = {"pairs": data, "sft": trained / "sft", "policy": trained / "policy"}
    paths |= {"reference": reference, "published": trained / "policy"}
    jobs = [
        ("reference", {"output": reference, "pairs": data, "model": trained / "sft"}),
        ("evaluate", {"output": tmp_path / "evaluation", **paths}),
    ]
    file = tmp_path / "jobs.json"
    told = [
        {
            "stage": stage,
            "settings": stage_json(config, stage),
            "paths": {name: str(path) for name, path in paths.items()},
        }
        for stage, paths in jobs
    ]
    file.write_text(json.dumps(told))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.evaluate.in_shards", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = read_log_probs(trained / "ref")
    parts = read_log_probs(reference)
    assert list(parts) == list(whole)
    for pair_id, expected in whole.items():
        np.testing.assert_allclose(parts[pair_id].chosen, expected.chosen, atol=1e-5, rtol=0)
    expected = evaluate(
        trained, tmp_path / "one", "evaluation.temperature=0.8", published=trained / "policy"
    )
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert_alike(found, expected)
    assert_alike(
        *(
            json.loads((tmp_path / name / "samples.json").read_text(encoding="utf-8"))
            for name in ("evaluation", "one")
        )
    )


def assert_alike(seen, expected):
    """The same values, numbers within float32's rounding of sums in another order."""
    assert type(seen) is type(expected)
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys()
        for key in expected:
            assert_alike(seen[key], expected[key])
    elif isinstance(expected, list):
        assert len(seen) == len(expected)
        for one, other in zip(seen, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert seen == expected


def test_every_figure_is_there_and_finite(whole):
    found, output = whole
    assert {row["slice"] for row in found["slices"]["source"]} == {"one", "two"}
    assert found["n_prompts"] < found["n_pairs"]
    assert found["kl"]["per_answer"]["value"] > 0
    assert found["answers"]["policy"]["tokens"]["value"] <= 8
    text = (output / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text


def test_samples_take_turns_between_the_sources(whole):
    _, output = whole
    samples = json.loads((output / "samples.json").read_text(encoding="utf-8"))
    assert [sample["dataset"] for sample in samples] == ["one", "two", "one"]
    assert all(isinstance(sample["reward_change"], float) for sample in samples)


def test_a_policy_that_is_measured_with_another_loss_is_called_out(trained, whole, tmp_path, capfd):
    settings = ("loss.beta=0.5", "evaluation.n_samples=0", "evaluation.n_kl_samples=0")
    found = evaluate(trained, tmp_path / "out", *settings)
    said = "trained with loss=dpo loss.beta=0.1"
    assert [said in item["text"] for item in found["findings"]].count(True) == 1
    assert f"the policy was {said}: give evaluate the same settings" in capfd.readouterr().err
    assert "other_loss" not in {item["kind"] for item in whole[0]["findings"]}


def test_a_published_version_that_is_the_policy_is_as_good(whole):
    found, output = whole
    improvement = found["published"]["improvement"]
    assert improvement["reward_accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for sample in json.loads((output / "samples.json").read_text(encoding="utf-8")):
        assert sample["published"] == sample["policy"]


@pytest.mark.parametrize("base", ["this SFT model", "another"])
def test_a_published_adapter_is_opened_on_the_sft_model_it_was_trained_on(
    trained, tmp_path, base, monkeypatch
):
    """As ``dpo publish publish.lora=adapter`` writes it: the base is a content hash, no path."""
    config = compose([*SETTINGS, "lora.enabled=true", "lora.save=adapter", "n_examples=8"]).config
    published = tmp_path / "published"
    paths = {"pairs": trained / "data", "base": trained / "sft", "reference": trained / "ref"}
    run_train(restrict(config, "preference"), published, **paths)
    path = published / "adapter_config.json"
    values = json.loads(path.read_text())
    own = read_manifest(trained / "sft").content_hash if base == "this SFT model" else "0" * 64
    path.write_text(json.dumps({**values, "base_model_name_or_path": f"sft-checkpoint-{own}"}))
    (published / "manifest.json").unlink()
    if base == "another":
        monkeypatch.setattr(Measurement, "run", pytest.fail)
        with pytest.raises(ConfigError, match="an adapter of another SFT model"):
            evaluate(trained, tmp_path / "out", published=published)
        return
    found = evaluate(trained, tmp_path / "out", published=published)
    assert found["published"]["reward_margin"]["value"] != 0


def test_on_a_gpu_it_chooses_its_rows_without_settings_of_training(trained, tmp_path, monkeypatch):
    """It reads none: the step ended in an AttributeError on every GPU."""
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(budget, "compute_dtype", lambda *_: torch.bfloat16)
    chosen = set()

    def on_gpu(config, model, device):
        tokens = scoring_budget(config, model, "cuda")
        chosen.add(tokens)
        return tokens

    monkeypatch.setattr(measure, "scoring_budget", on_gpu)
    evaluate(trained, tmp_path / "out")
    assert chosen == {16384}


@pytest.mark.parametrize("same", [True, False])
def test_log_probabilities_from_a_machine_with_other_products_are_told(
    same, trained, tmp_path, capfd
):
    scored = read_manifest(trained / "ref").details["compute_dtype"]
    (other,) = {"float32", "bfloat16"} - {scored}
    evaluate(trained, tmp_path / "out", f"model.compute_dtype={scored if same else other}")
    said = f"come from products in {scored}, the policy's will from {other}"
    assert (said in capfd.readouterr().err) is not same


def test_an_adapter_is_opened_where_its_base_lies_elsewhere_than_in_training(trained, tmp_path):
    """Pods of a job over several nodes read the SFT model into folders of their own."""
    config = compose([*SETTINGS, "lora.enabled=true", "lora.save=adapter", "n_examples=8"]).config
    elsewhere, policy = tmp_path / "pod" / "sft", tmp_path / "policy"
    shutil.copytree(trained / "sft", elsewhere)
    paths = {"pairs": trained / "data", "base": elsewhere, "reference": trained / "ref"}
    run_train(restrict(config, "preference"), policy, **paths)
    found = [evaluate(trained, tmp_path / "before", policy=policy)]
    shutil.rmtree(elsewhere)
    found += [evaluate(trained, tmp_path / "after", policy=policy)]
    assert found[0]["after"] == found[1]["after"]


def test_the_log_probabilities_before_are_those_of_the_sft_model(trained, whole, tmp_path):
    """With the SFT model in the policy's place nothing changes, and nothing diverges."""
    config = compose(SETTINGS).config
    copy = tmp_path / "same"
    shutil.copytree(trained / "sft", copy)
    (copy / "manifest.json").unlink()
    write_manifest(copy, "preference", inputs=read_manifest(trained / "sft").inputs)
    run_evaluate(
        restrict(config, "evaluate"),
        tmp_path / "evaluation",
        pairs=trained / "data",
        sft=trained / "sft",
        policy=copy,
        reference=trained / "ref",
    )
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    assert found["change"]["chosen_logp"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["change"]["perplexity_growth"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["kl"]["per_answer"]["value"] == 0
    assert found["answers"]["length_growth"]["value"] == 1


@pytest.mark.parametrize("n_samples", [2, 0])
def test_a_nucleus_without_sampling_is_said_to_count_for_nothing(
    trained, tmp_path, capfd, n_samples
):
    settings = ("evaluation.top_p=0.9", f"evaluation.n_samples={n_samples}")
    evaluate(trained, tmp_path / "e", *settings, "evaluation.n_kl_samples=0")
    said = "evaluation.top_p=0.9 counts for nothing" in "".join(capfd.readouterr())
    # without answers none are greedy
    assert said is bool(n_samples)


def test_equal_runs_write_equal_bytes(trained, tmp_path):
    for name in ("a", "b"):
        evaluate(trained, tmp_path / name, "evaluation.temperature=0.8")
    hashes = [
        json.loads((tmp_path / name / "manifest.json").read_text())["content_hash"]
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]


def test_the_parts_add_up_to_all(trained, whole, tmp_path):
    found = [
        evaluate(trained, tmp_path / part, f"evaluation.part={part}", "evaluation.n_samples=0")
        for part in ("validation", "test")
    ]
    assert [part["part"] for part in found] == ["validation", "test"]
    assert sum(part["n_pairs"] for part in found) == whole[0]["n_pairs"]
    assert len({part["held_out"] for part in found}) == 2


@pytest.mark.parametrize("broken", ["policy", "SFT model"])
def test_a_model_of_nan_makes_no_figures(trained, tmp_path, broken, monkeypatch):
    """Without answers nothing else would notice."""
    settings = ("evaluation.n_samples=0", "evaluation.n_kl_samples=0")
    lost = np.array([np.nan], np.float32)
    if broken == "policy":
        monkeypatch.setattr(
            Measurement, "_score", lambda self, _, examples, *__: [(lost, lost)] * len(examples)
        )
    else:
        monkeypatch.setattr(
            inputs,
            "select_log_probs",
            lambda _, examples, *__: [PairLogProbs("test", "", lost, lost)] * len(examples),
        )
    with pytest.raises(ModelError, match=rf"the {broken} gives (\d+) of \1 held-out pairs"):
        evaluate(trained, tmp_path / "e", *settings)
    assert not (tmp_path / "e").exists()


def test_an_empty_part_is_said(trained, tmp_path):
    with pytest.raises(DataError, match="test part"):
        evaluate(
            trained,
            tmp_path / "e",
            *("evaluation.part=test", "evaluation.validation_fraction=0.999999"),
        )


def test_a_published_version_of_other_tokens_gives_its_answers_alone(trained, tmp_path):
    """It knows fewer tokens than the texts have in the policy's numbers."""
    published = shutil.copytree(trained / "policy", tmp_path / "published")
    (published / "manifest.json").unlink()
    path, n_tokens = published / "tokenizer.json", 300
    values = json.loads(path.read_text(encoding="utf-8"))
    model = values["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < n_tokens}
    values["model"] |= {"vocab": kept, "merges": []}
    path.write_text(json.dumps(values), encoding="utf-8")
    path = published / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    weights = load_file(published / "model.safetensors")
    few = {
        name: value[:n_tokens].clone() if len(value) == config["vocab_size"] else value
        for name, value in weights.items()
    }
    save_file(few, published / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps({**config, "vocab_size": n_tokens}), encoding="utf-8")
    evaluate(trained, tmp_path / "out", published=published)
    samples = json.loads((tmp_path / "out/samples.json").read_text(encoding="utf-8"))
    assert all("published" in sample for sample in samples)
