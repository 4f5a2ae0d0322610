"""Errors as problem documents (RFC 9457), with the fields at fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

MEDIA_TYPE = "application/problem+json"


class Answer(JSONResponse):
    """JSON of any text: half a character of what was posted is shown as its escape."""

    def render(self, content: Any) -> bytes:
        """The bytes of the answer."""
        # as Starlette writes it, whose encoding ends in an exception here
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str = Field(description="Path in the body, such as dataset[3].chosen, or a header.")
    reason: str = Field(description="A word for programs, such as missing_field.")
    message: str = Field(description="A sentence for people.")


class ProblemDocument(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field("about:blank", description="about:blank: the status says what kind it is.")
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="What was found and what to do.")
    errors: list[FieldError] = Field([], description="The fields at fault.")
    request_id: str = Field("", description="The request's id, as in the log.")


class Problem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        detail: What was found and what to do; of the caller's matters only.
        errors: The fields at fault.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[FieldError] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail
        self.errors = list(errors)
        self.headers = headers or {}

    def response(self, request_id: str) -> JSONResponse:
        """The problem document."""
        document = ProblemDocument(
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            errors=self.errors,
            request_id=request_id,
        )
        return Answer(
            document.model_dump(), self.status, headers=self.headers, media_type=MEDIA_TYPE
        )


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These error statuses for the OpenAPI document."""
    schema = {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}}
        for status in statuses
    }
