"""YAML, JSON, templates, tokenizers, corpora and prompts that ask for memory or time without bound."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile import pickles
from hostile.rows import EITHER, Call, Place, Row

KIND = "text bomb"
DEEP = 100_000


def _laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


YAMLS = {
    "aliases": f"{_laughs(12)}\nmodel: *a11\n",
    "aliases of dictionaries": "x: &c0 {k: v}\n" + "".join(
        f"z{n}: &c{n} {{a: *c{n - 1}, b: *c{n - 1}}}\n" for n in range(1, 40)) + "model: *c39\n",
    "merge keys": "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1,
    30)) + "model: *a29\n",
    "list in itself": "model: &a [*a]\n", "dictionary in itself": "model: &a {init_args: *a}\n",
    "trainer in itself": "trainer: &a\n  callbacks: [*a]\n", "lists in lists": "model: " + "[" * DEEP + "]" * DEEP,
    "dictionaries in dictionaries": "model: " + "{a: " * 5000 + "}" * 5000,
    "indents": "".join(" " * n + "a:\n" for n in range(3000)),
    "python object": "model: !!python/object/apply:os.mkdir [{sprung}]\n",
    "python name": "model: !!python/name:os.system\n", "long text": "model: " + "x" * (1 << 24),
    "many documents": "a: 1\n---\n" * 1000, "control characters": "model: \"a\x1b[2Jb\"\n",
    "number of digits": "trainer: {max_steps: " + "9" * 5000 + "}\n",
    "sexagesimal": "trainer: {max_steps: " + ":".join(["59"] * 3000) + "}\n",
    "date": "trainer: {max_steps: 9999-99-99}\n", "nul": "model: a\0b\n", "binary": "\x89PNG\r\n\x1a\n",
    "list": "[1, 2]\n",
}  # fmt: skip

TEMPLATES = {
    "power": "{{ 'x' * 10**10 }}", "powers of powers": "{{ 9**9**9**9 }}",
    "nested ranges": "{% for a in range(99999) %}" * 4 + "x" +
    "{% endfor %}" * 4,
    "long range": "{% for a in range(10**12) %}{% endfor %}", "center": "{{ 'x'.center(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}", "format method": "{{ '{:>10000000000}'.format(1) }}",
    "list times": "{{ [0] * 10**10 }}", "join": "{{ ('x' * 10**5).join('y' * 10**6) }}",
    "replace": "{{ ('x' * 10**5).replace('x', 'y' * 10**6) }}",
    "growing": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('SPRUNG') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ''|attr('__class__') }}", "include": "{% include '/etc/passwd' %}",
    "raise": "{{ raise_exception('\x1b]0;owned\x07 no') }}", "syntax": "{% for %}",
    "open": "{{ open('SPRUNG', 'w') }}", "json": "{{ range(10**9)|list|tojson }}",
    "batch": "{{ range(10**9)|batch(2)|list }}", "indent": "{{ 'x\n' * 10**5 | indent(10**6) }}", "not text": 3,
    "lists": [["a"]],
}  # fmt: skip


def rows() -> Iterator[Row]:
    """All of them."""
    for name, text in YAMLS.items():

        def configured(place, text=text):
            return Call(["fit", "-c", place.write("bad.yaml", text.replace("{sprung}", str(place.sprung)))])

        yield Row(
            KIND,
            f"yaml {name}",
            "fit",
            configured,
            names=("bad.yaml", "model", "max_steps", "a0", "trainer", "key", "callbacks"),
        )
    for name in ("aliases", "list in itself", "lists in lists"):
        value = YAMLS[name].replace("model: ", "").splitlines()[-1] if name != "aliases" else json.dumps(["x"])
        yield Row(KIND, f"option {name}", "fit", lambda place, value=value: Call(
            ["fit", "-c", place.config(), "--model.layers.overrides", value]), names=("overrides", "layers",
            "model"))  # fmt: skip
        yield Row(KIND, f"yaml {name}", "plan", lambda place, name=name: Call(["plan", "-c", place.write("bad.yaml",
        YAMLS[name])]),
                  names=("bad.yaml", "model", "a0", "key"))  # fmt: skip
    for name, template in TEMPLATES.items():
        if isinstance(template, str) and "SPRUNG" not in template and len(name) % 3 == 0:
            yield Row(KIND, f"template {name} of a checkpoint", "tokenizer", lambda place,
            t=template: _from_checkpoint(place, t),
                      EITHER, ("template", "bad", "rows"))  # fmt: skip
        yield Row(
            KIND,
            f"template {name}",
            "fit",
            lambda place, t=template: _templated(place, t),
            EITHER,
            ("template", "bad", "rows"),
        )
    yield from token_rows()
    yield from corpus_rows()


def _messages(place: Place) -> Path:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}
    return place.write("rows.jsonl", f"{json.dumps(row)}\n" * 40)


def _templated(place: Place, template: Any) -> Call:
    folder = place.copy("model", "bad")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = template.replace("SPRUNG", str(place.sprung)) if isinstance(template, str) else template
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    changes = {"data.init_args.tokenizer": str(folder), "data.init_args.source": str(_messages(place))}
    return Call(["fit", "-c", place.config("finetune", changes)])


def _from_checkpoint(place: Place, template: str) -> Call:
    contents = place.contents()
    contents["TextData"]["chat_template"] = template
    changes = {"data.init_args.tokenizer": str(place.save(contents)), "data.init_args.source": str(_messages(place))}
    return Call(["fit", "-c", place.config("finetune", changes)])


TOKENS = {
    "2^31": 1 << 31, "2^31-1": (1 << 31) - 1, "2^32-1": (1 << 32) - 1, "2^32": 1 << 32, "2^63": 1 << 63, "-1": -1,
    "1.5": 1.5, "text": "1", "none": None, "beyond the embedding": 320, "100 million": 10**8,
}  # fmt: skip


def with_token(place: Place, token: Any, added: bool) -> dict[str, Any]:
    """Return the good tokenizer with one token of another number."""
    content = json.loads((place.good.model / "tokenizer.json").read_text())
    if added:
        content["added_tokens"].append({**content["added_tokens"][0], "id": token, "content": "<far>"})
    else:
        content["model"]["vocab"]["a"] = token
    return content


def token_rows() -> Iterator[Row]:
    """Numbers of tokens that no embedding has."""
    for number, (name, token) in enumerate(TOKENS.items()):

        def tuned(place, token=token, added=bool(number % 2)):
            folder = place.copy("model", "bad")
            (folder / "tokenizer.json").write_text(json.dumps(with_token(place, token, added)))
            return Call(["fit", "-c", place.config("finetune", {"data.init_args.tokenizer": str(folder)})])

        def pretrained(place, token=token, added=bool(number % 2 == 0)):
            path = place.write("bad.json", json.dumps(with_token(place, token, added)))
            return Call(["fit", "-c", place.config("pretrain", {"data.init_args.tokenizer": str(path)})])

        yield Row(KIND, f"token {name}", "tokenizer", tuned, EITHER, ("bad", "token", "vocab"))
        yield Row(KIND, f"token {name}", "fit", pretrained, EITHER, ("bad", "token", "vocab"))


def _stream(place: Place, name: str, head: bytes, size: int) -> Path:
    path = place.write(name, head)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


HUGE = 4000 * pickles.MIB
CORPORA = {
    "zeros.json.gz": lambda place: place.write("bad.json.gz", pickles.zeros(HUGE, raw=False)),
    "zeros.jsonl.gz": lambda place: place.write("bad.jsonl.gz", pickles.zeros(HUGE, raw=False)),
    "zeros.txt.gz": lambda place: place.write("bad.txt.gz", pickles.zeros(HUGE, raw=False)),
    "sparse.json": lambda place: _stream(place, "bad.json", b"[", 8 << 30),
    "sparse.jsonl": lambda place: _stream(place, "bad.jsonl", b"{", 8 << 30),
    "sparse.txt": lambda place: _stream(place, "bad.txt", b"text", 8 << 30),
    "sparse.parquet": lambda place: _stream(place, "bad.parquet", b"PAR1", 8 << 30),
    "open text.json": lambda place: place.write("bad.json", b'[{"text": "' + b"a" * (64 * pickles.MIB)),
    "deep.json": lambda place: place.write("bad.json", "[" * 1_000_000),
    "deep.jsonl": lambda place: place.write("bad.jsonl", '{"a":' * DEEP + "\n"),
    "digits.jsonl": lambda place: place.write("bad.jsonl", '{"text": "a", "n": ' + "9" * 100_000 + "}\n"),
    "spaces.json": lambda place: place.write("bad.json", b" " * (1 << 25)),
    "many members.gz": lambda place: place.write("bad.txt.gz", pickles.zeros(16 * pickles.MIB, raw=False) * 300),
    "not gzip": lambda place: place.write("bad.json.gz", b"[]" * 999),
    "numbers.json": lambda place: place.write("bad.json", "[" + "1," * (1 << 20) + "1]"),
}  # fmt: skip


def corpus_rows() -> Iterator[Row]:
    """Corpora and instructions of any size in a small file, and prompts of 16 MiB."""
    for name, write in CORPORA.items():
        for base in ("pretrain", "finetune") if "txt" not in name and "members" not in name else ("pretrain",):

            def read(place, write=write, base=base):
                return Call(["fit", "-c", place.config(base, {"data.init_args.source": str(write(place))})])

            yield Row(KIND, f"corpus {name} {base}", "fit", read, EITHER if name == "digits.jsonl" else (2,))
    texts = {
        "letters": "a" * (16 * pickles.MIB),
        "words": "many words " * (3 << 19),
        "lines": "line\n" * (3 << 20),
        "bytes": "\u00e9\u4e2d" * (3 << 20),
    }
    for name, text in texts.items():
        for column in ("prompt", "response"):

            def prompted(place, text=text, column=column):
                row = {"prompt": "a", "response": "b", column: text}
                path = place.write("bad.jsonl", place.good.rows.read_text() + json.dumps(row) + "\n")
                return Call(["fit", "-c", place.config("finetune", {"data.init_args.source": str(path)})])

            if column == "prompt" or name in ("letters", "words"):
                yield Row(KIND, f"{column} of 16 MiB of {name}", "fit", prompted, EITHER)

    def predicted(place):
        config = place.config("pretrain", {"data.init_args.predict_prompts": ["PROMPT"]})
        config.write_text(config.read_text().replace("PROMPT", "a" * (16 * pickles.MIB)))
        return Call(["predict", "-c", config, "--ckpt_path", place.good.checkpoint])

    yield Row(KIND, "prompt of 16 MiB", "predict", predicted, EITHER, ("prompt", "config"))
