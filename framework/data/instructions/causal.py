"""Tokens of a conversation for a causal network: prompt and responses in one sequence, and which tokens count."""

from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.examples import EncodedExample, Example, check_template
from orthotrain.data.instructions.template_renderer import TemplateError, TemplateRenderer
from orthotrain.data.tokenizer_checks import encoding_with
from orthotrain.errors import ConfigurationError

PLAIN_TEMPLATE = "{prompt}\n"


class CausalEncoder:
    r"""Tokenizes conversations as inference does, and marks the tokens of the responses.

    The tokenizer's chat template writes messages, and also pairs if there is no ``prompt_template``. A response is the
    text that the template adds after its generation prompt, up to and including the end-of-text token. The encoder adds
    this token if the template does not write it.

    Args:
        tokenizer: Turns text into tokens.
        prompt_template: Text around a pair's prompt, which replaces ``{prompt}``. By default the chat template, or
            ``"{prompt}\n"`` for a tokenizer without a chat template.

    Raises:
        ConfigurationError: ``prompt_template`` does not contain ``{prompt}``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)
        self.prompt_template = None if prompt_template is None else check_template(prompt_template)
        if prompt_template is None and not self.has_chat_template:
            self.prompt_template = PLAIN_TEMPLATE
        self._render = TemplateRenderer(tokenizer)
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
                f"{example.where}: has chat messages, but the tokenizer has no chat template; use a tokenizer with a "
                "chat template, or give rows of prompt and response"
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
        """Return the tokens up to the last end-of-text token; all tokens if there is no end-of-text token."""
        end = self.tokenizer.eos_token_id
        return tokens[: len(tokens) - tokens[::-1].index(end)] if end in tokens else tokens

    def _plain_pieces(self, example: Example) -> list[tuple[str, str]]:
        assert self.prompt_template is not None
        (_, prompt), (_, response) = example.messages
        return [(self.prompt_template.replace("{prompt}", prompt), response)]

    def _chat_pieces(self, example: Example) -> list[tuple[str, str]]:
        """Return the text before each response, and the response, by rendering longer and longer conversations."""
        messages = [{"role": role, "content": content} for role, content in example.messages]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        both = [((messages[:turn], True), (messages[: turn + 1], False)) for turn in turns]
        try:
            texts = self._render([request for pair in both for request in pair])
        except TemplateError as error:
            owner = f" of tokenizer {name!r}" if (name := self.tokenizer.name_or_path) else ""
            raise ConfigurationError(
                f"{example.where}: the chat template{owner} refuses the messages ({error}); change the messages or the "
                "tokenizer"
            ) from error
        text, pieces = "", []
        for turn, prompt, answered in zip(turns, texts[::2], texts[1::2], strict=True):
            if not prompt.startswith(text) or not answered.startswith(prompt):
                raise ConfigurationError(
                    f"{example.where}: the chat template cannot be split before message {turn + 1}, because it changes "
                    "earlier messages when later messages follow; give rows of one response, or a tokenizer whose "
                    "template only appends"
                )
            pieces.append((prompt[len(text) :], answered[len(prompt) :]))
            text = answered
        return pieces

    def _extend(self, tokens: list[int], text: str, piece: str, beginning: list[int], example: Example) -> list[int]:
        """Return tokens of ``text + piece`` that begin with ``tokens``, the tokens of ``text``."""
        whole = beginning + self._encode(text + piece)
        if whole[: len(tokens)] == tokens:
            return whole
        joined = tokens + self._encode(piece)  # a token spans both texts: cut it, as inference does
        if self._backend.decode(joined, False) != self._backend.decode(whole, False):
            raise ConfigurationError(
                f"{example.where}: the template cannot be split before {piece[:20]!r}, because a token spans the end "
                "of the prompt; let the template end the prompt with a newline or a special token, not a space"
            )
        return joined

    def _encode(self, text: str) -> list[int]:
        with encoding_with(self.tokenizer):
            return self._backend.encode(text, add_special_tokens=False).ids
