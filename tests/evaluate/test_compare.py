"""``dpo compare``: names of runs, differences pair by pair, table and chart."""

import json
import shutil
from functools import partial

import pytest
from markupsafe import Markup

from dpo.cli import main
from dpo.config.losses import DPOLoss, IPOLoss, SimPOLoss
from dpo.errors import EvaluationError
from dpo.evaluate.compare import compare, read_runs
from dpo.evaluate.compared_samples import marked_against, shared_samples
from dpo.storage.store import open_store
from tests.evaluate.conftest import made_evaluation
from tests.support.browser import CONTRAST, CUT_OFF, HOSTILE, SVG_CUT_OFF, quiet_pages


def write(folder, **settings):
    evaluation, samples, pairs = made_evaluation(**settings)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def three(tmp_path):
    return [
        write(tmp_path / "weak/evaluation", shift=0.0, beta=0.3),
        write(tmp_path / "strong/evaluation", shift=0.6, beta=0.1),
        write(tmp_path / "middle/evaluation", shift=0.2, beta=0.1),
    ]


def test_the_best_comes_first_and_runs_are_named_by_what_differs(three, tmp_path):
    found = compare([str(path) for path in three], tmp_path / "out")
    assert [run.label for run in found] == [
        f"dpo β 0.1 ({tmp_path.name}/strong)",
        f"dpo β 0.1 ({tmp_path.name}/middle)",
        "dpo β 0.3",
    ]
    values = [run.figure("after", "reward_accuracy")["value"] for run in found]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", ["evaluation.json", "pairs.json", "samples.json"])
def test_a_file_that_is_no_text_is_not_printed(name, three, tmp_path):
    """The message held the whole of it."""
    (three[1] / name).write_bytes(b"\xff" * 5000)
    with pytest.raises(EvaluationError, match="cannot be read") as caught:
        compare([str(path) for path in three], tmp_path / "out")
    assert len(caught.value.found) < 200
    assert caught.value.where == str(three[1])


def test_a_full_disk_is_named(three, tmp_path, capsys):
    """It said that a disk is full, and not which."""
    (tmp_path / "out").mkdir()
    # every write to this device fails as on a full disk
    (tmp_path / "out/compare.html").symlink_to("/dev/full")
    assert main(["compare", *map(str, three), f"output={tmp_path / 'out'}"]) == 1
    assert f"disk is full\n  where: {tmp_path / 'out'}\n" in capsys.readouterr().err


def test_equal_accuracies_are_not_decided_by_the_scale_of_beta(tmp_path):
    """The same policies under five times the beta have five times the margin, and no more skill."""
    small = write(tmp_path / "small", beta=0.1)
    large = write(tmp_path / "large", beta=0.5)
    first, other = compare([str(small), str(large)], tmp_path / "out")
    margins = [run.figure("after", "reward_margin")["value"] for run in (first, other)]
    assert margins[1] == pytest.approx(5 * margins[0])
    assert first.label == "dpo β 0.1"


def changed(folder, **figures):
    """The evaluation in a folder with other values; keys are joined by ``__``."""
    path = folder / "evaluation.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for keys, value in figures.items():
        place, last = values, keys.split("__")
        for key in last[:-1]:
            place = place[key]
        place[last[-1]] = value
    path.write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("beta", "best"), [(0.1, "smaller-loss"), (0.5, "larger-area")])
def test_equal_accuracies_are_decided_as_in_a_sweep(tmp_path, beta, best):
    """By the loss where both were measured with one; by the area, which has no scale, else."""
    changed(
        write(tmp_path / "smaller-loss", beta=0.1),
        after__loss__value=0.5,
        calibration__auc__value=0.6,
    )
    changed(
        write(tmp_path / "larger-area", beta=beta),
        after__loss__value=0.6,
        calibration__auc__value=0.7,
    )
    names = [str(tmp_path / name) for name in ("smaller-loss", "larger-area")]
    for order in (names, names[::-1]):
        assert compare(order, tmp_path / "out")[0].where == str(tmp_path / best)


@pytest.mark.parametrize("area", [None, float("nan")])
def test_a_run_without_a_figure_comes_last_and_has_a_dash(tmp_path, area):
    none = changed(write(tmp_path / "none", beta=0.5), calibration__auc__value=area)
    other = write(tmp_path / "other", beta=0.1)
    assert compare([str(none), str(other)], tmp_path / "out")[0].where == str(other)


def test_an_accuracy_that_is_no_number_is_refused(tmp_path):
    broken = changed(write(tmp_path / "broken"), after__reward_accuracy__value=float("nan"))
    with pytest.raises(EvaluationError, match=r"reward_accuracy\.value is no number"):
        compare([str(broken), str(write(tmp_path / "other"))], tmp_path / "out")


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (DPOLoss(beta=0.3), "dpo β 0.3"),
        (DPOLoss(reference_free=True), "dpo β 0.1 reference-free"),
        (DPOLoss(label_smoothing=0.2, sft_weight=1), "dpo β 0.1 smoothing 0.2 SFT term 1.0"),
        (IPOLoss(log_probs="mean"), "ipo β 0.1 per token"),
        (SimPOLoss(), "simpo β 2.0 γ 0.5"),
    ],
)
def test_a_loss_is_named_with_what_makes_it_another(three, tmp_path, loss, label):
    path = three[0] / "evaluation.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"loss": loss.model_dump(mode="json")}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert label in {run.label for run in compare([str(path) for path in three], tmp_path / "out")}


def test_differences_are_taken_pair_by_pair(three, tmp_path):
    found = {run.where: run for run in compare([str(path) for path in three], tmp_path / "out")}
    first, strong = found[str(three[0])], found[str(three[1])]
    assert first.difference is None
    expected = (
        strong.figure("after", "reward_accuracy")["value"]
        - first.figure("after", "reward_accuracy")["value"]
    )
    assert strong.difference["value"] == pytest.approx(expected)


def test_pairs_in_another_order_are_the_same_pairs(three, tmp_path):
    names, path = [str(path) for path in three[:2]], three[1] / "pairs.json"

    def differences():
        return [run.difference for run in compare(names, tmp_path / "out")]

    expected, pairs = differences(), json.loads(path.read_text(encoding="utf-8"))
    turned = {name: column[::-1] for name, column in pairs.items()}
    path.write_text(json.dumps(turned), encoding="utf-8")
    assert differences() == expected
    pairs["pair_id"][0] = "another"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    assert differences() == [None, None]


def test_a_folder_above_holds_all_of_its_runs(three, tmp_path):
    assert len(read_runs(str(tmp_path))) == 3


def test_a_copy_of_an_evaluation_below_a_folder_is_the_same_run(three, tmp_path):
    """A local run's evaluation lies in its step's output and in the store beside it."""
    shutil.copytree(three[0], tmp_path / "artifacts/1/evaluation")
    assert [run.where for run in read_runs(str(tmp_path))] == [
        str(tmp_path / name)
        for name in ("middle/evaluation", "strong/evaluation", "weak/evaluation")
    ]


def test_without_a_run_the_command_is_a_mistake(capsys):
    assert main(["compare"]) == 2
    assert "two runs or more" in capsys.readouterr().err


def test_an_unfinished_evaluation_is_no_run(three, tmp_path):
    (three[0] / "manifest.json").unlink()
    assert len(read_runs(str(tmp_path))) == 2


@pytest.mark.minio
def test_a_run_in_a_store(three, bucket_url, tmp_path):
    store = open_store(f"{bucket_url}/runs/run-1")
    store.check(create=True)
    for name in ("evaluation.json", "pairs.json"):
        store.write(name, (three[1] / name).read_bytes())
    found = compare([str(three[0]), f"{bucket_url}/runs/run-1"], tmp_path / "out")
    assert found[0].where == f"{bucket_url}/runs/run-1"
    with pytest.raises(EvaluationError, match="no evaluation"):
        compare([str(three[0]), f"{bucket_url}/runs/run-2"], tmp_path / "out")


def test_runs_that_do_not_say_their_pairs_are_not_of_the_same(three, tmp_path):
    for path in three:
        values = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        del values["held_out"]
        (path / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")
    compare([str(path) for path in three], tmp_path / "out")
    assert "not measured on the same held-out pairs, as far" in (
        tmp_path / "out/compare.md"
    ).read_text(encoding="utf-8")


def test_other_pairs_are_called_out(three, tmp_path):
    path = three[1] / "evaluation.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"held_out": "others"}
    path.write_text(json.dumps(values), encoding="utf-8")
    compare([str(path) for path in three], tmp_path / "out")
    assert "not measured on the same" in (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert "not measured on the same" in (tmp_path / "out/compare.md").read_text(encoding="utf-8")


def test_the_command(three, tmp_path, capsys):
    names = [str(path) for path in three]
    assert main(["compare", *names, f"output={tmp_path / 'out'}"]) == 0
    assert "strong" in capsys.readouterr().out.splitlines()[0]
    assert (tmp_path / "out/compare.md").read_text(encoding="utf-8").count("\n| dpo") == 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"after": {"reward_accuracy": {}}}'])
def test_an_evaluation_that_cannot_be_read_is_named(three, tmp_path, text, capsys):
    (three[0] / "evaluation.json").write_text(text, encoding="utf-8")
    names = [str(path) for path in three]
    assert main(["compare", *names, f"output={tmp_path / 'out'}"]) == 1
    assert str(three[0]) in capsys.readouterr().err


def test_one_run_is_no_comparison(three, tmp_path, capsys):
    assert main(["compare", *map(str, three), "output="]) == 1
    assert "output= names no folder" in capsys.readouterr().err
    assert main(["compare", str(three[0])]) == 1
    assert "two or more" in capsys.readouterr().err
    assert main(["compare", str(three[0]), str(tmp_path / "nowhere")]) == 1
    assert "no evaluation" in capsys.readouterr().err


def sample(prompt="p", sft="a b c", policy="a x c", change=0.5, **others):
    return {
        "pair_id": "0",
        "dataset": "hh",
        "prompt": prompt,
        "chosen": "good",
        "sft": sft,
        "policy": policy,
        "reward_change": change,
        **others,
    }


def test_marks_by_hand():
    """The first keeps a and c, the second b and c: no word of the SFT model's is in neither."""
    before, (first, second) = marked_against("a b c", ["a x c", "b c <d>"])
    assert before == Markup("a b c")
    assert first == Markup("a <ins>x</ins> c")
    assert second == Markup("b c<ins> &lt;d&gt;</ins>")
    before, _ = marked_against("a b c", ["a x c", "a y c"])
    assert before == Markup("a <del>b</del> c")


def test_only_prompts_that_two_runs_answered_are_shown():
    runs = [[sample("p"), sample("q")], None, [sample("q", policy="a b c", change=0), sample("r")]]
    shown, left_out = shared_samples(runs)
    assert [item["prompt"] for item in shown] == ["q"]
    assert shown[0]["changes"] == "rose none same"
    assert shown[0]["answers"][1] is None
    assert left_out == 0


def test_sft_models_that_answer_differently_are_told_apart():
    (shown,), _ = shared_samples([[sample()], [sample(sft="other")], [sample()]])
    assert [part["runs"] for part in shown["before"]] == [[0, 2], [1]]
    assert "<ins>" in shown["answers"][1]["text"]


def test_many_runs_with_long_hostile_answers_stay_below_a_megabyte(tmp_path):
    long = [sample(f"{i} {HOSTILE * 20}", HOSTILE * 40, '<&" ' * 3000) for i in range(50)]
    folder = write(tmp_path / "run/evaluation", n=20)
    (folder / "samples.json").write_text(json.dumps(long), encoding="utf-8")
    for number in range(99):
        copy = shutil.copytree(folder, tmp_path / f"run-{number}/evaluation")
        evaluation = json.loads((copy / "evaluation.json").read_text(encoding="utf-8"))
        other = json.dumps({**evaluation, "policy": f"policy {number}"})
        (copy / "evaluation.json").write_text(other, encoding="utf-8")
    names = [str(tmp_path)]
    compare(names, tmp_path / "out")
    page = tmp_path / "out/compare.html"
    assert page.stat().st_size < 1_000_000
    assert "more are in the runs" in page.read_text(encoding="utf-8")


def test_samples_that_cannot_be_read_are_named(three, tmp_path, capsys):
    for text in ("[1]", "{", '[{"prompt": "p"}]'):
        (three[1] / "samples.json").write_text(text, encoding="utf-8")
        names = [str(path) for path in three]
        assert main(["compare", *names, f"output={tmp_path / 'out'}"]) == 1
        assert str(three[1]) in capsys.readouterr().err


def test_runs_without_samples_say_so(three, tmp_path):
    for folder in three:
        (folder / "samples.json").unlink()
    compare([str(path) for path in three], tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert "kept answers to the same prompts" in page


@pytest.fixture
def opened(browser, three, tmp_path):
    """Opens the page; what it says or asks for is an error at the end."""
    compare([str(path) for path in three], tmp_path / "out")
    with quiet_pages(browser) as open_page:
        yield partial(open_page, (tmp_path / "out/compare.html").as_uri())


@pytest.mark.parametrize("width", [320, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(SVG_CUT_OFF) == []
    letters = [e.bounding_box()["height"] for e in page.locator("svg text:not([transform])").all()]
    assert min(letters) > 8
    assert max(letters) < 30
    assert page.locator("svg g").count() == 3
    assert page.locator("tbody tr").count() == 3
    assert page.title() == "Preference fine-tuning: comparison"
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_without_a_divergence_the_chart_shows_accuracies_in_letters_of_the_page(
    browser, three, tmp_path
):
    path = three[1] / "evaluation.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["kl"]
    path.write_text(json.dumps(values), encoding="utf-8")
    compare([str(path) for path in three], tmp_path / "out")
    with quiet_pages(browser) as open_page:
        page = open_page((tmp_path / "out/compare.html").as_uri())
        assert page.locator("h2").first.inner_text() == "Reward accuracy"
        name = page.locator("svg text.name").first
        assert name.bounding_box()["height"] < 30


def test_answers_are_side_by_side_and_can_be_filtered(opened):
    page = opened(viewport={"width": 1440, "height": 900})
    first = page.locator("article").first
    titles = first.locator("h4").all_inner_texts()
    assert [title.split(" (")[0] for title in titles] == [
        "SFT",
        "1. dpo β 0.3 · +0.500",
        "2. dpo β 0.1",
        "3. dpo β 0.1",
    ]
    assert [text.strip() for text in first.locator("ins").all_inner_texts()] == ["other"] * 3
    page.select_option("#by-source", "hh")
    page.select_option("#by-change", "rose")
    # of the hh samples (numbers 0, 2 and 4) the rewards rose in 0 and 4
    assert page.locator("article:visible").count() == 2
    page.select_option("#by-run", "1")
    assert page.locator("#shown").inner_text() == "2 of 6 shown"
    page.select_option("#by-change", "same")
    assert page.locator("article:visible").count() == 1


def test_everything_is_printed(opened):
    page = opened()
    page.select_option("#by-change", "same")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#filters").is_hidden()
    assert page.locator("article:visible").count() == 6
    assert page.locator("details pre").first.is_visible()
