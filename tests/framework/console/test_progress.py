"""Progress of long steps: what it says, when, how wide, and where there is no terminal."""

import logging
import re
import time
from pathlib import Path

import pytest

import orthotrain.console.progress
from orthotrain.console.progress import (
    Progress,
    bytes_in,
    duration,
    per_second,
    shown,
    transformers_bars,
    waiting,
    writing,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    now = [100.0]
    monkeypatch.setattr(orthotrain.console.progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(orthotrain.console.progress, "say", said.append)
    return said


class Foot:
    """What a terminal was given to show."""

    def __init__(self):
        self.calls = []

    def show(self, line):
        self.calls.append(("show", line.text()))

    def renew(self, line):
        self.calls.append(("renew", line.text()))

    def drop(self, line):
        self.calls.append(("drop", line.what))


@pytest.fixture
def foot(monkeypatch):
    monkeypatch.setattr(orthotrain.console.progress, "is_interactive", lambda: True)
    monkeypatch.setattr(orthotrain.console.progress, "FOOT", foot := Foot())
    return foot


def test_a_log_gets_a_line_now_and_then(clock, lines):
    with Progress("tokenizing", 120e6) as bar:
        for _ in range(90):
            clock[0] += 1
            bar.advance(1e6)
    assert lines == [
        "tokenizing: 30.0 of 120.0 MB, 1:30 left, 1 MB/s",
        "tokenizing: 60.0 of 120.0 MB, 1:00 left, 1 MB/s",
        "tokenizing: 90.0 of 120.0 MB, 0:30 left, 1 MB/s",
    ]


def test_a_log_gets_a_line_at_the_beginning_where_it_is_asked_for(clock, lines):
    for first in (0, 100):
        with Progress("training", 400, "steps", first=first, announce=True):
            pass
    assert lines == ["training: 400 steps", "training: 100 of 400 steps"]


def test_a_quick_step_says_nothing_anywhere(clock, lines, foot, monkeypatch):
    for interactive in (False, True):
        monkeypatch.setattr(orthotrain.console.progress, "is_interactive", lambda yes=interactive: yes)
        with Progress("tokenizing", 120e6) as bar:
            clock[0] += 1.9
            bar.advance(120e6)
    assert lines == [] and foot.calls == [("drop", "tokenizing")] * 2


def test_a_terminal_is_shown_a_step_that_has_taken_two_seconds_and_no_line_of_a_log(clock, lines, foot):
    with Progress("tokenizing", 120e6) as bar:
        for _ in range(480):
            clock[0] += 0.125  # exact in binary
            bar.advance(0.125e6)
    kinds = [kind for kind, _ in foot.calls]
    assert foot.calls[0] == ("show", "tokenizing: 2.0 of 120.0 MB, 1:58 left, 1 MB/s")
    assert kinds == ["show", *["renew"] * (58 * 4), "drop"]  # twice 0.125 seconds make a renewal due
    assert lines == []


@pytest.mark.parametrize(
    ("total", "unit", "done", "line"),
    [
        (None, "rows", 2000, "tokenizing: 2,000 rows in 0:20, 100 rows/s"),
        # a compressed file holds more text than it has bytes: its total is not believed
        (10e6, "MB", 30e6, "tokenizing: 30.0 MB in 0:20, 1.5 MB/s"),
    ],
)
def test_without_a_total_the_time_taken_takes_the_place_of_the_time_left(clock, lines, total, unit, done, line):
    with Progress("tokenizing", total, unit, seconds=10) as bar:
        clock[0] += 20
        bar.advance(done)
        assert bar.fraction is None
    assert lines == [line]


def test_tokens_are_the_rate_where_they_are_counted(clock, lines):
    with Progress("tokenizing", 120e6, seconds=10) as bar:
        clock[0] += 20
        bar.advance(60e6, tokens=24e6)
    assert lines == ["tokenizing: 60.0 of 120.0 MB, 0:20 left, 1,200,000 tokens/s"]


def test_what_was_done_before_does_not_make_the_rest_look_fast(clock, lines):
    with Progress("training", 400, "steps", seconds=30, first=300) as bar:
        clock[0] += 50
        bar.advance(50, lambda: "loss 1.000")
    assert lines == ["training: 350 of 400 steps, 0:50 left, 1 steps/s, loss 1.000"]


def test_a_note_is_only_made_where_it_is_shown(clock, lines):
    with Progress("training", 10, "steps") as bar:
        bar.advance(1, lambda: pytest.fail("costs a synchronisation with the device"))


def test_a_narrow_line_loses_what_matters_least_and_keeps_whole_parts(clock, lines):
    with Progress("training", 400, "steps", seconds=0, first=300) as bar:
        clock[0] += 50
        bar.advance(50, lambda: "loss 1.000, 12,000 tokens/s")
    assert [bar.text(width) for width in (200, 70, 55, 39, 26)] == [
        "training: 350 of 400 steps, 0:50 left, 1 steps/s, loss 1.000, 12,000 tokens/s",
        "training: 350 of 400 steps, 0:50 left, loss 1.000, 12,000 tokens/s",
        "training: 350 of 400 steps, 0:50 left, loss 1.000",
        "training: 350 of 400 steps, 0:50 left",
        "training: 350 of 400 steps",
    ]
    assert bar.text(22) == "tra…: 350 of 400 steps"
    for width in range(120):
        assert len(bar.text(width)) <= width


def test_the_innermost_step_is_the_one_that_is_shown(clock, lines):
    with Progress("training", 10, "steps", seconds=10) as outer:
        with Progress("validation", 4, "batches", seconds=10) as inner:
            clock[0] += 11
            outer.advance()
            assert lines == []
            inner.advance()
        assert [line.partition(":")[0] for line in lines] == ["validation"]
        outer.advance()
    assert [line.partition(":")[0] for line in lines] == ["validation", "training"]


def test_an_error_ends_the_step(clock, lines):
    with pytest.raises(ValueError), Progress("inner", 1):
        raise ValueError
    with pytest.raises(ValueError) as kept, shown([1, 2, 3], "left early", "layers") as items:
        for _ in items:
            raise ValueError
    assert kept.value.__traceback__ is not None  # the traceback keeps the loop's frame
    assert orthotrain.console.progress._RUNNING == []


def test_a_step_that_is_one_call_is_watched_from_outside(lines, tmp_path):
    step = writing("writing the model", tmp_path, 4e6)
    step.seconds = 0
    with step:
        (tmp_path / "weights").write_bytes(bytes(2_000_000))
        until(lambda: any("2.0 of 4.0 MB" in line for line in lines))
    lines.clear()
    step = waiting("reading the checkpoint")
    step.seconds = 0
    with step:
        until(lambda: lines)
    assert lines[0] == "reading the checkpoint: 0:00"
    count = len(lines)
    time.sleep(0.5)
    assert len(lines) == count, "nothing is said after the end"


def test_a_step_may_turn_to_a_part_of_which_only_the_time_is_known(lines):
    with Progress("reading text", 4e6, seconds=0, watch=lambda: 4e6) as bar:
        until(lambda: lines)
        bar.turn("learning 4,096 tokens")
        lines.clear()
        until(lambda: lines)
        assert re.fullmatch(r"learning 4,096 tokens: 0:0\d", lines[-1])


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_bytes_are_those_of_a_file_a_folder_or_nothing(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3))
    (tmp_path / "b").write_bytes(bytes(4))
    assert [bytes_in(path) for path in (tmp_path, tmp_path / "a", Path("nowhere"))] == [7, 3, 0]


def test_bars_of_transformers_are_replaced_and_come_back(clock, lines):
    from transformers.utils import logging as theirs

    with transformers_bars(lambda items: shown(items, "loading the model", "tensors")):
        assert list(theirs.tqdm([1, 2, 3], desc="Loading weights")) == [1, 2, 3]
    with transformers_bars():
        assert list(theirs.tqdm([1, 2, 3])) == [1, 2, 3]
    assert theirs.set_tqdm_hook(None) is None


def test_durations_read_as_a_clock_does():
    assert [duration(s) for s in (0, 59.4, 61, 3600, 7325)] == ["0:00", "0:59", "1:01", "1:00:00", "2:02:05"]


def test_rates_have_no_exponent():
    assert [per_second(rate) for rate in (0.01234, 1.5, 99.96, 1234.5, 1e6)] == [
        "0.0123", "1.5", "100", "1,234", "1,000,000"
    ]  # fmt: skip


def test_lines_go_where_lightning_logs(caplog):
    with caplog.at_level(logging.INFO), Progress("merging", 3, "layers", announce=True):
        pass
    assert "merging: 3 layers" in caplog.text
