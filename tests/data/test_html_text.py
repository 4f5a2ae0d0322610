"""HTML as text: equal to the text of an edited tree, and bounded whatever it is."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from hypothesis import example, given
from hypothesis import strategies as st

from dpo.data.formats import RowError
from dpo.data.html_text import plain_text
from tests.data.conftest import GOOD, Outcome


def by_editing_the_tree(html: str) -> str:
    soup = BeautifulSoup(html, "html.parser")
    for element in soup.find_all("li"):
        element.insert(0, "- ")
    for element in soup.find_all("br"):
        element.replace_with("\n")
    for element in soup.find_all(["p", "pre", "ul", "ol", "blockquote"]):
        element.insert_after("\n")
    return soup.get_text().strip()


TAGS = ["p", "pre", "ul", "ol", "li", "br", "blockquote", "b", "div", "script", "a href='x'"]
PIECES = [*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS)]


@example("<p>one</p>\n<ul><li>two<li>three</ul><!-- no --><script>no</script>&lt;4")
@given(
    st.lists(st.sampled_from([*PIECES, "<br/>", "<!-- c -->", "word", "\n", "&amp;", "<"])).map(
        "".join
    )
)
def test_the_text_is_that_of_the_edited_tree(html: str) -> None:
    assert plain_text(html, "answers") == by_editing_the_tree(html)


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<![foo[bar]]>", "broken_markup"),
        ("&#" + "9" * 5000 + ";", "broken_markup"),
        ("<a " * 30_000, "broken_markup"),
        ('<a href="x' * 30_000, "broken_markup"),
        ("x\ud800", "broken_encoding"),
    ],
)
def test_what_cannot_be_read_is_the_rows_reason(html: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        plain_text(html, "answers")
    assert (caught.value.reason, caught.value.field) == (reason, "answers")


@pytest.mark.parametrize("text", ["https://example.com/x", "notes.txt", "<?xml version='1.0'?>a"])
def test_a_text_that_looks_like_something_else_is_a_text(
    text: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert plain_text(text, "answers") == text.rpartition(">")[2]
    assert not recwarn.list


@pytest.mark.parametrize("piece", ["<p>x", "<ul><li>x", "<p>some words</p>\n", "<div>", "<b>x</i>"])
def test_time_grows_with_the_size(piece: str) -> None:
    """By the square of it, 20,000 paragraphs took 41 s."""
    start = time.process_time()
    plain_text(piece * 20_000, "answers")
    assert time.process_time() - start < 20


def test_the_other_rows_of_a_file_are_read(
    ingest_sources: Callable[..., Outcome], tmp_path: Path
) -> None:
    def row(question: str, **answer: Any) -> dict[str, Any]:
        answers = [{"text": "yes", "pm_score": 3, **answer}, {"text": "no", "pm_score": 1}]
        return {"question": question, "answers": answers}

    rows = [row("<![foo[bar]]>"), row("Why?", text="half \ud800"), *GOOD]
    (tmp_path / "se.json").write_text(json.dumps(rows))
    found = ingest_sources({"se": {"path": str(tmp_path / "se.json")}})
    assert found.reasons == ["broken_markup", "broken_encoding"]
    assert len(found.pairs) == 2
