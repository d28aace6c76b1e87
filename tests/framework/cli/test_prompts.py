"""Own prompts to a checkpoint: texts, files and conversations, in the form of the training data; the chat."""

import io
import json
import sys

import pytest
import torch

from orthotrain.cli.main import main
from orthotrain.cli.prompt_files import PromptRow, read_prompts
from orthotrain.cli.prompts import Answerer, Sampling, chat, predict
from orthotrain.data.tokenizer_state import tokenizer_state
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM
from orthotrain.modules import PoetLayers, PoetModule

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def parts():
    """The contents of a checkpoint, and its network."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    description = {"config": {**sizes, "vocab_size": 300, "max_position_embeddings": 64}}
    module = PoetModule(CausalLM(**description), PoetLayers(block_size=8), 2)
    module.configure_model()
    tokenizer = train_tokenizer(["to be or not to be"] * 9, 264)
    arguments = {"model": {"class_path": "orthotrain.CausalLM", "init_args": description}, "layers": {"block_size": 8}}
    contents = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"class_path": "orthotrain.PoetModule", "init_args": {**arguments, "merge_every": 2}},
        "TextData": tokenizer_state(tokenizer),
        "pytorch-lightning_version": "2.6.0",
    }
    module.on_save_checkpoint(contents)
    return contents, module.model.eval()


def with_data(parts, template=None, **settings):
    """The contents with another chat template and other settings of the data."""
    contents, network = parts
    return {**contents, "TextData": {**contents["TextData"], "chat_template": template, "settings": settings}}, network


def seen_by(answer, prompt):
    """Return the text that the network reads for a prompt."""
    return answer.tokenizer.decode(answer._tokens(prompt))


def test_a_prompt_is_written_as_the_training_data_were(parts):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    plain = Answerer(*parts, Sampling())
    assert seen_by(plain, "to be") == "to be" and not plain.chats
    with pytest.raises(ConfigurationError, match="the tokenizer has no chat template; give texts"):
        plain(messages)
    assert seen_by(Answerer(*with_data(parts, prompt_template=None), Sampling()), "to be") == "to be\n"
    chatting = Answerer(*with_data(parts, TEMPLATE, prompt_template=None), Sampling())
    assert chatting.chats and seen_by(chatting, "to be") == "[user]to be[a]"
    assert seen_by(chatting, messages) == "[user]a[assistant]b[user]c[a]"
    framed = Answerer(*with_data(parts, TEMPLATE, prompt_template="Q: {prompt} A:"), Sampling())
    assert seen_by(framed, "to be") == "Q: to be A:" and seen_by(framed, messages).endswith("[user]c[a]")
    assert seen_by(Answerer(*with_data(parts, TEMPLATE), Sampling(), raw=True), "to be") == "to be"
    refusing = Answerer(*with_data(parts, "{{ raise_exception('no') }}", prompt_template=None), Sampling())
    with pytest.raises(ConfigurationError, match=r"the chat template refuses the messages \(.*no"):
        refusing("x")


def test_sampling_is_set_and_seeded(parts, monkeypatch):
    once, again = (Answerer(*parts, Sampling(8, 1.0, 1.0, seed=3)) for _ in range(2))
    assert once("to be") == again("to be") != Answerer(*parts, Sampling(8, 1.0, 1.0, seed=4))("to be")
    greedy = [Answerer(*parts, Sampling(8, 0.0, 0.5, seed=seed))("to be") for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    given = []
    monkeypatch.setattr(type(once.network), "generate", lambda self, ids, **more: given.append(more) or ids)
    Answerer(*parts, Sampling(500, 0.5, 0.25))("to be")
    assert given[0]["temperature"] == 0.5 and given[0]["top_p"] == 0.25 and given[0]["do_sample"]
    assert given[0]["max_new_tokens"] < 64, "the network reads 64 tokens"
    for text in ("", "to be or not " * 40):
        with pytest.raises(ConfigurationError, match="tokens: the network reads 1 to 63"):
            once(text)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigurationError, match=f"--{next(iter(wrong))} .*: must be"):
            Sampling(**wrong)


CALL = {"function": {"name": "f", "arguments": '{"city": "R"}'}}
TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def test_a_row_is_written_as_a_row_of_the_training_data(parts):
    names = {"prompt_column": "question", "ignored_keys": ["id"]}
    answer = Answerer(*with_data(parts, TOOLS_TEMPLATE, prompt_template=None, **names), Sampling())
    user, called = (
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    )
    row = {"messages": [user, called, {"role": "tool", "content": "7", "id": 3}], "tools": [{"name": "f"}]}
    assert seen_by(answer, PromptRow(row)) == '<f>[user]q[assistant]f{"city": "R"}[tool]7[a]'
    assert seen_by(answer, PromptRow({"conversations": [{"from": "human", "value": "q"}]})) == "[user]q[a]"
    for key in ("prompt", "question"):
        assert seen_by(answer, PromptRow({key: "q", "system": "s"})) == "[system]s[user]q[a]"
    alpaca = Answerer(*with_data(parts, TOOLS_TEMPLATE, prompt_template=None), Sampling())
    assert "q\n\n### Input:\nx" in seen_by(alpaca, PromptRow({"instruction": "q", "input": "x"}))
    for value, said in (
        ([user, {"role": "assistant", "content": "x"}], "p, line 1: the conversation ends with the assistant"),
        ({"messages": [{**user, "reasoning": "x"}]}, "does not write 'reasoning'"),
        ({"text": 1}, "p, line 1: has no prompt"),
        ([1], "message 1: must be an object"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            answer(PromptRow(value, "p, line 1"))
    plain = Answerer(*parts, Sampling())
    assert seen_by(plain, PromptRow({"prompt": "to be", "response": "x"})) == "to be"
    with pytest.raises(ConfigurationError, match="has 'system', which only a chat template writes; leave it out"):
        plain(PromptRow({"prompt": "to be", "system": "s"}))


def test_prompts_are_texts_and_lines_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.TXT").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntw\x0co\r\n")
    (tmp_path / "p.json").write_text("{}")
    chatted = {"messages": [{"role": "user", "content": "x\u2028y"}]}
    rows = ["a", {"prompt": "b"}, chatted]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    texts = ["zero", "Please read notes.txt", "e.g. this", ""]
    assert list(read_prompts([*texts, "p.TXT"])) == [*texts, "one", "tw\x0co"]
    where = "file of prompts 'p.jsonl', line 3"
    assert list(read_prompts(["p.jsonl"])) == ["a", "b", PromptRow(chatted, where)]
    for content, said in (("{", "line 1: is not JSON"), ("\n \n", "holds no prompt; write one a line")):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(ConfigurationError, match=said):
            list(read_prompts(["p.jsonl"]))
    for name, said in (("gone.txt", "cannot be read"), ("p.json", "are read from .txt and .jsonl")):
        with pytest.raises(ConfigurationError, match=f"file of prompts '{name}'.* {said}"):
            list(read_prompts([name]))


def test_the_commands(parts, tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(parts[0], checkpoint)
    main(["predict", "--ckpt_path", str(checkpoint), "--prompts", "to", "--max_new_tokens", "4", "--prompts", "or"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in printed] == ["to", "or"]
    out = tmp_path / "out.jsonl"
    predict(lambda prompt: prompt * 2, ["ab"], out)
    assert json.loads(out.read_text()) == {"prompt": "ab", "continuation": "abab"}
    with pytest.raises(ConfigurationError, match="exists; give another name"):
        predict(str, [], out)
    with pytest.raises(SystemExit):
        main(["predict", "-c", "pretrain/poet_quickstart.yaml", "--prompts", "a", "--ckpt_path", str(checkpoint)])
    assert "takes no config" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("to be\n/new\nor\n/quit\nnever read\n"))
    main(["chat", "--ckpt", str(tmp_path / "run"), "--max_new_tokens", "4", "--temperature", "0"])
    said = capsys.readouterr().out
    assert said.startswith("/new starts again, /quit ends\n") and sys.stdin.read() == "never read\n"


def test_a_chat_remembers_until_new(capsys):
    class Echo:
        chats, template = True, None

        def __call__(self, messages):
            return " ".join(message["content"] for message in messages)

    lines = ["a", " ", "b", "/new", "c"]

    def read(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    chat(Echo(), read)
    assert capsys.readouterr().out.splitlines()[1:] == ["a", "a a b", "c"]
