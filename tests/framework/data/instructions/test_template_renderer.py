"""Chat templates are programs: they render in a process that memory and time end, and whose end is one clear line."""

import os
import signal
import time

import pytest

from orthotrain.data.instructions import template_renderer
from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import Example
from orthotrain.data.instructions.layouts import CausalLayout
from orthotrain.data.instructions.template_renderer import TemplateError, TemplateRenderer
from orthotrain.data.instructions.tokenizing import tokenize_rows
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError


def conversation(prompt, response):
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})


CHAT = [*conversation("fox", "dog")]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplied text": "{{ 'x' * 10**10 }}",
    "doubled text": "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "wide format": "{{ '%1000000000000d' % 3 }}",
    "wide center": "{{ 'a'.center(10**11) }}",
    "wide indent": "{{ ('a\n' * 10**6) | indent(10**6) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "growing list": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long text": "{{ 'x' * 17000000 }}",
}


@pytest.fixture
def make_tokenizer():
    def make(template):
        tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 2, 270)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(make_tokenizer, monkeypatch, name):
    monkeypatch.setattr(template_renderer, "SECONDS", 0.0)  # rounded up to one second
    tokenizer = make_tokenizer(HOSTILE[name])
    tokenizer.name_or_path = "their/model"
    with pytest.raises(
        ConfigurationError, match=r"^row: the chat template of tokenizer 'their/model' refuses the messages \(.*$"
    ):
        CausalEncoder(tokenizer)(Example("row", conversation("a", "b"), True))


def test_it_goes_on_after_a_refusal_and_ends_with_its_object(make_tokenizer):
    render = TemplateRenderer(make_tokenizer(PLAIN + "{{ 1 // 0 if messages | length == 1 }}"))
    assert render([(CHAT, False)])[0].text.startswith("fox\ndog\n")
    (pid, _) = render._child
    with pytest.raises(TemplateError, match="zero"):
        render([(CHAT[:1], True)])
    assert render([(CHAT, False)] * 3)[2].text.startswith("fox") and render._child[0] == pid
    del render
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_is_killed_is_one_line_and_a_new_one_takes_its_place(make_tokenizer):
    render = TemplateRenderer(make_tokenizer(PLAIN))
    render([(CHAT, False)])
    os.kill(render._child[0], signal.SIGKILL)
    with pytest.raises(TemplateError, match="its process ended"):
        render([(CHAT, False)])
    assert render([(CHAT, False)]) == [("fox\ndog\n", None)]


def test_an_interrupt_of_the_terminal_does_not_end_it(make_tokenizer):
    render = TemplateRenderer(make_tokenizer(PLAIN))
    render([(CHAT, False)])
    os.kill(render._child[0], signal.SIGINT)
    time.sleep(0.1)
    assert render([(CHAT, False)]) == [("fox\ndog\n", None)]


def test_a_row_that_no_limit_can_hold_is_counted_and_not_tokenized(make_tokenizer, bounded):
    tokenizer = make_tokenizer(None)
    rows = [Example("long", conversation("a b " * (4 << 20), "c"), False)]
    rows.append(Example("short", conversation("a", "c"), False))

    def encode(on_too_long):
        return tokenize_rows(rows, CausalEncoder(tokenizer), lambda _: "train", CausalLayout(64), on_too_long)[
            1
        ].summary()

    for way in ("drop", "truncate"):
        line = bounded(lambda way=way: encode(way), 200 << 20)
        assert "1 rows used, 1 dropped" in line and "1 of them not tokenized, because of their length" in line
    said = bounded(lambda: encode("error"), 200 << 20)
    assert said.startswith(
        "ConfigurationError: long: 16,777,217 characters, longer than max_length 64; raise max_length"
    )


def test_a_prompt_to_continue_is_bounded(make_data):
    data = make_data(predict_prompts=["kato", "a" * (16 << 20)])
    data.setup("predict")
    with pytest.raises(ConfigurationError, match=r"^predict_prompts: prompt 2 has 16,777,216 characters"):
        data.predict_dataloader()
