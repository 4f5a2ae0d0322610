"""The report in a real browser: quiet, whole, filterable, and inert against hostile texts."""

import json
import re
from html.parser import HTMLParser

import pytest

from dpo.evaluate import charts
from dpo.evaluate.bounds import largest
from dpo.evaluate.escaped import cell
from dpo.evaluate.report import FIGURES, write_reports
from dpo.evaluate.samples import change_of, matched, shown_samples, words_of
from tests.evaluate.conftest import made_evaluation
from tests.support.browser import CONTRAST, CUT_OFF, HOSTILE, SVG_CUT_OFF, quiet_pages

WIDTHS = [320, 768, 1440]
DATA = {
    "figures": {
        "pairs": 1000,
        "rows": 1004,
        "train_pairs": 800,
        "test_pairs": 200,
        "rejected": 4,
        "near_duplicates": 2,
        "reasons": {"empty": 4},
    },
}


def write(folder, *, samples=None, sources=("hh",), judge=None, published=None):
    evaluation, made, _ = made_evaluation()
    evaluation |= {"judge": judge} if judge else {}
    evaluation |= {"published": published} if published else {}
    if len(sources) > 1:
        by_source = evaluation["slices"]["source"]
        by_source[:] = [
            {**by_source[0], "slice": name, "n_pairs": n} for n, name in enumerate(sources)
        ]
    curve = folder / "metrics.jsonl"
    lines = [{"loss/train": 1.0 / step, "grad_norm": float(step)} for step in range(1, 1200)]
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = folder / "data.json"
    by_source = {name: {"pairs": n, "rejected": 0} for n, name in enumerate(sources, 1000)}
    fingerprints = dict.fromkeys(sources, "sha256:" + "f" * 64)
    given = {"figures": {**DATA["figures"], "by_source": by_source}, "sources": fingerprints}
    data.write_text(json.dumps(given), encoding="utf-8")
    write_reports(
        folder,
        evaluation=evaluation,
        samples=made if samples is None else samples,
        settings={"evaluate": {"seed": 0, "note": HOSTILE, "datasets": list(sources)}},
        provenance={"inputs": {"pairs": "c" * 64}, "code": {"sft": ""}, "data": fingerprints},
        curves={"SFT": curve, "preference": folder / "none.jsonl"},
        data_report=data,
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture
def opened(browser, report):
    """Opens the report; whatever the page says or asks for is an error at the end."""
    with quiet_pages(browser) as open_page:
        yield lambda url=None, **settings: open_page(url or report.as_uri(), **settings)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(SVG_CUT_OFF) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("media", "width"), [("screen", 870), ("screen", 1020), ("print", 720)])
def test_a_published_version_beside_them_is_not_cut_off(browser, tmp_path, media, width):
    """Its column is the fifth; A4 is 720 pixels wide."""
    figure = {"value": -1269.1, "low": -1311.2, "high": -1230.2}
    path = write(tmp_path, published={key: figure for key, _, _ in FIGURES})
    with quiet_pages(browser) as open_page:
        page = open_page(path.as_uri(), viewport={"width": width, "height": 900})
        page.emulate_media(media=media)
        assert page.locator("td[data-label=published]").count() == len(FIGURES)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []


def test_hostile_texts_are_text(opened):
    page = opened()
    assert page.title() == "Preference fine-tuning: evaluation"
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert HOSTILE.split("\n")[0] in page.locator("article").nth(1).inner_text()
    assert "<b>shp</b>" in page.locator("article > h3").nth(1).inner_text()


def test_filters_by_source_and_by_reward_change(opened):
    page = opened()

    def shown():
        return page.locator("article:visible").count()

    assert shown() == 6
    page.select_option("#by-source", "hh")
    assert shown() == 3
    # of the hh samples (numbers 0, 2 and 4) the rewards rose in 0 and 4
    page.select_option("#by-change", "rose")
    assert shown() == 2
    assert page.locator("#shown").inner_text() == "2 of 6 shown"
    page.select_option("#by-source", "")
    page.select_option("#by-change", "fell")
    assert shown() == 2
    page.select_option("#by-change", "same")
    assert shown() == 1


def test_the_differences_are_marked(opened):
    page = opened()
    first = page.locator("article").first
    assert first.locator("ins").all_inner_texts()[0].strip() == "other"
    assert first.locator("del").count() == 0


def test_works_by_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "by-source":
            break
    page.keyboard.press("ArrowDown")
    assert page.locator("#shown").inner_text() == "3 of 6 shown"


def test_works_in_a_sandboxed_frame_without_an_origin(opened, report, tmp_path):
    """As Kubeflow shows it: srcdoc in a frame that may run scripts and nothing else."""
    page_html = json.dumps(report.read_text(encoding="utf-8")).replace("</", "<\\/")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><iframe sandbox='allow-scripts' width=900 height=600></iframe>"
        f"<script>document.querySelector('iframe').srcdoc = {page_html}</script>",
        encoding="utf-8",
    )
    page = opened(outer.as_uri(), reduced_motion="reduce")
    frame = page.frame_locator("iframe")
    frame.locator("#by-source").select_option("hh")
    assert frame.locator("#shown").inner_text() == "3 of 6 shown"
    # the frame has no address: a link to a section must not load the outer page into it
    frame.get_by_role("link", name="Provenance").click()
    assert frame.locator("h1").inner_text() == "Evaluation"
    inside = page.frames[1]
    assert inside.evaluate("document.activeElement.id") == "provenance"
    assert inside.evaluate("document.activeElement.getBoundingClientRect().top") < 600


def test_prints_everything(opened):
    page = opened()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("nav").is_hidden()
    assert page.locator("#filters").is_hidden()
    assert page.locator("pre.code").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


@pytest.mark.parametrize("media", ["screen", "print"])
def test_names_of_rows_are_not_broken_within_a_word(opened, media):
    """As a sheet of A4 has it, 720 pixels wide, beside a long value."""
    page = opened(viewport={"width": 720 if media == "print" else 1000, "height": 900})
    page.emulate_media(media=media)
    name = page.locator("#provenance ~ table tbody th").first
    long = "word " * 100
    name.evaluate(f"e => {{ e.textContent = 'preference'; e.nextSibling.textContent = '{long}'; }}")
    assert (
        name.evaluate(
            "e => { const r = document.createRange(); r.selectNodeContents(e);"
            " return r.getClientRects().length; }"
        )
        == 1
    )


def test_screen_readers_find_names(opened):
    page = opened()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("svg:not([aria-label])").count() == 0
    assert page.locator("main").count() == page.locator("h1").count() == 1
    for name in ("Source", "Reward change"):
        assert page.get_by_role("combobox", name=name).count() == 1
    assert page.locator("#shown").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(opened, scheme):
    """4.5 : 1 is what WCAG 2.2 asks of text (AA)."""
    ratio, where = opened(color_scheme=scheme).evaluate(CONTRAST)
    assert ratio >= 4.5, where


class Addresses(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action")]


def test_the_page_names_no_address_and_is_small(report):
    text = report.read_text(encoding="utf-8")
    parser = Addresses()
    parser.feed(text)
    assert all(found.startswith(("#", "data:")) for found in parser.found)
    assert len(text.encode()) < 200_000


def test_a_thousand_long_samples_stay_below_a_megabyte(tmp_path):
    _, made, _ = made_evaluation()
    samples = [{**made[i % 6], "policy": f"word{i} " * 900} for i in range(1000)]
    path = write(tmp_path, samples=samples)
    assert path.stat().st_size < 1_000_000
    assert "more are in samples.json" in path.read_text(encoding="utf-8")


def words(every_other):
    return " ".join(every_other if j % 2 else f"w{j}" for j in range(60))


@pytest.mark.parametrize(
    ("n", "change"),
    [
        (5000, lambda i: {"policy": f"b {i}"}),
        (3000, lambda i: {"dataset": f"<source {i}>"}),
        (3000, lambda i: {"dataset": f"{i}" + '"' * 5000}),
        (300, lambda i: {"published": "<" * 6000}),
        (200, lambda i: dict.fromkeys(("prompt", "chosen", "sft", "policy"), "<&\"'" * 1500)),
        (1000, lambda i: {"sft": words(f"a{i}"), "policy": words("b")}),
        (300, lambda i: {"policy": "\U0001f642\ud800" * 3000}),
    ],
)
def test_no_samples_make_a_page_of_a_megabyte(tmp_path, n, change):
    plain = {
        "pair_id": "0" * 32,
        "dataset": "hh",
        "prompt": "q",
        "chosen": "yes",
        "sft": "a",
        "policy": "b",
        "reward_change": 0.5,
    }
    path = write(tmp_path, samples=[{**plain, **change(i)} for i in range(n)])
    text = path.read_text(encoding="utf-8")
    assert 500_000 < path.stat().st_size < 990_000
    assert f"{n - text.count('<article')} more are in samples.json" in text


@pytest.mark.parametrize("name", ["source {}", "{}" + "<" * 5000])
def test_of_many_sources_the_largest_are_shown(tmp_path, name):
    path = write(tmp_path, samples=[], sources=[name.format(i) for i in range(1500)])
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 400_000
    assert "By source: the largest 40 of 1500" in text
    assert "The largest 40 sources; 1,460 more are in report.json" in text
    assert "1460 more in the manifests" in text
    assert "1499" in text
    markdown = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "source: 1460 smaller ones are left out" in markdown
    assert len(markdown) < 100_000


def test_of_rows_of_one_size_the_first_are_shown_in_their_order():
    rows = [(name, 1 if name in (0, 50) else 2) for name in range(60)]
    assert [name for name, _ in largest(rows, lambda row: row[1])] == list(range(1, 41))


def test_what_the_judge_left_out_is_said(tmp_path):
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ("win_rate", "win_rate_length_controlled", "wins", "ties", "losses", "position_changed")
    judged = {"model": "m", "n_asked": 9, "n_judged": 6, "n_left_out": 3, "problem": ""}
    judged |= {"left_out": {"HTTP 400": 2, "<b>": 1}, **dict.fromkeys(names, share)}
    page = write(tmp_path, judge=judged)
    said = "6 of 9 prompts were judged; 3 left out, without a verdict: HTTP 400 (2), &lt;b&gt; (1)."
    assert said in page.read_text(encoding="utf-8")
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "on 6 of 9 prompts; 3 left out, without a verdict: HTTP 400 (2), &lt;b> (1)." in markdown


def test_markdown_says_what_the_page_says(tmp_path):
    """Every number of the page's tables, where the curves begin and end, and what is cut off."""
    _, made, _ = made_evaluation()
    path = write(tmp_path, samples=[{**made[0], "sft": "long " * 500, "published": "third"}])
    page, text = (path.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".md"))
    rows = re.findall(r'data-label="(?:before|after|change|sft|policy)">([^<]+)<', page)
    assert len(rows) > 30
    assert [number for number in rows if number.strip() not in text] == []
    assert "\n- **Warning.** The answers grew to 1.67 " in text
    # 1 / step, and step, in 1,199 steps
    assert "| SFT: training loss | 1.0000 | 0.0008 | 1199 |" in text
    assert "| SFT: gradient norm | 1.0000 | 1199.0000 | 1199 |" in text
    assert "(500 more characters in samples.json)" in text
    # 5 tokens against 3
    assert "are 1.667 [1.667, 1.667] times as long" in text
    assert "1.667 [1.667, 1.667] times as long" in page
    assert "| Tokens: median (5 % to 95 %) | 3 (3 to 3) | 5 (5 to 5) |" in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("![x](http://127.0.0.1/y)", r"!\[x\](http://127.0.0.1/y)"),
        ("*a* __b__ `c`", r"\*a\* \_\_b\_\_ \`c\`"),
        ("a | b\n<c>", r"a \| b &lt;c>"),
    ],
)
def test_a_cell_of_markdown_fetches_and_marks_nothing(text, escaped):
    assert cell(text) == escaped


def test_markdown_holds_the_same_and_its_fences(report):
    text = report.with_suffix(".md").read_text(encoding="utf-8")
    for heading in ("What changed", "Where it holds", "Answers", "Data", "Provenance"):
        assert f"\n## {heading}\n" in text
    assert "````text" in text
    assert "| <b>" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.6931, "0.693"), (-0.0123, "-0.0123"), (123.4, "123"), (1199.0, "1199")),
        *((0.000834, "8.3e-4"), (-0.00834, "-8.3e-3"), (123456.0, "1.2e5"), (-99999.0, "-99999")),
    ],
)
def test_numbers_beside_an_axis_are_short(value, text):
    assert f">{text}<" in charts.line_chart("t", [value, value + 1])


@pytest.mark.parametrize(
    ("sft", "policy", "change", "expected"),
    [
        ("a", "b", 0.1, "rose"),
        ("a", "b", -0.1, "fell"),
        ("a", "a", 0.1, "same"),
        ("a", "b", 0, "same"),
    ],
)
def test_kinds_of_reward_change(sft, policy, change, expected):
    assert change_of({"sft": sft, "policy": policy, "reward_change": change}) == expected


@pytest.mark.parametrize(
    ("left", "right", "compared"),
    [
        (words("a") * 3, words("b") * 3, True),
        ("no " * 700, "no yes " * 350, False),  # 700 times 350 pairs
        ("no " * 200, "no yes " * 200, True),
    ],
)
def test_answers_that_repeat_themselves_are_not_compared_word_by_word(left, right, compared):
    assert (matched(words_of(left), words_of(right)) is not None) == compared


def test_spaces_alone_are_no_match():
    _, made, _ = made_evaluation()
    (shown,) = shown_samples([{**made[0], "sft": "one two three", "policy": "four five three"}])
    assert shown["policy"] == "<ins>four five</ins> three"


def test_a_published_answer_is_shown_beside_them():
    _, made, _ = made_evaluation()
    (shown,) = shown_samples([{**made[0], "published": "third"}])
    assert shown["published"] == "third"
