"""Own prompts to a checkpoint: texts, files and conversations, in the form of the training data; the chat."""

import io
import json
import sys

import pytest
import torch

from orthotrain.cli.main import main
from orthotrain.cli.prompts import Answerer, Sampling, chat, predict, read_prompts
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
    with pytest.raises(ConfigurationError, match="the chat template refuses a prompt: .*no"):
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


def test_prompts_are_texts_and_lines_of_files(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffone\n\ntwo\n")
    chatted = [{"role": "user", "content": "x"}]
    rows = ["a", {"prompt": "b"}, {"messages": chatted}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(read_prompts(["zero", str(tmp_path / "p.txt")])) == ["zero", "one", "two"]
    assert list(read_prompts([str(tmp_path / "p.jsonl")])) == ["a", "b", chatted]
    for content, said in (
        ("{", "line 1: is not JSON"),
        ('"a"\n{"text": 1}', "line 2: has no prompt"),
        ("[1]", "no pro"),
    ):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(ConfigurationError, match=said):
            list(read_prompts([str(tmp_path / "p.jsonl")]))
    with pytest.raises(ConfigurationError, match="file of prompts .*gone.txt' cannot be read"):
        list(read_prompts([str(tmp_path / "gone.txt")]))


def test_the_commands(parts, tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(parts[0], checkpoint)
    main(["predict", "--ckpt_path", str(checkpoint), "--prompts", "to", "or", "--max_new_tokens", "4"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in printed] == ["to", "or"]
    out = tmp_path / "out.jsonl"
    predict(lambda prompt: prompt * 2, ["ab"], out)
    assert json.loads(out.read_text()) == {"prompt": "ab", "continuation": "abab"}
    with pytest.raises(ConfigurationError, match="exists; give another name"):
        predict(str, [], out)
    with pytest.raises(SystemExit):
        main(["predict", "-c", "pretrain/quickstart.yaml", "--prompts", "a", "--ckpt_path", str(checkpoint)])
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
