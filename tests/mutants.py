"""Changes one operator, constant or statement of a source file at a time, and prints the changes that no test notices.

    .venv/bin/python tests/mutants.py kernels/dispatch.py framework/cli/plan.py -- tests/kernels tests/framework/cli
    TRITON_INTERPRET=1 .venv/bin/python tests/mutants.py kernels/*/triton.py -- tests/kernels/interpreted

What follows ``--`` goes to pytest. No file is changed, and processes that tests start do not see the changes.
"""

import argparse
import ast
import copy
import linecache
import os
import random
import signal
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import lightning.pytorch  # noqa: F401 - these and torch are imported once, and not in each forked process
import pytest
import torch._dynamo  # noqa: F401
import transformers.modeling_utils  # noqa: F401

SWAPS = [("Lt", "LtE"), ("Gt", "GtE"), ("Eq", "NotEq"), ("Is", "IsNot"), ("In", "NotIn"), ("Add", "Sub"),
         ("Mult", "Div"), ("And", "Or"), ("FloorDiv", "Mult"), ("Mod", "Add"), ("Pow", "Mult")]  # fmt: skip
SWAP = {new: old for old, new in SWAPS} | dict(SWAPS)


def changes(node):
    """Yield changed copies of one node."""
    changed = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and (new := SWAP.get(type(node.ops[0]).__name__)):
        changed.ops[0] = getattr(ast, new)()
        yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and (new := SWAP.get(type(node.op).__name__)):
        changed.op = getattr(ast, new)()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp):
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def places(node):
    """Yield each node inside of a node with the container and the key that hold it, without messages of errors."""
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            holder, items = (value, enumerate(value)) if isinstance(value, list) else (vars(node), [(field, value)])
            for key, child in list(items):
                if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                    yield child, holder, key
                    yield from places(child)


def mutants(path):
    """Yield line, description and the text of the whole file for every change of a file."""
    tree = ast.parse(path.read_text())
    for node, holder, key in list(places(tree)):
        for changed in changes(node):
            holder[key] = changed
            text, (before, after) = ast.unparse(tree), (ast.unparse(n).splitlines()[0][:60] for n in (node, changed))
            holder[key] = node
            yield getattr(node, "lineno", 0), f"{before}  ->  {after}", text


def survives(path, text, tests, seconds):
    """Run the tests in a forked process in which a file has another text; tell whether all have passed."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    plain = SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda self, name: (
        compile(text, self.path, "exec") if Path(self.path).resolve() == path else plain(self, name)
    )
    # triton reads the source of a kernel; an entry without a time is not compared with the file
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    signal.alarm(int(seconds))
    with open(os.devnull, "w") as sys.stdout:
        os._exit(pytest.main(["-x", "-W", "ignore", *tests]))


if __name__ == "__main__":
    split = (*sys.argv, "--").index("--")
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given, tests, start = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :], time.monotonic()
    assert survives(Path(), "", tests, 3600), "the tests fail without any change"
    seconds = 10 + 3 * (time.monotonic() - start)
    every = [(path.resolve(), *found) for path in given.files for found in mutants(path)]
    drawn = sorted(random.Random(given.seed).sample(every, min(given.sample, len(every))))
    lived = [change for change in drawn if survives(change[0], change[3], tests, seconds)]
    print(*(f"{os.path.relpath(path)}:{line}: {what}" for path, line, what, _ in lived), sep="\n")
    print(f"{len(drawn) - len(lived)} of {len(drawn)} changes were noticed; {len(every)} were possible")
