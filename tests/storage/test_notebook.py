"""Progress in a notebook, with a stand-in for IPython that keeps what is displayed."""

import sys
from types import ModuleType

import pytest

from dpo.storage.progress import track


@pytest.fixture
def notebook(monkeypatch):
    """What is on the screen: one entry a display, redrawn in place."""
    screen = []

    class ZMQInteractiveShell:
        pass

    class HTML:
        def __init__(self, data):
            self.data = data

    class Handle:
        def __init__(self, content):
            screen.append(content.data)
            self.place = len(screen) - 1

        def update(self, content):
            screen[self.place] = content.data

    ipython, shown = ModuleType("IPython"), ModuleType("IPython.display")
    shell = ZMQInteractiveShell()
    ipython.get_ipython = lambda: shell
    shown.HTML = HTML
    shown.display = lambda content, display_id: Handle(content)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.delenv("DPO_PROGRESS_FILE", raising=False)
    return screen


def test_one_bar_is_drawn_anew(notebook, capfd):
    with track("preference <x>", "steps", 4) as bar:
        bar.advance(4, loss=0.5)
    (line,) = notebook
    assert "value='4' max='4'" in line
    assert "loss 0.5" in line
    assert "&lt;x&gt;" in line
    assert capfd.readouterr().err == ""


def test_training_shows_its_bars(notebook, tmp_path):
    from dpo import run_training

    run_training(
        "tiny",
        ["hh_sample"],
        {"name": "sft"},
        n_examples=4,
        output_dir=tmp_path,
        overrides=["n_eval_examples=2"],
    )
    assert any("sft" in line and "steps" in line for line in notebook)


def test_a_shell_without_a_notebook_is_none(monkeypatch, capfd):
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with track("sft", "steps", 1) as bar:
        bar.advance(1)
    assert "sft: 1/1 steps" in capfd.readouterr().err
