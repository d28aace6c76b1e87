"""Tokens of a conversation for a causal network: prompt and responses in one sequence, and which tokens count."""

from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.examples import EncodedExample, Example, check_pair, check_template
from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.instructions.turns import ChatTurns, Conversation
from orthotrain.data.instructions.used_keys import UsedKeys
from orthotrain.data.tokenizer_checks import encoding_with

PLAIN_TEMPLATE = "{prompt}\n"


class CausalEncoder:
    r"""Tokenizes conversations as inference does, and marks the tokens of the responses.

    The tokenizer's chat template writes messages, and also pairs if there is no ``prompt_template``. `ChatTurns` says
    which text is a response. A response ends with the end-of-text token, which the encoder adds to the last response if
    the template does not write it; where the template has ``{% generation %}`` blocks, exactly their tokens count.

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
        self._turns = ChatTurns(tokenizer)
        self._used_keys = UsedKeys(self._turns)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        with encoding_with(tokenizer):
            empty = self._backend.encode("", add_special_tokens=True).ids
        self._beginning = empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []

    def __call__(self, example: Example) -> list[EncodedExample]:
        """Tokenize an example, to one row, or to several if the template changes earlier messages (see `ChatTurns`).

        Raises:
            RowFault: Messages without a chat template, a key that the template does not write, or a response that
                cannot be found in the template's text.
        """
        if self.prompt_template is not None and not example.is_chat:
            return [self._encode_pair(example, self.prompt_template)]
        if not self.has_chat_template:
            raise RowFault(
                f"{example.where}: has chat messages, but the tokenizer has no chat template; use a tokenizer with a "
                "chat template, or give rows of prompt and response"
            )
        messages = self._used_keys.messages(example)
        return [
            self._encode_marked(found, example) if found.marked else self._encode_split(found, [], example)
            for found in self._turns(example, messages)
        ]

    def _encode_pair(self, example: Example, template: str) -> EncodedExample:
        check_pair(example, "prompt_template")
        prompt, response = (message["content"] for message in example.messages)
        prompt = template.replace("{prompt}", prompt)
        pair = Conversation(prompt + response, [(len(prompt), len(prompt) + len(response))], 1, marked=False)
        return self._encode_split(pair, self._beginning, example)

    def _encode_split(self, found: Conversation, beginning: list[int], example: Example) -> EncodedExample:
        """Tokenize the texts between and in the responses one after another, as inference does."""
        tokens, targets, before, prompt_length, answer = list(beginning), [False] * len(beginning), 0, 0, list[int]()
        for start, end in found.responses:
            tokens = self._extend(tokens, found.text[:before], found.text[before:start], beginning, example)
            prompt_length = len(tokens)
            tokens = self._extend(tokens, found.text[:start], found.text[start:end], beginning, example)
            before = end
            answer = self._up_to_end(tokens[prompt_length:])
            targets += [False] * (prompt_length - len(targets)) + [True] * len(answer)
            targets += [False] * (len(tokens) - len(targets))
        tokens = tokens[:prompt_length] + answer
        if answer[-1:] != [self.tokenizer.eos_token_id]:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        targets = [*targets[:prompt_length], *[True] * (len(tokens) - prompt_length)]
        return EncodedExample(tokens, targets, prompt_length, _reference(found, example))

    def _encode_marked(self, found: Conversation, example: Example) -> EncodedExample:
        """Tokenize the whole text; exactly the tokens of the marked responses count."""
        with encoding_with(self.tokenizer):
            encoding = self._backend.encode(found.text, add_special_tokens=False)
        targets = [
            any(start < response[1] and end > response[0] for response in found.responses)
            for start, end in encoding.offsets
        ]
        last = len(targets) - targets[::-1].index(True)
        prompt_length = next(n for n, (_, end) in enumerate(encoding.offsets) if end > found.responses[-1][0])
        return EncodedExample(encoding.ids[:last], targets[:last], prompt_length, _reference(found, example))

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to the last end-of-text token; all tokens if there is no end-of-text token."""
        end = self.tokenizer.eos_token_id
        return tokens[: len(tokens) - tokens[::-1].index(end)] if end in tokens else tokens

    def _extend(self, tokens: list[int], text: str, piece: str, beginning: list[int], example: Example) -> list[int]:
        """Return tokens of ``text + piece`` that begin with ``tokens``, the tokens of ``text``."""
        whole = beginning + self._encode(text + piece)
        if whole[: len(tokens)] == tokens:
            return whole
        joined = tokens + self._encode(piece)  # a token spans both texts: cut it, as inference does
        if self._backend.decode(joined, False) != self._backend.decode(whole, False):
            raise RowFault(
                f"{example.where}: the template cannot be split before {piece[:20]!r}, because a token spans the end "
                "of the prompt; let the template end the prompt with a newline or a special token, not a space"
            )
        return joined

    def _encode(self, text: str) -> list[int]:
        with encoding_with(self.tokenizer):
            return self._backend.encode(text, add_special_tokens=False).ids


def _reference(found: Conversation, example: Example) -> str:
    message = example.messages[found.turn]
    if message.keys() == {"role", "content"}:
        return message["content"]
    start, end = found.responses[-1]
    return found.text[start:end]
