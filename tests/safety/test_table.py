"""Every row of the table: a hostile or damaged input, a command, and how that must end.

``make test`` runs a part of each kind, ``make safety`` (ORTHOTRAIN_SAFETY=all) every row.
"""

import shutil

import pytest
from hostile.harness import faults
from hostile.rows import Place, judged
from hostile.table import COMMANDS, KINDS, ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row(row, server, good, tmp_path):
    place = Place(tmp_path / "row", good)
    call = row.make(place)
    before = judged(place, call)
    outcome = server.run(place.folder, call.arguments, call.entry, call.closed, call.links)
    wrong = faults(outcome, row.codes, row.names, silent=2 in call.closed)
    after = judged(place, call)
    wrong += [f"it changed what is {name}: {_difference(before[name], after[name])}" for name in before
              if before[name] != after[name]]  # fmt: skip
    shutil.rmtree(place.folder)
    assert not wrong, "\n".join([row.id, *wrong])


def _difference(before, after):
    if not isinstance(before, dict):
        return after
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)][:9]


def test_the_table_is_whole():
    assert len(ROWS) >= 500
    assert {row.kind for row in ROWS} == KINDS
    assert {row.command for row in ROWS} == COMMANDS
    assert len({row.id for row in ROWS}) == len(ROWS)
