"""HTML as text, for StackExchange; the time it takes grows with its size and not faster."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from typing import Any

from dpo.data.formats import RowError

_FOLLOWED_BY_NEWLINE = frozenset({"p", "pre", "ul", "ol", "blockquote"})
_MAX_OPEN_ENDS = 200
"""Starts of tags after the last whole one: the parser reads all that follows for each of them."""


def plain_text(html: str, field: str) -> str:
    """An empty line between paragraphs, ``-`` before list items, code as it is.

    Args:
        html: What to read; it need not be whole.
        field: Where it stands, for the reason.

    Raises:
        RowError: it cannot be read.
    """
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    if html.count("<") > _MAX_OPEN_ENDS:
        _refuse_open_ends(html, field)
    try:
        with warnings.catch_warnings():
            # for who reads one file, not for rows: a text may well be a link
            warnings.simplefilter("ignore")
            soup = BeautifulSoup(html, "html.parser")
    except UnicodeEncodeError:
        raise RowError(
            "broken_encoding",
            f"{field} has half characters where something could not be decoded; save the source as "
            "UTF-8",
            field,
        ) from None
    except (ParserRejectedMarkup, ValueError, RecursionError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise _broken(f"{field} is not HTML that can be read: {reason}", field) from None
    return "".join(_texts(soup)).strip()


def _refuse_open_ends(html: str, field: str) -> None:
    parser = HTMLParser(convert_charrefs=False)
    try:
        parser.feed(html)
    except AssertionError:
        # the parser proper says what it is
        return
    if parser.rawdata.count("<") > _MAX_OPEN_ENDS:
        start = len(html) - len(parser.rawdata)
        raise _broken(f"{field} has a tag that does not end, at character {start + 1}", field)


def _broken(problem: str, field: str) -> RowError:
    return RowError(
        "broken_markup", f"{problem}; mend it there, or write the text without tags", field
    )


def _texts(soup: Any) -> list[str]:
    """The texts of a document in order.

    One walk: putting them into the tree takes time that grows with the square of its size.
    """
    from bs4.element import NavigableString

    wanted = soup.interesting_string_types
    found: list[str] = []
    inside: list[Any] = [soup]
    for element in soup.descendants:
        while inside[-1] is not element.parent:
            _close(inside.pop().name, found)
        if isinstance(element, NavigableString):
            if type(element) in wanted:
                found.append(element)
        else:
            inside.append(element)
            if element.name in ("li", "br"):
                found.append("- " if element.name == "li" else "\n")
    for tag in reversed(inside):
        _close(tag.name, found)
    return found


def _close(name: str, found: list[str]) -> None:
    if name in _FOLLOWED_BY_NEWLINE:
        # the parser keeps one line's end of the space between them
        found.append("\n")
