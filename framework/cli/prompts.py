"""Own prompts to the network of a checkpoint: ``orthotrain predict --prompts`` and ``orthotrain chat``."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.cli.prompt_files import Prompt, PromptRow
from orthotrain.console.failures import naming
from orthotrain.console.progress import waiting
from orthotrain.data import stored_tokenizer
from orthotrain.data.instructions.causal import PLAIN_TEMPLATE
from orthotrain.data.instructions.examples import Columns, Example
from orthotrain.data.instructions.prompts import parse_prompt
from orthotrain.data.instructions.turns import ChatTurns
from orthotrain.data.instructions.used_keys import UsedKeys
from orthotrain.errors import ConfigurationError
from orthotrain.export import load_network
from orthotrain.files.paths import local_path
from orthotrain.models.network_checks import generated_tokens, is_encoder_decoder


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Tokens are drawn from the smallest set with this probability.
        seed: Seed of each answer.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise ConfigurationError(f"--{name} {getattr(self, name)}: must be {wanted}")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


class Answerer:
    """The network of a checkpoint with its tokenizer. It answers prompts in the form of its training data.

    A conversation is written by the tokenizer's chat template, with the checks of training. A text is written by the
    ``prompt_template`` of the run, else by the chat template as a message of the user, else as it is.

    Args:
        contents: Result of ``read_checkpoint``.
        network: The network of the checkpoint.
        sampling: How tokens are drawn.
        raw: Whether texts are continued as they are.

    Raises:
        ConfigurationError: The checkpoint has no tokenizer, or its network does not generate text.
    """

    def __init__(self, contents: dict[str, Any], network: nn.Module, sampling: Sampling, raw: bool = False) -> None:
        tokenizer = stored_tokenizer(contents)
        if tokenizer is None:
            raise ConfigurationError("the checkpoint holds no tokenizer, so it cannot read a text")
        if not hasattr(network, "generate"):
            raise ConfigurationError(f"{type(network).__name__} is no network of transformers that generates text")
        self.network, self.tokenizer, self.sampling = network, tokenizer, sampling
        self._turns = ChatTurns(tokenizer)
        self._used_keys = UsedKeys(self._turns)
        settings = _data_settings(contents)
        self._columns = _columns(settings)
        self.template = None if raw else _prompt_template(settings, tokenizer, is_encoder_decoder(network))
        self.chats = bool(tokenizer.chat_template) and self.template is None and not raw

    def __call__(self, prompt: Prompt) -> str:
        """Return the answer to a prompt.

        Raises:
            ConfigurationError: The prompt is empty or too long, no prompt, or the chat template refuses it.
        """
        ids = self._tokens(prompt)
        room = getattr(self.network.config, "max_position_embeddings", None)
        new = self.sampling.max_new_tokens
        if isinstance(room, int) and not is_encoder_decoder(self.network):
            new = min(new, room - len(ids))
        if not ids or new < 1:
            raise ConfigurationError(f"a prompt of {len(ids)} tokens: the network reads 1 to {(room or 2) - 1}")
        batch = torch.tensor([ids], device=next(self.network.parameters()).device)
        torch.manual_seed(self.sampling.seed)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        with torch.no_grad():
            output: Any = self.network.generate(  # type: ignore[operator]
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, pad_token_id=pad,
                eos_token_id=self.tokenizer.eos_token_id, **self.sampling.arguments,
            )  # fmt: skip
        answer = generated_tokens(self.network, output[0], len(ids))
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not self.chats:
            return self._text_tokens(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        row = messages if isinstance(messages, PromptRow) else PromptRow(messages)
        example = parse_prompt(row.value, row.where, self._columns)
        if example.is_chat or self.chats:
            return self._chat_tokens(example)
        if example.tools or len(example.messages) > 2:
            extra = "tools" if example.tools else "system"
            raise ConfigurationError(f"{row.where}: has {extra!r}, which only a chat template writes; leave it out")
        return self._text_tokens(example.messages[0]["content"])

    def _text_tokens(self, prompt: str) -> list[int]:
        text = prompt if self.template is None else self.template.replace("{prompt}", prompt)
        ids = list(self.tokenizer(text)["input_ids"])
        ends = ids[-1:] == [self.tokenizer.eos_token_id] and not is_encoder_decoder(self.network)
        return ids[:-1] if ends else ids

    def _chat_tokens(self, example: Example) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ConfigurationError("a prompt of messages: the tokenizer has no chat template; give texts")
        messages = self._used_keys.messages(example)[:-1]  # without the placeholder of the answer
        (rendered,) = self._turns.render([(messages, True)], example)
        return list(self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"])


def _data_settings(contents: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the data module that a checkpoint holds."""
    states = [state for state in contents.values() if isinstance(state, dict) and "tokenizer_fingerprint" in state]
    settings = states[0].get("settings") if states else None
    return settings if isinstance(settings, dict) else {}


def _columns(settings: dict[str, Any]) -> Columns:
    names = {name: settings.get(f"{name}_column") for name in ("prompt", "response", "messages")}
    ignored = settings.get("ignored_keys")
    ignored = tuple(map(str, ignored)) if isinstance(ignored, list | tuple) else ()
    return Columns(**{key: name for key, name in names.items() if isinstance(name, str)}, ignored=ignored)


def _prompt_template(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seq2seq: bool) -> str | None:
    """Return the text around prompts that the run was trained with; None for none, or for the chat template."""
    if "prompt_template" not in settings:
        return None
    template = settings["prompt_template"]
    if isinstance(template, str):
        return template
    return None if tokenizer.chat_template or seq2seq else PLAIN_TEMPLATE


def answerer(checkpoint: str, sampling: Sampling, raw: bool = False, **given: Any) -> Answerer:
    """Read a checkpoint, on a GPU if there is one.

    Args:
        checkpoint: A ``.ckpt`` file, or a run folder, whose newest checkpoint is read.
        sampling: How tokens are drawn.
        raw: As for :class:`Answerer`.
        given: Arguments of :func:`~orthotrain.export.load_network`.

    Raises:
        ConfigurationError: The checkpoint cannot be read, or its network cannot be built.
    """
    path = local_path(checkpoint, "--ckpt_path")
    if path.is_dir():
        found, _ = newest_good_checkpoint([path, path / "checkpoints"])
        path = found or path
    with waiting("reading the checkpoint"):
        contents = read_checkpoint(path)
        network = load_network(contents, str(path), **given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Answerer(contents, network.to(device), sampling, raw)


def predict(answer: Answerer, prompts: Iterable[Prompt], out: Path | None = None) -> None:
    """Print a JSON line with ``prompt`` and ``continuation`` for each prompt, or write the lines to a new file.

    Raises:
        ConfigurationError: The file exists, or as :class:`Answerer`.
    """
    if out is not None and out.exists():
        raise ConfigurationError(f"--out {str(out)!r}: exists; give another name")
    answered = ((prompt.value if isinstance(prompt, PromptRow) else prompt, answer(prompt)) for prompt in prompts)
    lines = (json.dumps({"prompt": given, "continuation": text}, ensure_ascii=False) for given, text in answered)
    if out is None:
        for line in lines:
            print(line, flush=True)
        return
    with naming(out), out.open("x", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def chat(answer: Answerer, read: Callable[[str], str] = input) -> None:
    """Talk with a network in the terminal, until ``/quit`` or the end of the input; ``/new`` forgets everything.

    Args:
        answer: The network. Without a chat template it continues the text of the conversation.
        read: Prints a prompt, and returns a line of the user.
    """
    messages: list[dict[str, Any]] = []
    print("/new starts again, /quit ends", flush=True)
    while True:
        try:
            line = read("> ")
        except EOFError:
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/new":
            messages.clear()
        elif line.strip():
            messages.append({"role": "user", "content": line})
            whole = "".join(message["content"] for message in messages)
            reply = answer(messages if answer.chats else line if answer.template else whole)
            messages.append({"role": "assistant", "content": reply})
            print(reply, flush=True)
