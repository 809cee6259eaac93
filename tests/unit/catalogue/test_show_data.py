"""`mm show data`."""

import sys

import pytest

from mm_model import cli


def mm(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["mm", "show", "data", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), *capfd.readouterr()
    return 0, *capfd.readouterr()


@pytest.fixture(autouse=True)
def no_browser(monkeypatch):
    """A test that would open one fails: there is no terminal here, so nobody looks."""

    def refuse(address):
        raise AssertionError(address)

    monkeypatch.setattr("webbrowser.open", refuse)


def test_it_says_where_the_page_is(catalogue, monkeypatch, capfd):
    pipeline = catalogue.parents[1]
    status, out, err = mm(monkeypatch, capfd, "--pipeline", pipeline)
    assert (status, err) == (0, "")
    assert out.strip() == str(catalogue / "index.html")


@pytest.mark.parametrize(("terminal", "screen"), [(True, ":0"), (True, ""), (False, ":0")])
def test_it_opens_the_page_for_who_looks(catalogue, monkeypatch, capfd, terminal, screen):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert mm(monkeypatch, capfd, "-C", catalogue.parents[1])[0] == 0
    page = (catalogue / "index.html").resolve().as_uri()
    assert opened == ([page] if terminal and screen else [])


def test_it_copies_the_page(catalogue, monkeypatch, capfd, tmp_path):
    copy = tmp_path / "new" / "page.html"
    status, out, _ = mm(monkeypatch, capfd, "-C", catalogue.parents[1], "--out", copy)
    assert status == 0
    assert out.strip() == str(copy)
    assert copy.read_bytes() == (catalogue / "index.html").read_bytes()


def test_without_a_catalogue_it_says_what_to_do(monkeypatch, capfd, tmp_path):
    status, out, err = mm(monkeypatch, capfd, "-C", tmp_path)
    assert (status, out) == (1, "")
    assert "run the stage catalogue (mm catalogue)" in err
    assert err.count("\n") == 1
