"""Any two models over the held-out pairs: of the hub, of another trainer, of one of our stages."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ArtifactError, ModelError
from dpo.evaluate.stage import run_evaluate
from dpo.storage.given_model import read_model
from dpo.storage.manifest import read_manifest
from dpo.train.reference import run_reference
from dpo.train.stage import run_train
from tests.train.conftest import SETTINGS, prepared

__all__ = ["prepared"]

SHORT = ["evaluation.n_samples=1", "evaluation.max_new_tokens=4", "evaluation.n_bootstrap=100"]


def evaluate(output, pairs, *, settings=(), **models):
    config = restrict(compose([*SETTINGS, *SHORT, *settings]).config, "evaluate")
    run_evaluate(config, output, pairs=pairs, **models)
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture
def theirs(tiny_model, tmp_path):
    """A plain Hugging Face folder, as the hub has it."""
    return shutil.copytree(tiny_model, tmp_path / "theirs")


def test_base_and_sft_are_measured_with_and_without_given_log_probs(
    prepared, theirs, tmp_path, capfd
):
    reference = restrict(compose([*SETTINGS, "n_examples=8"]).config, "reference")
    run_reference(reference, tmp_path / "ref", pairs=prepared.data, model=theirs)
    found = [
        evaluate(tmp_path / name, prepared.data, sft=theirs, policy=prepared.sft, **more)
        for name, more in (("made", {}), ("given", {"reference": tmp_path / "ref"}))
    ]
    assert found[0] == found[1]
    base, sft = read_model(theirs), read_manifest(prepared.sft)
    assert found[0]["models"]["sft"] == {
        "step": "model",
        "content_hash": base.content_hash,
        "folder": "theirs",
        "model_type": "gpt_neox",
        "dtype": "float32",
    }
    made = read_manifest(tmp_path / "made")
    assert made.inputs["policy"] == sft.content_hash
    assert made.lineage[base.content_hash]["step"] == "model"
    # SFT on the preferred answers makes them likelier, by a positive change
    assert found[0]["change"]["chosen_logp"]["value"] > 0
    report = (tmp_path / "made/report.md").read_text(encoding="utf-8")
    assert "calls the SFT model is a model that was made elsewhere (theirs" in report
    assert "the policy is an output of SFT" in report
    # the loss of SFT is none that rewards could be measured with
    assert "trained with" not in capfd.readouterr().err


def test_a_foreign_policy_is_measured_against_our_sft_model(prepared, theirs, tmp_path):
    found = evaluate(
        tmp_path / "e",
        prepared.data,
        sft=prepared.sft,
        policy=theirs,
        reference=prepared.reference,
    )
    assert found["policy"]["content_hash"] == read_model(theirs).content_hash
    assert found["change"]["chosen_logp"]["value"] < 0


def test_log_probs_of_another_model_are_refused(prepared, theirs, tmp_path):
    with pytest.raises(ArtifactError, match="are of another model") as caught:
        evaluate(
            tmp_path / "e",
            prepared.data,
            sft=theirs,
            policy=prepared.sft,
            reference=prepared.reference,
        )
    assert "leave them out" in caught.value.fix
    assert not (tmp_path / "e").exists()


def test_log_probs_name_their_model_also_where_it_is_the_base_model(prepared, theirs, tmp_path):
    config = compose([*SETTINGS, "n_examples=8", f"model.name_or_path={theirs}"]).config
    found = run_reference(restrict(config, "reference"), tmp_path / "ref", pairs=prepared.data)
    assert found.inputs["model"] == read_model(theirs).content_hash


def test_training_refuses_log_probs_of_another_model_before_it_loads_one(
    prepared, theirs, tmp_path
):
    config = restrict(compose([*SETTINGS, "n_examples=8"]).config, "preference")
    paths = {"pairs": prepared.data, "base": theirs}
    with pytest.raises(ArtifactError, match="are of another model"):
        run_train(config, tmp_path / "policy", **paths, reference=prepared.reference)
    run_train(config, tmp_path / "policy", **paths)
    manifest = read_manifest(tmp_path / "policy")
    assert manifest.inputs["base"] == read_model(theirs).content_hash


def test_models_that_read_texts_otherwise_are_not_compared(prepared, theirs, tmp_path):
    path = theirs / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vocab = values["model"]["vocab"]
    one, two = list(vocab)[300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match="sft and policy have different tokenizers"):
        evaluate(tmp_path / "e", prepared.data, sft=theirs, policy=prepared.sft)


def test_answers_that_end_otherwise_are_told_of(prepared, theirs, tmp_path):
    """A base model and its instruct form: equal tokens, another end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(str(theirs))
    policy = shutil.copytree(theirs, tmp_path / "instruct")
    other = tokenizer.convert_ids_to_tokens(1)
    tokenizer.eos_token = other
    tokenizer.save_pretrained(str(policy))
    found = evaluate(tmp_path / "e", prepared.data, sft=theirs, policy=policy)
    (told,) = [item["text"] for item in found["findings"] if item["kind"] == "ends"]
    assert other in told
