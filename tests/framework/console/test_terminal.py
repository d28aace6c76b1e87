"""The last line of a terminal, seen from the other end of a real one: a program runs in a pseudo-terminal."""

import io
import os
import re
import subprocess
import sys
import textwrap

import pytest

import orthotrain.console.terminal
from orthotrain.console.terminal import is_interactive

pty = pytest.importorskip("pty")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

STEPS = """
import logging, os, sys, time, warnings
logging.basicConfig(format="%(message)s", level=logging.INFO)
from orthotrain.console.progress import Progress
with Progress("tokenizing", 120e6, delay=0) as bar:
    for step in range(1, 7):
        time.sleep(0.25)
        bar.advance(10e6, lambda: "loss 1.000, 12,000 tokens/s")
        {during}
{after}
"""


def on_a_terminal(columns, during="pass", after="", stdout=None):
    """Run the steps on a terminal of so many columns; return all that it was sent."""
    program = STEPS.format(during=during, after=textwrap.dedent(after))
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, (24).to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=terminal, stdout=stdout or terminal, stderr=terminal,
        env={**environment, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(terminal)
    sent = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        sent += piece
    os.close(master)
    assert process.wait() == 0, sent.decode()
    return sent.decode()


def rows_of(sent, columns):
    """Return what the terminal shows in the end: rows of text, for the few control sequences that are sent."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\r\n\x1b]", sent):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
        elif part == "\x1b[2K":
            rows[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(match[1])
        elif part.startswith("\x1b["):
            assert part.endswith("m"), (
                f"{part!r} may leave the terminal in a state that a killed run does not take back"
            )
        else:
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [text.rstrip() for text in rows]


@pytest.mark.parametrize("columns", [30, 40, 60, 100])
def test_a_line_is_never_wrapped_and_gone_in_the_end(columns):
    sent = on_a_terminal(columns)
    renewals = re.split(r"\r|\x1b\[2K|\n", re.sub(r"\x1b\[[\d;]*m", "", sent))
    assert all(len(text) < columns for text in renewals)
    assert "tokenizing: 40.0 of 120.0 MB" in sent or columns == 30
    assert ("━" in sent) == (columns == 100) and ("left" in sent) == (columns > 30)
    assert rows_of(sent, columns) == ["", ""]


@pytest.mark.parametrize(
    "during",
    [
        'logging.info("a line of the log, /that/is/longer/than/the/terminal/%d", step)',
        'print("a line of the log, /that/is/longer/than/the/terminal/%d" % step)',
        'print("a line of the log, /that/is/longer/than/the/terminal/%d" % step, file=sys.stderr)',
    ],
    ids=["logged", "printed", "written"],
)
def test_what_others_say_stands_on_lines_of_its_own_and_whole(during):
    sent = on_a_terminal(40, during)
    assert "MB" in sent
    shown = "\n".join(rows_of(sent, 200))
    expected = [f"a line of the log, /that/is/longer/than/the/terminal/{step}" for step in range(1, 7)]
    assert [line for line in shown.splitlines() if line] == expected


def test_a_warning_stands_on_lines_of_its_own():
    rows = rows_of(on_a_terminal(40, 'step == 3 and warnings.warn("mind this")'), 200)
    assert any(row.startswith("<string>:") and row.endswith("UserWarning: mind this") for row in rows)


def test_output_that_goes_into_a_file_is_data(tmp_path):
    with (tmp_path / "out").open("w") as file:
        sent = on_a_terminal(40, "print(step)", stdout=file)
    assert (tmp_path / "out").read_text() == "1\n2\n3\n4\n5\n6\n"
    assert "MB" in sent and rows_of(sent, 40) == ["", ""]


def test_handlers_and_streams_are_their_own_again():
    after = """
        assert sys.stderr is sys.__stderr__ and sys.stdout is sys.__stdout__
        assert logging.getLogger().handlers[0].stream is sys.__stderr__
        logging.info("after")
    """
    assert "after" in rows_of(on_a_terminal(40, after=after), 40)


def test_a_forked_worker_writes_past_the_line():
    """It has neither the thread that draws nor the locks that it may have held."""
    during = """
        if step == 3 and os.fork() == 0:
            assert sys.stderr is sys.__stderr__
            logging.info("from a worker")
            os._exit(0)
    """
    assert "from a worker" in on_a_terminal(40, textwrap.dedent(during).strip().replace("\n", "\n        "))


@pytest.mark.parametrize(("terminal", "term", "rank"), [(False, "xterm", 0), (True, "dumb", 0), (True, "xterm", 1)])
def test_no_line_where_it_cannot_be_drawn_or_another_rank_draws_it(monkeypatch, terminal, term, rank):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(orthotrain.console.terminal.rank_zero_only, "rank", rank, raising=False)
    assert not is_interactive()
    monkeypatch.setattr(orthotrain.console.terminal.rank_zero_only, "rank", 0)
    monkeypatch.setenv("TERM", "xterm")
    assert is_interactive() == terminal
