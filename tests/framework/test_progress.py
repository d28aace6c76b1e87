"""Progress of long steps: what it says, when, and where there is no terminal."""

import io
import logging
import sys

import pytest

import orthotrain.progress
from orthotrain.progress import Progress, duration, is_interactive


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    now = [100.0]
    monkeypatch.setattr(orthotrain.progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(orthotrain.progress, "say", said.append)
    return said


def test_a_log_gets_a_line_at_the_beginning_and_now_and_then(clock, lines):
    with Progress("tokenizing", 120e6, seconds=10) as bar:
        assert lines == ["tokenizing: 120.0 MB"]
        for _ in range(30):
            clock[0] += 1
            bar.advance(1e6)
    assert lines[1:] == [
        "tokenizing: 10.0 of 120.0 MB, 1:50 left, 1 MB/s",
        "tokenizing: 20.0 of 120.0 MB, 1:40 left, 1 MB/s",
        "tokenizing: 30.0 of 120.0 MB, 1:30 left, 1 MB/s",
    ]


def test_without_a_total_there_is_no_time_left_and_a_quick_step_says_nothing(clock, lines):
    with Progress("tokenizing the rows", None, "rows", announce=False) as bar:
        bar.advance(500)
        assert lines == []
        clock[0] += 20
        bar.advance(1500)
    assert lines == ["tokenizing the rows: 2,000 rows, 100 rows/s"]


def test_what_was_done_before_does_not_make_the_rest_look_fast(clock, lines):
    with Progress("training", 400, "steps", seconds=30, first=300, announce=False) as bar:
        clock[0] += 50
        bar.advance(50, lambda: "loss 1.000")
    assert lines == ["training: 350 of 400 steps, 0:50 left, 1 steps/s, loss 1.000"]


def test_a_note_is_only_made_where_it_is_shown(clock, lines):
    with Progress("training", 10, "steps") as bar:
        bar.advance(1, lambda: pytest.fail("costs a synchronisation with the device"))


@pytest.mark.parametrize(("columns", "bar"), [(120, True), (40, False)])
def test_a_terminal_gets_one_line_that_fits(monkeypatch, clock, lines, columns, bar):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("tokenizing", 120e6) as progress:
        clock[0] += 10
        progress.advance(60e6, lambda: "a note that does not fit into forty columns")
        progress._bar.refresh()
    shown = terminal.getvalue()
    assert "60.0 of 120.0 MB" in shown and ("━" in shown) == bar and lines == []
    assert ("forty columns" in shown) == bar
    assert shown.endswith("\x1b[2K")  # the line is gone in the end


@pytest.mark.parametrize(("terminal", "term", "rank"), [(False, "xterm", 0), (True, "dumb", 0), (True, "xterm", 1)])
def test_no_bar_where_it_cannot_be_drawn_or_another_rank_draws_it(monkeypatch, terminal, term, rank):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(orthotrain.progress.rank_zero_only, "rank", rank, raising=False)
    assert not is_interactive()


def test_durations_read_as_a_clock_does():
    assert [duration(s) for s in (0, 59.4, 61, 3600, 7325)] == ["0:00", "0:59", "1:01", "1:00:00", "2:02:05"]


def test_lines_go_where_lightning_logs(caplog):
    with caplog.at_level(logging.INFO), Progress("merging", 3, "layers"):
        pass
    assert "merging: 3 layers" in caplog.text
