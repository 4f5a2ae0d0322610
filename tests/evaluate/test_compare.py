"""``dpo compare``: names of runs, differences pair by pair, table and chart."""

import json

import pytest

from dpo.cli import main
from dpo.errors import EvaluationError
from dpo.evaluate.compare import compare, read_runs
from dpo.storage.store import open_store
from tests.evaluate.conftest import made_evaluation


def write(folder, **settings):
    evaluation, _, pairs = made_evaluation(**settings)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
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


def test_differences_are_taken_pair_by_pair(three, tmp_path):
    found = {run.where: run for run in compare([str(path) for path in three], tmp_path / "out")}
    first, strong = found[str(three[0])], found[str(three[1])]
    assert first.difference is None
    expected = (
        strong.figure("after", "reward_accuracy")["value"]
        - first.figure("after", "reward_accuracy")["value"]
    )
    assert strong.difference["value"] == pytest.approx(expected)


def test_a_folder_above_holds_all_of_its_runs(three, tmp_path):
    assert len(read_runs(str(tmp_path))) == 3


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
    assert main(["compare", str(three[0])]) == 1
    assert "two or more" in capsys.readouterr().err
    assert main(["compare", str(three[0]), str(tmp_path / "nowhere")]) == 1
    assert "no evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("width", [320, 768, 1440])
def test_the_page_in_a_browser(browser, three, tmp_path, width):
    compare([str(path) for path in three], tmp_path / "out")
    page = browser.new_page(viewport={"width": width, "height": 900})
    noise = []
    page.on("console", lambda message: noise.append(message.text))
    page.goto((tmp_path / "out/compare.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg g").count() == 3
    assert page.locator("tbody tr").count() == 3
    assert noise == []
    page.close()
