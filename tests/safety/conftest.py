"""The harness, the good files, and what a row is run in."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the package hostile

from hostile.good import make_good
from hostile.harness import Server

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*"]  # limits, pidfd and /proc are those of Linux


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("safety_server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def good(server, tmp_path_factory):
    """Made by the processes that the rows run in, so that it also shows that a good input passes in them."""
    folder = tmp_path_factory.mktemp("safety_good")
    done = iter(range(99))

    def run(arguments, entry=""):
        outcome = server.run(folder / "logs" / str(next(done)), arguments, entry)
        assert outcome.code == 0, outcome.stderr
        assert not (outcome.events["program"] or outcome.events["host"])

    return make_good(folder / "good", run)
