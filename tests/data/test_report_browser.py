"""The data report in a real browser: hostile texts and names are text there."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.data.conftest import Outcome, good_row
from tests.support.browser import CUT_OFF, HOSTILE, browser, quiet_pages

__all__ = ["browser"]


@pytest.mark.parametrize("width", [360, 1200])
def test_hostile_texts_run_nothing(
    ingest: Callable[..., Outcome], browser: Any, width: int
) -> None:
    rows: list[dict[str, Any]] = [good_row(number) for number in range(30)]
    rows += [{"prompt": HOSTILE, "chosen": f"yes {HOSTILE}", "rejected": f"no {HOSTILE}"}]
    # rejected rows and their fields are shown as well
    rows += [{"prompt": HOSTILE, "chosen": "", "rejected": HOSTILE}]
    rows += [{"prompt": {HOSTILE: 1}, "chosen": "a", "rejected": "b"}]
    found = ingest(rows)
    with quiet_pages(browser) as opening:
        address = (found.folder / "report.html").as_uri()
        page = opening(address, viewport={"width": width, "height": 900})
        assert "owned" not in page.title()
        assert page.locator("script, img").count() == 0
        assert "<script>document.title" in page.locator("body").text_content()
        assert page.evaluate(CUT_OFF) == []
