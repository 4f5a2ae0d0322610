"""Progress as lines of a log."""

from dpo.storage.progress import FILE_VARIABLE, track


def test_a_log_tells_each_state_once(capsys, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    with track("publish", "bytes", 10) as bar:
        bar.advance(10)
    assert capsys.readouterr().err == "publish: 10/10 bytes\n"
    with track("publish", "bytes", 0):
        pass
    assert capsys.readouterr().err == ""
