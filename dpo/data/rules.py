"""What the rows of a run are checked against."""

from __future__ import annotations

from dpo.config.schema import RunConfig
from dpo.data.check import Rules
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.errors import ConfigError
from dpo.storage.base_model import local_tokenizer


def rules_of(config: RunConfig) -> Rules:
    """The rules that the settings state.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
    """
    place = local_tokenizer(config.model)
    tokenizer = load_text_tokenizer(place)
    if config.prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "prompt_format=chat, but the model's tokenizer has no chat template",
            where=str(place),
            fix="use prompt_format=raw, or a model with a chat template",
        )
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return Rules(place, limits, config.prompt_format, config.test_fraction)
