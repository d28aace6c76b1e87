"""The bytes of the tokens of a text add up to the bytes of the text."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthotrain.data.token_bytes import token_bytes
from orthotrain.data.tokenizers import train_tokenizer

TEXT = "the naïve cat\n  saw 漢字 and 🎉 — the <0x0A> and ▁ it self  \n"


def wrapped(backend, **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


def characters(*more):
    return {token: number for number, token in enumerate(["</s>", "<unk>", *more])}


def byte_level():
    tokenizer = train_tokenizer(["the cat saw the cat and the hat"] * 3, 266)
    tokenizer.add_tokens([AddedToken("self  ", special=False), "<|end|>"])
    return tokenizer


def sentencepiece():
    """As Llama 2 and Gemma: spaces are ▁, and characters without a token are spelled as bytes."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁t", "he", "▁the", "a", "▁a"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    backend = Tokenizer(models.BPE(characters(*pieces), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(backend)


def unigram():
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁", -3.0), ("▁the", -2.0), *((letter, -4.0) for letter in "abcdefghilnostuvw")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback()])
    return wrapped(backend)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_the_bytes_add_up(make):
    tokenizer = make()
    # the tokenizers of sentencepiece read these as a space and as a byte
    text = TEXT if make is byte_level else TEXT.replace("<0x0A> and ▁ ", "")
    table, tokens = token_bytes(tokenizer), tokenizer.encode(text, add_special_tokens=False)
    assert int(table[tokens].sum()) == len(text.encode()), tokenizer.convert_ids_to_tokens(tokens)
    assert len(set(table[tokens].tolist())) > 1
    assert not table[tokenizer.all_special_ids].any()


def test_added_tokens_are_text_and_special_tokens_are_none():
    tokenizer = byte_level()
    table = token_bytes(tokenizer)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    assert {name: int(table[number]) for name, number in added.items()} == {
        "<|endoftext|>": 0, "<|padding|>": 0, "self  ": 6, "<|end|>": 7
    }  # fmt: skip


def test_marks_inside_a_word_have_no_bytes():
    backend = Tokenizer(models.WordPiece(characters("play", "##ing", "é"), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(wrapped(backend, unk_token="<unk>")).tolist() == [0, 0, 4, 3, 2]
    backend = Tokenizer(models.BPE(characters("a", "a</w>"), [], end_of_word_suffix="</w>"))
    assert token_bytes(wrapped(backend)).tolist()[2:] == [1, 2]
