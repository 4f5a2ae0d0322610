"""The model card: what it says, and what its check refuses."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpo.config.places import builtin
from dpo.errors import ArtifactError
from dpo.publish import card
from dpo.storage.manifest import read_manifest, write_manifest
from tests.publish.checkpoints import checkpoint, published


@pytest.fixture
def text(tmp_path):
    policy = checkpoint(tmp_path / "policy")
    manifest = read_manifest(policy)
    return card.model_card(policy, manifest, "policy", "HuggingFaceTB/SmolLM2-135M-Instruct", "")


def test_the_card_says_what_a_reader_needs(text):
    card.check_card(text, "here")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0"
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert ModelCard(text).data.to_dict()["library_name"] == "transformers"
    for words in ("## Data", "## Licence", "## Intended use", "manifest.json", "runs/"):
        assert words in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("---\n\n#", "\n\n#", "no metadata block"),
        ('license: "apache-2.0"\n', "", "no license"),
        ('license: "apache-2.0"', 'license: "acme"', "licence 'acme', which no hub knows"),
        ('license: "apache-2.0"', "license: other", "no license_name"),
        ("## Data", "## Pairs", "no section Data"),
        ("## Limits\n", "## Limits\nsee /home/me/run\n", "an absolute path"),
        ("## Limits\n", "## Limits\n![plot](x.png)\n", "an image"),
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"/models/mine"', "no id of a hub"),
        ("library_name:", ":\t{", "not YAML|no mapping"),
    ],
)
def test_a_card_that_lacks_something_is_refused(text, old, new, words):
    assert old in text
    with pytest.raises(ArtifactError, match=words):
        card.check_card(text.replace(old, new, 1), "here")


def test_a_base_model_of_ones_own_leaves_no_path_in_the_card(tmp_path):
    policy = checkpoint(tmp_path / "policy")
    manifest = read_manifest(policy)
    found = card.model_card(policy, manifest, "policy", str(tmp_path), "")
    card.check_card(found, "here")
    assert str(tmp_path) not in found
    assert "license_name" in found


def made_of(folder, base, *, before, fingerprint=None):
    """A policy whose own settings name ``gpt2``, of a chain of artifacts that began with ``base``.

    ``before``: the input by which each artifact names the one before it, the policy's first.
    ``fingerprint``: of the base model, where the first of them has noted it.
    """
    lineage, hashes = {}, ["a" * 64, "b" * 64, "c" * 64]
    for number, hash_ in enumerate(hashes[: len(before)]):
        first = number == len(before) - 1
        settings = {"model": {"name_or_path": base if first else "gpt2"}}
        parents = {} if first else {before[number + 1]: hashes[number + 1]}
        lineage[hash_] = {"step": "sft", "configuration": settings, "parents": parents}
        if first and fingerprint:
            lineage[hash_]["made_by"] = {"fingerprints": {"model": fingerprint}}
    checkpoint(folder)
    settings = {"model": {"name_or_path": "gpt2"}}
    (folder / "manifest.json").unlink()
    parents = {before[0]: hashes[0]} if before else {}
    write_manifest(folder, "preference", settings=settings, inputs=parents, lineage=lineage)
    return folder


@pytest.mark.parametrize(("n_epochs", "told"), [(1, True), (0, False)])
def test_the_card_tells_of_sft_only_where_there_was_some(tmp_path, n_epochs, told):
    settings = {"model": {"name_or_path": "org/base"}, "n_epochs": n_epochs}
    policy = checkpoint(tmp_path / "policy")
    (policy / "manifest.json").unlink()
    lineage = {"a" * 64: {"step": "sft", "configuration": settings, "parents": {}}}
    write_manifest(policy, "preference", settings={}, inputs={"base": "a" * 64}, lineage=lineage)
    found = card.model_card(policy, read_manifest(policy), "policy", "org/base", "")
    assert ("supervised fine-tuning" in found) is told


@pytest.mark.parametrize("base", ["org/began-with", "began-with"])
@pytest.mark.parametrize("before", [["base"], ["base", "policy", "base"]])
def test_the_card_names_the_base_that_the_weights_began_with(tmp_path, before, base):
    policy = made_of(tmp_path / "policy", base, before=before)
    published(policy, tmp_path / "out", "model=smollm2")
    metadata = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert metadata["base_model"] == base
    assert metadata["license"] == "other"


@pytest.mark.parametrize(
    ("name", "fingerprint", "shown"),
    [
        ("gpt2", f"gpt2@{'1' * 40}", True),
        ("EleutherAI/pythia-70m", "f" * 64, False),
        # of the hub, although a Python package holds it
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "f" * 64, True),
    ],
)
def test_whether_a_base_is_of_the_hub_does_not_depend_on_the_working_folder(
    tmp_path, monkeypatch, name, fingerprint, shown
):
    policy = made_of(tmp_path / "policy", name, before=["base"], fingerprint=fingerprint)
    (tmp_path / "with" / name).mkdir(parents=True)
    hashes = set()
    for place in ("with", "."):
        monkeypatch.chdir(tmp_path / place)
        hashes.add(published(policy, tmp_path / f"out-{len(hashes)}"))
        text = (tmp_path / "out-0/README.md").read_text()
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata.get("base_model") == (name if shown else None)
        # nor is the licence of a hub's model that of a folder with its name
        assert (metadata["license"] == "other") is not shown
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "name", ["a..b", "base-", "a--b", "x.git", "a" * 97, "a/b/c", "x", "org/x.y"]
)
def test_ids_of_the_hub_are_those_that_it_takes(name):
    try:
        validate_repo_id(name)
        good = True
    except HFValidationError:
        good = False
    assert (card.shown_base(name) == name) is good


def test_the_card_names_no_base_where_the_lineage_does_not_reach_it(tmp_path):
    policy = made_of(tmp_path / "policy", "org/began-with", before=["base", "base"])
    manifest = json.loads((policy / "manifest.json").read_text())
    del manifest["lineage"]["b" * 64]
    (policy / "manifest.json").write_text(json.dumps(manifest))
    published(policy, tmp_path / "out", "model=smollm2")
    text = (tmp_path / "out/README.md").read_text()
    assert "base_model" not in text
    assert "Base model: a model of one's own" in text


def own_template(folder):
    shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


WRITES = "writes\ndialogues as `Human:` and `Assistant:`."
AS_IT_STANDS = "took each prompt as it stands in the data"
THROUGH = "The training data went through the\ntokenizer's chat template."
NOT_USED = "the training did not use it: its prompts were plain text"


@pytest.mark.parametrize(
    ("prompt_format", "fill", "words"),
    [
        ("raw", own_template, {NOT_USED}),
        ("chat", own_template, {THROUGH}),
        (None, own_template, set()),
        # one that has none gets the template of dialogues when it is published
        ("raw", None, {WRITES, AS_IT_STANDS}),
        ("chat", None, {WRITES, THROUGH}),
        (None, None, {WRITES}),
    ],
)
def test_the_card_says_whether_the_training_used_the_chat_template(
    tmp_path, prompt_format, fill, words
):
    data = {"datasets": ["hh"], "prompt_format": prompt_format} if prompt_format else None
    published(checkpoint(tmp_path / "policy", fill, data=data), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert {part for part in (WRITES, AS_IT_STANDS, THROUGH, NOT_USED) if part in text} == words
    assert ("The tokenizer has a chat template." in text) == (not words)


@pytest.mark.parametrize(
    ("name", "source", "ids", "shown"),
    [
        (
            "hh_sample",
            {},
            ["Anthropic/hh-rlhf"],
            "Anthropic/hh-rlhf, 1,900 of its pairs (lic",
        ),
        ("mine", {"hub": "org/set"}, ["org/set"], "- org/set (licence: as its card says)"),
        ("mine", {"path": "hf://org/set/part"}, ["org/set"], "- org/set (licence: as"),
        ("mine", {"path": "hf://datasets/org/set"}, ["org/set"], "- org/set (licence: as"),
        (
            "mine",
            {"path": "/home/me/x.jsonl", "hub": "org/set"},
            None,
            "- mine: pairs of one's",
        ),
        ("se", {}, None, "StackExchange preferences (licence: CC BY-SA 4.0)"),
        ("hh", {"hub": "Anthropic/hh-rlhf"}, ["Anthropic/hh-rlhf"], "- Anthropic/hh-rlhf (licence"),
        # a file of that name is somebody's own, and so is what replaces the set's place
        ("hh", {"path": "/home/me/hh.jsonl"}, None, "- hh: pairs of one's own (licence: its own"),
        (
            "hh",
            {"path": "x.jsonl", "hub": "Anthropic/hh-rlhf"},
            None,
            "- hh: pairs of one's own (licence: its owner's)",
        ),
        ("shp", {"loader": "mine:rows", "hub": "stanfordnlp/SHP"}, None, "- shp: pairs of one's"),
    ],
)
def test_data_sets_of_the_hub_are_named_as_such(tmp_path, name, source, ids, shown):
    data = {"datasets": [name], "sources": {name: source}}
    published(checkpoint(tmp_path / "policy", data=data), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]).get("datasets") == ids
    assert shown in text


@pytest.mark.parametrize(
    ("given", "base", "licence", "name"),
    [
        ("", "tiny", "apache-2.0", None),
        ("llama3.1", "tiny", "llama3.1", None),
        # as SPDX writes it
        ("MIT", "tiny", "mit", None),
        ("acme-1.0", "tiny", "other", "acme-1.0"),
        *(
            (given, "tiny", licence, None)
            for given, licence in (
                ("GPL-3.0-only", "gpl-3.0"),
                ("AGPL-3.0-only", "agpl-3.0"),
                ("ODbL-1.0", "odbl"),
                ("PDDL-1.0", "pddl"),
                ("ODC-By-1.0", "odc-by"),
                ("GFDL-1.3-only", "gfdl"),
            )
        ),
        # others than gpl-3.0 and mit
        ("gpl-3.0-or-later", "tiny", "other", "gpl-3.0-or-later"),
        ("mit-0", "tiny", "other", "mit-0"),
        ("other", "tiny", "other", "see-licence-of-base-model-and-data"),
        ("", "org/name", "other", "see-licence-of-base-model-and-data"),
    ],
)
def test_a_licence_that_no_hub_knows_is_named_beside_other(tmp_path, given, base, licence, name):
    policy = checkpoint(tmp_path / "policy")
    settings = [f"model={base}", *([f"publish.license={given}"] if given else [])]
    published(policy, tmp_path / "out", *settings)
    text = (tmp_path / "out/README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["license"], metadata.get("license_name")) == (licence, name)
    shown = name if given and given != "other" else licence
    told = "not stated here" if shown == "other" or given == "other" else f"`{shown or licence}`"
    assert f"Of the model: {told}." in text
