import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.config.schema import RunConfig
from dpo.data.rules import tokenizer_fingerprint
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits, load_tokenizer, tokenize_pair
from dpo.errors import DataError, ModelError
from dpo.storage.base_model import local_tokenizer

GOLDEN = Path(os.environ.get("DPO_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
CASES = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(GOLDEN / "model")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden_ids_and_labels(number: int, tokenizer: Any) -> None:
    case = CASES[number]
    limits = Limits(case["max_length"], case["max_prompt_length"], case["truncation_mode"])
    texts = [case["chosen"], case["rejected"]]
    example = tokenize_pair(case["prompt"], texts, tokenizer, limits)
    prompt = example.prompt_T.tolist()
    assert prompt == case["prompt_input_ids"]
    for name, response in zip(("chosen", "rejected"), example.responses, strict=True):
        assert [*prompt, *response.tolist()] == case[f"{name}_input_ids"]
        assert [-100] * len(prompt) + response.tolist() == case[f"{name}_labels"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden_ids_with_the_light_tokenizer(number: int) -> None:
    case = CASES[number]
    limits = Limits(case["max_length"], case["max_prompt_length"], case["truncation_mode"])
    light = load_text_tokenizer(GOLDEN / "model")
    example = tokenize_pair(case["prompt"], [case["chosen"], case["rejected"]], light, limits)
    assert example.prompt_T.tolist() == case["prompt_input_ids"]


def ids(words: str) -> list[int]:
    return ["abcdefghijklmnop".index(word) + 2 for word in words]


def test_keeps_everything_that_fits(words: Any) -> None:
    example = tokenize_pair("a b c", ["d", "e f"], words, Limits(6, 2, "keep_end"))
    assert example.prompt_T.tolist() == ids("abc")
    assert [r.tolist() for r in example.responses] == [[*ids("d"), 0], [*ids("ef"), 0]]
    assert example.n_tokens == 3 + 2 + 3
    assert example.prompt_T.dtype == np.int32
    assert not example.prompt_is_cut
    assert not example.a_response_is_cut


@pytest.mark.parametrize(("mode", "kept"), [("keep_end", "bc"), ("keep_start", "ab")])
def test_cuts_the_prompt_first(words: Any, mode: Any, kept: str) -> None:
    # 3 + (2 + end) = 6 tokens > 5: the prompt goes down to 2, and 2 + 3 = 5 fits
    example = tokenize_pair("a b c", ["d", "e f"], words, Limits(5, 2, mode))
    assert example.prompt_T.tolist() == ids(kept)
    assert example.responses[1].tolist() == [*ids("ef"), 0]
    assert example.prompt_is_cut
    assert not example.a_response_is_cut


def test_cuts_the_responses_to_what_is_left(words: Any) -> None:
    # 2 + 5 > 5 even after the cut of the prompt: the responses keep 5 - 2 = 3 tokens, without end
    example = tokenize_pair("a b c", ["d", "e f g h"], words, Limits(5, 2, "keep_end"))
    assert [r.tolist() for r in example.responses] == [[*ids("d"), 0], ids("efg")]
    assert example.prompt_is_cut
    assert example.a_response_is_cut


def test_the_longer_response_decides_for_both(words: Any) -> None:
    # alone, the short response would leave the prompt whole
    example = tokenize_pair("a b c", ["d", "e f g"], words, Limits(6, 2, "keep_end"))
    assert example.prompt_T.tolist() == ids("bc")


def test_end_of_sequence_inside_a_text_is_an_error(words: Any) -> None:
    limits = Limits(20, 10, "keep_end")
    for prompt, response in (("a <end> b", "c"), ("a", "b <end> c")):
        with pytest.raises(DataError, match=r"'<end>' stands inside a text(.|\n)*pair 17"):
            tokenize_pair(prompt, [response], words, limits, pair_id="17")


def test_a_chat_template_may_put_it_into_the_prompt(words: Any) -> None:
    limits = Limits(20, 10, "keep_end")
    example = tokenize_pair("a <end> b", ["c"], words, limits, prompt_format="chat")
    assert example.prompt_T.tolist() == [2, 0, 3]
    with pytest.raises(DataError):
        tokenize_pair("a", ["b <end>"], words, limits, prompt_format="chat")


def test_the_hash_follows_the_ids(words: Any) -> None:
    def hash_of(prompt: str, response: str, length: int = 20) -> str:
        example = tokenize_pair(prompt, [response], words, Limits(length, 2, "keep_end"))
        return example.tokens_hash()

    assert hash_of("a b", "c") == hash_of("a  b", "c")
    assert len({hash_of("a b", "c"), hash_of("a", "b c"), hash_of("a b c", "d", 4)}) == 3


def test_no_tokenizer_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_text_tokenizer(tmp_path)


def test_a_tokenizer_that_needs_sentencepiece_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers, without that package, asks for tiktoken, which cannot read such a file."""
    # one piece "<unk>" of the kind UNKNOWN, as protobuf writes it
    piece = b"\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + bytes([len(piece)]) + piece)
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for load in (load_tokenizer, load_text_tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer\.model alone.*sentencepiece") as caught:
            load(tmp_path)
        assert "tokenizer.json" in caught.value.fix
    assert capfd.readouterr().err == ""


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    place = builtin("builtin:tiny")
    assert place is not None
    (tmp_path / "tokenizer.json").write_bytes((place / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_text_tokenizer(tmp_path)


def test_of_a_model_on_the_hub_its_kind_is_fetched_with_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt2-large names no end mark: it follows from what config.json says."""
    asked: list[str] = []

    def download(_: str, *, allow_patterns: list[str], **_options: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_tokenizer(ModelConfig(name_or_path="gpt2-large")) == tmp_path
    assert {"config.json", "tokenizer*"} <= set(asked)


def test_the_tokenizers_fingerprint_follows_its_files_alone(tmp_path: Path) -> None:
    for path in (GOLDEN / "model").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = RunConfig(model=ModelConfig(name_or_path=str(tmp_path)))
    before = tokenizer_fingerprint(config)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert tokenizer_fingerprint(config) == before
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert tokenizer_fingerprint(config) != before


def test_the_tokenizers_fingerprint_follows_the_models_kind(tmp_path: Path) -> None:
    """It names the end mark where the tokenizer's own files do not."""
    for path in (GOLDEN / "model").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = RunConfig(model=ModelConfig(name_or_path=str(tmp_path)))
    found = []
    for kind in ({"model_type": "gpt2"}, {"model_type": "qwen2"}, {"tokenizer_class": "X"}):
        for layers in (1, 2):
            (tmp_path / "config.json").write_text(json.dumps({**kind, "num_hidden_layers": layers}))
            found.append(tokenizer_fingerprint(config))
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no JSON"):
        tokenizer_fingerprint(config)


def test_a_configuration_that_names_no_type_is_not_taken_for_the_tokenizer(tmp_path: Path) -> None:
    """The advice was to set another tokenizer, which does not help."""
    shutil.copytree(builtin("builtin:tiny"), tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.chmod(0o644)
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("dtype", None)
    file.write_text(json.dumps({**values, "torch_dtype": "float99"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"configuration cannot be read: .*float99") as error:
        load_tokenizer(tmp_path / "model")
    assert error.value.where == str(file)
    # and what is wrong with a tokenizer is said of it
    file.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "model/tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "model")


def test_a_prompt_without_a_token_is_refused() -> None:
    """A tokenizer without bytes and without a token for the unknown drops what it does not know.

    The first token of a response was then predicted from the last one of its row, or of the example
    before it.
    """
    bpe = models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="</s>")
    limits = Limits(8, 4, "keep_end")
    assert tokenize_pair("aé", ["b", "é"], tokenizer, limits).prompt_T.tolist() == [0]
    with pytest.raises(DataError, match="no token for the prompt") as caught:
        tokenize_pair("é", ["a", "b"], tokenizer, limits, pair_id="one")
    assert caught.value.where == "pair one"
