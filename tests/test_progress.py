"""What a person sees while work is done, where there is no terminal."""

import pytest

from backmerge import progress


def test_short_work_says_only_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal, work of a moment is one line on standard error, and nothing on standard output."""
    with progress.bar("Merging", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr() == ("", "Merging ...\n")


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, a plain line now and then with the time left; never more than there is."""
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY", 0.0)
    with progress.bar("Merging", 4) as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["Merging ...", "Merging: 1/4", "Merging: 4/4"]
    assert lines[2].endswith("about 0 s left")


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a file's name are no markup, and a long line is not broken."""
    progress.say("runs/[bold]x[/bold]" + "y" * 300)
    assert capsys.readouterr().err == "runs/[bold]x[/bold]" + "y" * 300 + "\n"
