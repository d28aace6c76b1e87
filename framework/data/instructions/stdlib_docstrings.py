"""Instruction data that comes with Python: functions of the standard library and their docstrings."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from orthotrain.data.instructions.examples import Example
from orthotrain.data.sources import stdlib_files

STDLIB_DOCSTRINGS = "python-stdlib-docstrings"
INSTRUCTION = "Write the docstring of this Python function.\n\n"

SOURCE_LINES = (3, 40)
SOURCE_CHARACTERS = 1500
RESPONSE_CHARACTERS = (20, 400)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring_examples() -> Iterator[Example]:
    """Yield functions of the standard library as prompts, with the first paragraph of their docstring as response.

    The prompt is the function's source without its docstring. A function has 3 to 40 lines and its paragraph 20 to 400
    characters; each pair comes once, in the order of the files: 4,242 pairs of Python 3.11.
    """
    seen: set[tuple[str, str]] = set()
    for path, name in stdlib_files():
        for function, source, response in functions_with_docstrings(path.read_bytes()):
            if (source, response) not in seen:
                seen.add((source, response))
                messages = (
                    {"role": "user", "content": INSTRUCTION + source},
                    {"role": "assistant", "content": response},
                )
                yield Example(f"{STDLIB_DOCSTRINGS}, {name}, {function}", messages, is_chat=False)


def functions_with_docstrings(module: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield the functions of one module that make a sensible pair.

    Args:
        module: The source file.

    Yields:
        The function's name, its dedented source without the docstring, the docstring's first paragraph in one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(module)
            text = module.decode()
    except (SyntaxError, ValueError):  # files of other encodings and templates that are not Python
        return
    lines = re.split(r"\r\n|\r|\n", text)  # the tokenizer's lines; str.splitlines also cuts at form feeds
    for node in ast.walk(tree):
        if isinstance(node, Function) and (response := _first_paragraph(node)) and (source := _source(node, lines)):
            yield node.name, source, response


def _first_paragraph(node: Function) -> str | None:
    docstring = ast.get_docstring(node) or ""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    shortest, longest = RESPONSE_CHARACTERS
    return paragraph if shortest <= len(paragraph) <= longest else None


def _source(node: Function, lines: list[str]) -> str | None:
    docstring, *body = node.body
    assert node.end_lineno is not None and docstring.end_lineno is not None
    if not body or docstring.lineno == node.lineno or body[0].lineno == docstring.end_lineno:
        return None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    source = textwrap.dedent("\n".join(kept)).rstrip()
    fewest, most = SOURCE_LINES
    return source if fewest <= len(kept) <= most and len(source) <= SOURCE_CHARACTERS else None
