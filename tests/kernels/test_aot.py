"""The Triton kernels compile for every generation of GPU: no spills, tensor cores in use, registers as committed.

After a change of a kernel: python tests/kernels/aot.py --op OP --write, and look at the difference.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_spec = importlib.util.spec_from_file_location("orthotrain_aot", Path(__file__).with_name("aot.py"))
aot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot)

SLACK = 8
"""Registers that a kernel may differ by from the table: the step in which they are allocated to a warp."""


def test_the_table_holds_the_operations_that_have_kernels():
    committed = json.loads(aot.TABLE.read_text())["kernels"]
    assert {key.split("/")[0] for key in committed} == set(aot.operations())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton ships its assembler for Linux")
@pytest.mark.parametrize("op", aot.operations())
def test_compiled_kernels_are_as_committed(op):
    import triton

    table = json.loads(aot.TABLE.read_text())
    committed = {key: entry for key, entry in table["kernels"].items() if key.split("/")[0] == op}
    found = aot.compiled(op)
    assert set(found) == set(committed)
    for key, entry in found.items():
        assert entry["spills"] == 0, f"{key} spills"
        assert entry["tensor_cores"] or not entry["wants_tensor_cores"], f"{key} has no tensor-core instruction"
        assert not (entry["wants_vectors"] and entry["narrow"]), f"{key} moves 2 bytes at a time"
        assert entry["shared"] <= aot.SHARED_LIMIT, key
        if triton.__version__ == table["triton"]:
            assert abs(entry["registers"] - committed[key]["registers"]) <= SLACK, key
            assert entry["shared"] == committed[key]["shared"], key
