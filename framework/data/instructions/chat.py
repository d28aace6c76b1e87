"""From a conversation to tokens, and which of them are responses: the tokens that count in the loss."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.rows import Example
from orthotrain.data.instructions.template_process import TemplateError, TemplateProcess
from orthotrain.data.tokenizer_use import encoding_with
from orthotrain.data.tokenizers import load_tokenizer, tokenizer_from_state
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path
from orthotrain.files.torch_files import describe_file
from orthotrain.models.folder import check_there

PLAIN_TEMPLATE = "{prompt}\n"
_ANY_VOCABULARY = 1 << 31


@dataclass(frozen=True)
class EncodedExample:
    """Tokens of a conversation; the last one is the end-of-text token of the last response.

    Attributes:
        tokens: Length N.
        targets: Length N; whether the token is to be predicted, i.e. belongs to a response.
        prompt_length: Tokens before the last response.
    """

    tokens: list[int]
    targets: list[bool]
    prompt_length: int


def check_template(prompt_template: str) -> str:
    """Return a template that has a place for the prompt.

    Raises:
        ConfigurationError: It has none.
    """
    if "{prompt}" not in prompt_template:
        raise ConfigurationError(
            f"prompt_template {prompt_template!r}: has no place for the prompt; write {{prompt}} where it goes"
        )
    return prompt_template


class ExampleEncoder:
    r"""Writes conversations the way the model will meet them, and marks the responses.

    Messages, and pairs unless ``prompt_template`` is given, are written by the tokenizer's chat template. A response
    is what the template adds after its generation prompt, up to and including the end-of-text token; one is added
    where the template does not write it.

    Args:
        tokenizer: Turns text into tokens.
        prompt_template: Text around a pair's prompt, ``{prompt}`` standing for it. By default the chat template, or
            ``"{prompt}\n"`` where the tokenizer has none.

    Raises:
        ConfigurationError: ``prompt_template`` has no place for the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)
        self.prompt_template = None if prompt_template is None else check_template(prompt_template)
        if prompt_template is None and not self.has_chat_template:
            self.prompt_template = PLAIN_TEMPLATE
        self._render = TemplateProcess(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        with encoding_with(tokenizer):
            empty = self._backend.encode("", add_special_tokens=True).ids
        self._beginning = empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []

    def __call__(self, example: Example) -> EncodedExample:
        """Tokenize an example.

        Raises:
            ConfigurationError: Messages without a chat template, or a template that cannot be split at its responses.
        """
        if example.is_chat and not self.has_chat_template:
            raise ConfigurationError(
                f"{example.where}: has chat messages, but the tokenizer has no chat template; use one that has, or "
                "give rows of prompt and response"
            )
        use_chat = example.is_chat or self.prompt_template is None
        pieces = self._chat_pieces(example) if use_chat else self._plain_pieces(example)
        beginning = [] if use_chat else self._beginning
        tokens, targets, text, prompt_length = list(beginning), [False] * len(beginning), "", 0
        for prompt, response in pieces:
            tokens = self._extend(tokens, text, prompt, beginning, example)
            prompt_length = len(tokens)
            tokens = self._extend(tokens, text + prompt, response, beginning, example)
            text += prompt + response
            answer = self._up_to_end(tokens[prompt_length:])
            targets += [False] * (prompt_length - len(targets)) + [True] * len(answer)
            targets += [False] * (len(tokens) - len(targets))
        tokens = tokens[:prompt_length] + answer
        if answer[-1:] != [self.tokenizer.eos_token_id]:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        return EncodedExample(
            tokens, [*targets[:prompt_length], *[True] * (len(tokens) - prompt_length)], prompt_length
        )

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        """The tokens up to the last end-of-text token, all of them where there is none."""
        end = self.tokenizer.eos_token_id
        return tokens[: len(tokens) - tokens[::-1].index(end)] if end in tokens else tokens

    def _plain_pieces(self, example: Example) -> list[tuple[str, str]]:
        assert self.prompt_template is not None
        (_, prompt), (_, response) = example.messages
        return [(self.prompt_template.replace("{prompt}", prompt), response)]

    def _chat_pieces(self, example: Example) -> list[tuple[str, str]]:
        """What the template writes before each response, and the response, cut out of growing conversations."""
        messages = [{"role": role, "content": content} for role, content in example.messages]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        both = [((messages[:turn], True), (messages[: turn + 1], False)) for turn in turns]
        try:
            texts = self._render([request for pair in both for request in pair])
        except TemplateError as error:
            owner = f" of tokenizer {name!r}" if (name := self.tokenizer.name_or_path) else ""
            raise ConfigurationError(
                f"{example.where}: the chat template{owner} refuses it ({error}); change the messages or the tokenizer"
            ) from error
        text, pieces = "", []
        for turn, prompt, answered in zip(turns, texts[::2], texts[1::2], strict=True):
            if not prompt.startswith(text) or not answered.startswith(prompt):
                raise ConfigurationError(
                    f"{example.where}: the chat template cannot be split before message {turn + 1}, because it writes "
                    "earlier messages differently once later ones follow; give one response a row, or a tokenizer "
                    "whose template only appends"
                )
            pieces.append((prompt[len(text) :], answered[len(prompt) :]))
            text = answered
        return pieces

    def _extend(self, tokens: list[int], text: str, piece: str, beginning: list[int], example: Example) -> list[int]:
        """Tokens of ``text + piece`` that begin with ``tokens``, those of ``text``."""
        whole = beginning + self._encode(text + piece)
        if whole[: len(tokens)] == tokens:
            return whole
        joined = tokens + self._encode(piece)  # a merge across the seam: cut it, as a prompt alone does
        if self._backend.decode(joined, False) != self._backend.decode(whole, False):
            raise ConfigurationError(
                f"{example.where}: the template cannot be split before {piece[:20]!r}, where the tokenizer merges "
                "across; let the template end the prompt with a newline or a special token, not a space"
            )
        return joined

    def _encode(self, text: str) -> list[int]:
        with encoding_with(self.tokenizer):
            return self._backend.encode(text, add_special_tokens=False).ids


def load_instruction_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model that is to be finetuned.

    Args:
        name: A tokenizer.json, a folder with one, a Hugging Face name, or a checkpoint (.ckpt) of an orthotrain run.

    Raises:
        ConfigurationError: None given, it cannot be loaded, or it has no end-of-text token.
    """
    if not name:
        raise ConfigurationError(
            f"tokenizer {name!r}: instruction data needs the model's own; give its folder, its Hugging Face name or "
            "the .ckpt of its run"
        )
    tokenizer = _from_checkpoint(name) if name.endswith(".ckpt") else load_tokenizer(name, _ANY_VOCABULARY)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_checkpoint(path: str) -> PreTrainedTokenizerFast:
    check_there(path)
    check_regular_file(path, "tokenizer")
    try:
        checkpoint = describe_file(local_path(path, "tokenizer"))
    except ConfigurationError as error:
        raise ConfigurationError(f"tokenizer {path!r}: {error}") from error
    for state in checkpoint.values():
        if isinstance(state, dict) and "tokenizer_fingerprint" in state:
            return tokenizer_from_state(state)
    raise ConfigurationError(f"tokenizer {path!r}: the checkpoint holds none; give the folder of its tokenizer")
