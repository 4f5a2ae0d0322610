"""A container engine that goes away while a run uses it."""

from dpo.errors import RequestError
from pipelines import containers


def test_it_changes_nothing_of_how_the_run_is_said_to_have_ended(monkeypatch, capsys):
    def gone():
        raise RequestError("no container engine answers")

    monkeypatch.setattr(containers, "connect", gone)
    containers.stop_containers("20260101-000000-000000")
    assert "containers of this run may go on" in capsys.readouterr().err
