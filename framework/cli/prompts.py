"""Own prompts to the network of a checkpoint: ``orthotrain predict --prompts`` and ``orthotrain chat``."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.console.failures import naming
from orthotrain.console.progress import waiting
from orthotrain.data import stored_tokenizer
from orthotrain.data.instructions.causal import PLAIN_TEMPLATE
from orthotrain.data.instructions.template_renderer import TemplateError, TemplateRenderer
from orthotrain.errors import ConfigurationError
from orthotrain.export import load_network
from orthotrain.files.paths import check_regular_file, local_path
from orthotrain.models.network_checks import generated_tokens, is_encoder_decoder

MOST_BYTES = 64 << 20
"""Largest file of prompts."""

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


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

    A conversation is written by the tokenizer's chat template. A text is written by the ``prompt_template`` of the run,
    else by the chat template as a message of the user, else as it is.

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
        self._render = TemplateRenderer(tokenizer)
        self.template = None if raw else _prompt_template(contents, tokenizer, is_encoder_decoder(network))
        self.chats = bool(tokenizer.chat_template) and self.template is None and not raw

    def __call__(self, prompt: Prompt) -> str:
        """Return the answer to a prompt.

        Raises:
            ConfigurationError: The prompt is empty or too long, or the chat template refuses it.
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
            text = prompt if self.template is None else self.template.replace("{prompt}", prompt)
            ids = list(self.tokenizer(text)["input_ids"])
            ends = ids[-1:] == [self.tokenizer.eos_token_id] and not is_encoder_decoder(self.network)
            return ids[:-1] if ends else ids
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not self.tokenizer.chat_template:
            raise ConfigurationError("a prompt of messages: the tokenizer has no chat template; give texts")
        try:
            (rendered,) = self._render([(messages, True)])
        except TemplateError as error:
            raise ConfigurationError(f"the chat template refuses a prompt: {error}") from error
        return list(self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"])


def _prompt_template(contents: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seq2seq: bool) -> str | None:
    """Return the text around prompts that the run was trained with; None for none, or for the chat template."""
    states = [state for state in contents.values() if isinstance(state, dict) and "tokenizer_fingerprint" in state]
    settings = states[0].get("settings") if states else None
    if not isinstance(settings, dict) or "prompt_template" not in settings:
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


def read_prompts(given: Iterable[str]) -> Iterator[Prompt]:
    """Yield the prompts of the command line.

    Args:
        given: Texts, and names of files: ``.txt`` with a prompt a line, ``.jsonl`` with a text, ``{"prompt": text}`` or
            ``{"messages": [...]}`` a line.

    Raises:
        ConfigurationError: A file cannot be read, or a line has none of these.
    """
    for text in given:
        suffix = Path(text).suffix if len(text) < 256 and "\n" not in text else ""
        if suffix not in (".txt", ".jsonl"):
            yield text
            continue
        path = local_path(text, "--prompts")
        check_regular_file(path, "file of prompts")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigurationError(f"file of prompts {text!r}: is larger than {MOST_BYTES >> 20} MiB; split it")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"file of prompts {text!r}: is not UTF-8") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield line if suffix == ".txt" else _row(line, f"file of prompts {text!r}, line {number}")


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: is not JSON") from error
    prompt: Any = row.get("prompt", row.get("messages")) if isinstance(row, dict) else row
    chat = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not (isinstance(prompt, str) or chat):
        raise ConfigurationError(f'{where}: has no prompt; write {{"prompt": text}}, or {{"messages": [...]}}')
    return prompt


def predict(answer: Answerer, prompts: Iterable[Prompt], out: Path | None = None) -> None:
    """Print a JSON line with ``prompt`` and ``continuation`` for each prompt, or write the lines to a new file.

    Raises:
        ConfigurationError: The file exists, or as :class:`Answerer`.
    """
    if out is not None and out.exists():
        raise ConfigurationError(f"--out {str(out)!r}: exists; give another name")
    lines = (json.dumps({"prompt": prompt, "continuation": answer(prompt)}, ensure_ascii=False) for prompt in prompts)
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
