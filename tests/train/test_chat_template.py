"""The template that made the prompts goes with the model, through SFT and preference training."""

from pathlib import Path

from transformers import AutoTokenizer

from dpo.config.compose import compose
from dpo.config.places import chat_templates
from dpo.config.stages import restrict
from dpo.data.parquet import read_pairs
from dpo.data.stage import run_ingest
from dpo.train.stage import run_train
from tests.train.conftest import SETTINGS

_WORDS = [*SETTINGS, "n_examples=8", "do_first_eval=false", "do_last_eval=false"]


def _rendered(folder: Path, content: str) -> str:
    """The prompt that a user of the model gets."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    turns = [{"role": "user", "content": content}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def test_the_saved_tokenizer_has_the_template_of_the_data(tmp_path: Path, tiny_model: Path) -> None:
    """The tiny model has no template of its own."""
    assert AutoTokenizer.from_pretrained(str(tiny_model)).chat_template is None
    chat = ["prompt_format=chat", "chat_template=zephyr"]
    data, sft, policy = (tmp_path / name for name in ("data", "sft", "policy"))
    run_ingest(restrict(compose([*_WORDS, *chat]).config, "ingest"), data)
    run_train(restrict(compose([*_WORDS, "loss=sft"]).config, "sft"), sft, pairs=data)
    adapter = restrict(compose([*_WORDS, "lora.enabled=true"]).config, "preference")
    run_train(adapter, policy, pairs=data, base=sft)
    template = chat_templates()["zephyr"].read_text(encoding="utf-8")
    for folder in (sft, policy):
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == template
        assert _rendered(folder, "Hi?") == "<|user|>\nHi?<|endoftext|>\n<|assistant|>\n"
    # the same form as that of the prompts it was trained on
    prompts = [pair.prompt for pair in read_pairs(data, "train").rows]
    assert all(prompt.startswith("<|user|>\n") for prompt in prompts)
    assert all(prompt.endswith("<|endoftext|>\n<|assistant|>\n") for prompt in prompts)
