"""A tokenizer whose code lies beside it runs that code where it is allowed to, and nowhere else."""

import json

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.stage import run_ingest
from dpo.data.tokenize import load_tokenizer
from dpo.errors import ModelError
from dpo.storage.manifest import read_manifest

CODE = '''
from transformers import PreTrainedTokenizer


class LettersTokenizer(PreTrainedTokenizer):
    """A token a character."""

    def get_vocab(self):
        return {chr(n): n for n in range(256)}

    @property
    def vocab_size(self):
        return 256

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) if len(token) == 1 else 255

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, *_, **__):
        return ()
'''


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "letters"
    place.mkdir()
    (place / "tokenization_letters.py").write_text(CODE)
    values = {
        "auto_map": {"AutoTokenizer": ["tokenization_letters.LettersTokenizer", None]},
        "tokenizer_class": "LettersTokenizer",
        "eos_token": chr(3),
    }
    (place / "tokenizer_config.json").write_text(json.dumps(values))
    (place / "config.json").write_text('{"model_type": "gpt_neox"}')
    return place


def test_it_loads_where_it_is_allowed(folder):
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [97, 98]


def test_the_message_names_the_setting(folder):
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert "needs code that comes with it" in caught.value.found
    assert "model.trust_remote_code=true" in caught.value.fix


def test_ingest_runs_it_too(folder, tmp_path):
    rows = [
        {"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"datasets=[{tmp_path / 'rows.jsonl'}]", "test_fraction=0.4"]
    settings += ["model=tiny", f"model.name_or_path={folder}"]
    allowed = compose([*settings, "model.trust_remote_code=true"]).config
    run_ingest(restrict(allowed, "ingest"), tmp_path / "data")
    assert read_manifest(tmp_path / "data").details["metrics"]["pairs"] == 9
    with pytest.raises(ModelError, match="needs code that comes with it"):
        run_ingest(restrict(compose(settings).config, "ingest"), tmp_path / "other")
