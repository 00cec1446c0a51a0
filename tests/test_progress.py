"""Progress: a bar on a terminal, a line a minute elsewhere, nothing unless it is asked for."""

import io
import sys

import pytest

from moe_unlearn import progress
from moe_unlearn.progress import Bar, Form, shown, watched

pytestmark = pytest.mark.quick


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The clock that progress reads, as a list of one number of seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_unless_it_is_asked_for(clock, capsys, monkeypatch):
    assert [*watched([1, 2], "work")] == [1, 2]
    progress.say("a line")
    monkeypatch.setenv("RANK", "1")
    with shown(Form(bars=True)):
        for clock[0] in watched([100.0, 200.0], "work"):
            progress.say("a line")
    assert capsys.readouterr() == ("", "")


def test_a_line_a_minute_says_how_much_is_done_and_how_long_the_rest_takes(clock, capsys):
    with shown(Form(bars=True)), Bar("evaluation", 100, "row") as bar:
        for _ in range(20):
            clock[0] += 10
            bar.advance(3)
    assert progress.form() == Form()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluation: 18 of 100 (row), about 5 min left"
    assert lines[1] == "evaluation: 36 of 100 (row), about 4 min left" and len(lines) == 3


def test_a_terminal_gets_a_bar_and_lines_pass_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown(Form(bars=True)):
        for _ in watched(range(3), "evaluation"):
            progress.say("a line")
    told = sys.stderr.getvalue()
    assert "evaluation:   0%" in told and "0/3" in told and "a line\n" in told


def test_work_of_unknown_length_and_work_that_fails_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown(Form(bars=True)):
        assert [*watched(iter("ab"), "work")] == ["a", "b"]
        with pytest.raises(KeyError), Bar("work", 2) as bar:
            raise KeyError
    assert bar._bar.disable or bar._bar.last_print_n == 0


@pytest.mark.parametrize(("seconds", "said"), [(3.4, "3 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds, said):
    assert progress.duration(seconds) == said
