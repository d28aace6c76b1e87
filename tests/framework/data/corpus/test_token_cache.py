import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.data import CorruptCacheError, TokenCache
from orthotrain.data.corpus import token_cache
from orthotrain.data.corpus.token_cache import HEADER_BYTES, Metadata, TokenCacheWriter, decode_header, encode_header
from orthotrain.errors import ConfigurationError

METADATA = Metadata("uint16", 5, 17, 2, "a" * 64, "b" * 64, "c" * 64, "d" * 64)


def write(path, tokens, vocab_size=300):
    with TokenCacheWriter(path, vocab_size) as writer:
        writer.append(tokens, 3 * len(tokens))
        writer.commit("tokenizer", "source")
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    tokens = [0, 1, 255, vocab_size - 1]
    cache = TokenCache.open(write(tmp_path / "x.tokens", tokens, vocab_size))
    assert cache.tokens.dtype == np.dtype(dtype)
    assert cache.tokens.tolist() == tokens
    assert (cache.metadata.tokens, cache.metadata.text_bytes, cache.metadata.documents) == (4, 12, 1)
    assert (tmp_path / "x.tokens").stat().st_size == HEADER_BYTES + 4 * np.dtype(dtype).itemsize


def test_an_empty_split_is_a_valid_cache(tmp_path):
    with TokenCacheWriter(tmp_path / "x", 300) as writer:
        writer.commit("t", "s")
    assert len(TokenCache.open(tmp_path / "x").tokens) == 0


def test_a_failed_build_leaves_the_old_file_and_no_other(tmp_path):
    path = write(tmp_path / "x", [1, 2, 3])
    with pytest.raises(ZeroDivisionError), TokenCacheWriter(path, 300) as writer:
        writer.append([9, 9], 2)
        raise ZeroDivisionError
    assert TokenCache.open(path).tokens.tolist() == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kept", [0, 7, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3])
def test_a_truncated_file_names_itself_what_was_expected_and_what_was_found(tmp_path, kept):
    path = write(tmp_path / "x.tokens", [1, 2, 3])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptCacheError) as caught:
        TokenCache.open(path)
    message = str(caught.value)
    assert str(path) in message and f"found {kept}" in message.replace(",", "")
    assert "expected" in message and "truncated" in message and "delete it" in message and "\n" not in message


def test_every_altered_byte_of_the_tokens_is_found(tmp_path):
    path = write(tmp_path / "x.tokens", [1, 2, 3])
    whole = path.read_bytes()
    for position in range(HEADER_BYTES, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CorruptCacheError, match="checksum"):
            TokenCache.open(path)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(CorruptCacheError, match="too long"):
        TokenCache.open(path)


def test_large_files_are_checked_by_blocks_from_the_first_byte_to_the_last(monkeypatch):
    monkeypatch.setattr(token_cache, "FULL_CHECK_BYTES", 1000)
    monkeypatch.setattr(token_cache, "_SAMPLE_BYTES", 10)
    data = np.arange(5000, dtype=np.uint32).view(np.uint8)
    original = token_cache.checksum(data)
    for position in (0, 9, len(data) - 10, len(data) - 1):
        altered = data.copy()
        altered[position] ^= 1
        assert token_cache.checksum(altered) != original


def test_another_version_and_another_kind_of_file_are_told_apart():
    header = bytearray(encode_header(METADATA))
    header[8] = 9
    with pytest.raises(CorruptCacheError, match="version 2, found 9"):
        decode_header(bytes(header), "x")
    with pytest.raises(CorruptCacheError, match="not a token cache"):
        decode_header(b"PK\x03\x04" + bytes(HEADER_BYTES), "x")


def test_header_round_trip():
    assert decode_header(encode_header(METADATA), "x") == METADATA


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mutated_header_is_refused_and_nothing_else_happens(data):
    header = bytearray(encode_header(METADATA))
    edits = data.draw(
        st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=8)
    )
    for position, change in edits:
        header[position] ^= change
    cut = data.draw(st.one_of(st.just(HEADER_BYTES), st.integers(0, HEADER_BYTES)))
    if header[:cut] == encode_header(METADATA):  # two edits of one byte may undo each other
        return
    with pytest.raises(ConfigurationError):
        decode_header(bytes(header[:cut]), "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*Metadata.__dataclass_fields__, "other"]), JSON), st.binary(max_size=200))
def test_metadata_with_a_right_checksum_but_wrong_content_is_refused(changes, raw):
    """A header that someone else wrote: the outer checks pass, the values must still be looked at."""
    import hashlib
    import json

    values = {**METADATA.__dict__, **changes}
    for body in (json.dumps(values).encode(), raw):
        body = body[:4000]
        header = token_cache._PREFIX.pack(token_cache.MAGIC, token_cache.VERSION, len(body)) + body
        header = header.ljust(HEADER_BYTES - 32, b"\0")
        try:
            metadata = decode_header(header + hashlib.sha256(header).digest(), "x")
        except ConfigurationError:
            continue
        assert metadata.dtype in ("uint16", "uint32") and type(metadata.tokens) is int and metadata.tokens >= 0
        assert all(isinstance(getattr(metadata, name), str) for name in ("checksum", "source_fingerprint"))
