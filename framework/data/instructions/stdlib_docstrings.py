"""Instruction data that comes with Python: functions of the standard library and their docstrings."""

import ast
import functools
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orthotrain.data.instructions.examples import Example
from orthotrain.data.stdlib_files import stdlib_files, stdlib_split_keys, stdlib_texts

STDLIB_DOCSTRINGS = "python-stdlib-docstrings"
INSTRUCTION = "Write the docstring of this Python function.\n\n"

SOURCE_LINES = (3, 40)
SOURCE_CHARACTERS = 1500
RESPONSE_CHARACTERS = (20, 400)
_BEGINNING = 3
"""Words by which the places of an answer are found; a shorter answer says too little to be one."""
_WORD = re.compile(r"\w+")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Words = tuple[str, ...]


@dataclass(frozen=True)
class DocumentedFunction:
    """A function of the standard library and its docstring.

    Attributes:
        file: Relative name of its file.
        group: Key of the split of its file.
        name: Name of the function.
        source: Its source without the docstring.
        answer: The first paragraph of the docstring, in one line.
    """

    file: str
    group: str
    name: str
    source: str
    answer: str


def docstring_examples() -> Iterator[Example]:
    """Yield functions of the standard library as prompts, with the first paragraph of their docstring as response."""
    for function in documented_functions():
        messages = (
            {"role": "user", "content": INSTRUCTION + function.source},
            {"role": "assistant", "content": function.answer},
        )
        where = f"{STDLIB_DOCSTRINGS}, {function.file}, {function.name}"
        yield Example(where, messages, is_chat=False, group=function.group)


@functools.cache
def documented_functions() -> tuple[DocumentedFunction, ...]:
    """Return the functions of the standard library whose source and docstring stand on one side of every split.

    A function has 3 to 40 lines and its paragraph 20 to 400 characters and three words or more; each pair comes once,
    in the order of the files. A pair is left out if its paragraph, word for word, or its source is also in a file of
    another group (see `stdlib_split_keys`), because a split may hold out one of the two: 4,045 of 4,242 pairs of Python
    3.11 remain.
    """
    keys, found = stdlib_split_keys(), dict[tuple[str, str], DocumentedFunction]()
    groups_of_source = defaultdict[Words, set[str]](set)
    for path, file in stdlib_files():
        for name, source, answer in functions_with_docstrings(path.read_bytes()):
            found.setdefault((source, answer), DocumentedFunction(file, keys[file], name, source, answer))
            groups_of_source[_words(source)].add(keys[file])
    texts = ((text, keys[file]) for file, text in stdlib_texts())
    groups_of_answer = _groups_of_answers({_words(function.answer) for function in found.values()}, texts)
    return tuple(
        function
        for function in found.values()
        if groups_of_answer[_words(function.answer)] == groups_of_source[_words(function.source)] == {function.group}
    )


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text.lower()))


def _groups_of_answers(answers: set[Words], texts: Iterable[tuple[str, str]]) -> Mapping[Words, set[str]]:
    """Return for each answer the groups whose texts hold it; ``texts`` are pairs of text and group."""
    beginnings = defaultdict[Words, list[Words]](list)
    for answer in answers:
        beginnings[answer[:_BEGINNING]].append(answer)
    found = defaultdict[Words, set[str]](set)
    for text, group in texts:
        words = _words(text)
        for place, beginning in enumerate(zip(words, words[1:], words[2:], strict=False)):
            for answer in beginnings.get(beginning, ()):
                if words[place : place + len(answer)] == answer:
                    found[answer].add(group)
    return found


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
