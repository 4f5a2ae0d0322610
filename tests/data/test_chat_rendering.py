"""Templates and special tokens beside transformers, whose results ingest must have without it."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dpo.data.special_tokens import CLASS_TOKENS, CLASSES
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import load_tokenizer
from dpo.errors import ModelError

END = "<|endoftext|>"
MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
    {"role": "user", "content": "One\u00e9? "},
    {"role": "assistant", "content": '"Two" </s>'},
    {"role": "user", "content": "Three?"},
]
LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}" + LOOP,
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2, sort_keys=true) }}"
    "{{ messages[0].content | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "tools": "{% if tools is not none %}[TOOLS]{{ tools }}{% endif %}"
    "{% if documents is defined and documents is not none %}[DOCS]{% endif %}" + LOOP,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{%- generation %}{% set x = 1 %}{{ m.content }}\n  {% endgeneration -%}\n"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ x is defined }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1, self='x') %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ ns.last }}{{ ns.self }}{{ messages[:ns.last] | length }}",
    "strips": "  {% for m in messages %}\n    {%- if loop.first %}\nfirst\n    {% endif %}\n"
    "    {{- m.content | trim -}}  \n  {# a comment #}\n  {% endfor %}\n"
    "{% if add_generation_prompt %}\n<assistant>\n{% endif %}\n",
    "macros": "{% macro turn(m) %}<{{ m.role | upper }}>{{ m.content.strip() }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ loop.cycle('a', 'b') }}{% endfor %}"
    "{{ dict(a=1).a }}{{ '%s' | format('x') }}{{ messages | map(attribute='role') | join(',') }}",
    "refusal": "{{ raise_exception('no system message') }}",
    "inner names": "{% set ns = namespace(__class__='x') %}{{ ns }}",
}


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    texts = [END, "<s>", "</s>", "<unk>", "<pad>", "<eos>", "a", "b"]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(texts[:6])
    return tokenizer


def folder_of(backend: Tokenizer, folder: Path, **files: Any) -> Path:
    """A tokenizer's folder: ``files`` by their names without an ending."""
    backend.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        if isinstance(values, str):
            (folder / f"{name}.jinja").write_text(values)
        else:
            (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def config(**values: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **values}


def both(folder: Path) -> tuple[Any, Any]:
    return load_text_tokenizer(folder), load_tokenizer(folder)


def rendered(tokenizer: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        )
    except Exception:
        return "refused"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_they_give_in_transformers(
    backend: Tokenizer, tmp_path: Path, name: str
) -> None:
    values = config(
        bos_token=None,
        unk_token={"__type": "AddedToken", "content": "<unk>"},
        chat_template=TEMPLATES[name],
    )
    ours, theirs = both(folder_of(backend, tmp_path, tokenizer_config=values))
    assert rendered(ours) == rendered(theirs)
    assert (rendered(ours) == "refused") == (name in ("refusal", "inner names"))


SEVERAL = [
    {"name": "tool_use", "template": "tools"},
    {"name": "default", "template": LOOP},
]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": config(chat_template=SEVERAL)},
        {"tokenizer_config": config(chat_template="x"), "chat_template": LOOP},
        {"tokenizer_config": config(chat_template=SEVERAL[:1]), "chat_template": LOOP},
    ],
)
def test_of_several_templates_the_default_one(
    backend: Tokenizer, tmp_path: Path, files: dict[str, Any]
) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    if "chat_template" in files:
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    ours, theirs = both(folder_of(backend, tmp_path, **files))
    assert rendered(ours) == rendered(theirs)
    assert rendered(ours).startswith("<system>Be <b>brief")


GPT2 = {"model_type": "gpt2"}


@pytest.mark.parametrize(
    "files",
    [
        # gpt2-large and gpt2-xl on the hub
        {"tokenizer_config": {"model_max_length": 1024}, "config": GPT2},
        {"tokenizer_config": {}, "config": {"model_type": "qwen2"}},
        {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}, "config": GPT2},
        {"tokenizer_config": config(bos_token="a", image_token="b"), "config": GPT2},
        {
            "tokenizer_config": config(tokenizer_class="GPT2Tokenizer", bos_token=None),
            "special_tokens_map": {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
        },
        {
            "tokenizer_config": config(added_tokens_decoder={}),
            "special_tokens_map": {"eos_token": "</s>", "pad_token": "<pad>"},
        },
        {
            "tokenizer_config": config(add_bos_token=True, extra_special_tokens={"b_token": "b"}),
            "chat_template": "{{ b_token }}{{ add_bos_token }}",
        },
    ],
)
def test_special_tokens_are_those_of_transformers(
    backend: Tokenizer, tmp_path: Path, files: dict[str, Any]
) -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ image_token }}"
    ours, theirs = both(folder_of(backend, tmp_path, **{"chat_template": template, **files}))
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert rendered(ours) == rendered(theirs)


def test_tokens_of_classes_are_those_of_transformers() -> None:
    from transformers.models.auto import tokenization_auto as auto

    for name, tokens in CLASS_TOKENS.items():
        parameters = inspect.signature(auto.tokenizer_class_from_name(name).__init__).parameters
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            default = parameters[key].default if key in parameters else None
            assert default == tokens.get(key), (name, key)
    for kind, name in CLASSES.items():
        assert auto.TOKENIZER_MAPPING_NAMES[kind] == name


LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}"
)
CLOCK = "{{ strftime_now('%Y-%m-%d %H:%M') }}"


@pytest.mark.parametrize("with_transformers", [False, True])
def test_the_date_in_a_template_is_always_the_same(
    backend: Tokenizer, tmp_path: Path, with_transformers: bool
) -> None:
    """Else ids of pairs would change with the day on which they are made."""
    values = {"tokenizer_class": "GPT2Tokenizer"}
    folder_of(backend, tmp_path, tokenizer_config=values, chat_template=LLAMA)
    if with_transformers:
        backend.model.save(str(tmp_path))
        (tmp_path / "tokenizer.json").unlink()
    tokenizer = load_text_tokenizer(tmp_path)
    assert rendered(tokenizer) == "Today Date: 26 Jul 2024"
    tokenizer.chat_template = CLOCK
    assert rendered(tokenizer) == "2024-07-26 00:00"
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]


def test_a_token_that_is_stated_as_none_or_unknown_is_none(
    backend: Tokenizer, tmp_path: Path
) -> None:
    for values, kind in (({"eos_token": None}, GPT2), ({}, {"model_type": "cohere"})):
        folder_of(backend, tmp_path, tokenizer_config=values, config=kind)
        with pytest.raises(ModelError, match="no end-of-sequence token"):
            load_text_tokenizer(tmp_path)
