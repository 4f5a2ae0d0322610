"""Every reason for which a row is not used, in words for the person who keeps the data."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "unreadable": "The line cannot be read",
    "missing_field": "A field is missing",
    "wrong_type": "A field holds something else than text",
    "wrong_split": "The field split says neither train nor test",
    "unknown_format": "The fields are not those of preference data",
    "no_assistant_turn": "A dialogue has no answer in it",
    "no_common_prompt": "There is no prompt",
    "prompts_differ": "The two answers belong to different questions",
    "roles_out_of_order": "A dialogue's turns are out of order",
    "unknown_role": "A turn has a role that is not known",
    "tool_message": "A dialogue calls tools",
    "not_text": "The row has an image, a sound or a film",
    "reasoning_apart": "An answer's reasoning stands in a field of its own",
    "list_as_text": "A list of messages was saved as text",
    "text_before_first_turn": "A dialogue begins with text that nobody says",
    "chat_template_refuses": "The model's chat template does not take the dialogue",
    "custom_format_failed": "Your own function made no pair of the row",
    "unknown_verdict": "The verdict names neither answer",
    "empty": "A text is empty",
    "placeholder": "A mark stands where a text is missing",
    "broken_encoding": "Characters were lost when the text was saved",
    "broken_markup": "The HTML cannot be read",
    "control_character": "The text has invisible control characters",
    "eos_in_text": "The text has the model's end mark in it",
    "special_token_in_text": "The text has a mark in it that steers the model",  # nosec B105
    "turn_mark_in_text": "A message has the mark of another turn in it",
    "chosen_equals_rejected": "Both answers are the same",
    "identical_after_truncation": "Both answers are the same as far as the model reads",
    "empty_after_truncation": "A text is empty as far as the model reads",
    "prompt_too_long": "The prompt is too long",
    "contradictory_pair": "Two rows prefer the same answers the other way round",
    "prompt_in_test": "The prompt is held out, so nothing trains on it",
    "duplicate_pair": "The same pair stands there before",
    "over_prompt_limit": "There are enough pairs with this prompt",
    "score_ratio_too_low": "The two scores are too close",
    "equal_scores": "Nobody prefers one answer to the other",
    "one_answer": "The prompt has one answer only",
    "not_annotated": "Nobody has judged the row yet",
    "no_pair": "The loader prefers none of the prompt's answers",
    "not_accepted": "The annotator refused or passed over the example",
}


def title(reason: str) -> str:
    """A reason as a heading."""
    return TITLES.get(reason, reason.replace("_", " "))
