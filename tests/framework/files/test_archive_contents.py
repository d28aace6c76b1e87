"""What a checkpoint may hold: plain values, and tensors whose values are in the file; all else is refused by place."""

import collections
import io
import multiprocessing
import os
import pickle
import resource
import struct
import time
import zipfile

import pytest
import torch
from torch import nn

from orthotrain.checkpoints.reading import check_checkpoint, describe_checkpoint, read_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.files.pickle_classes import StoredTensor, known_class
from orthotrain.files.pickle_interpreter import Interpreter
from orthotrain.files.torch_files import read_file


def archive(path, pickled, entries=None):
    """Write an archive with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a/data.pkl", pickled)
        target.writestr("a/byteorder", b"little")
        for name, data in (entries or {}).items():
            target.writestr(f"a/data/{name}", data)
    return path


def everything():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    base = torch.arange(12.0)
    return {
        "state_dict": network.state_dict(),
        "dtypes": {
            str(dtype): torch.ones(3, dtype=dtype)
            for dtype in (
                torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn,
            )
        },
        "views": [base, base[2:5], base.view(3, 4).T, base[::2], torch.tensor(3.0), torch.zeros(0, 4)],
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "plain": [None, True, False, 0, -1, 2**40, -(2**70), 1.5, float("inf"), "é\n\0", b"\0\xff", (), (1, "a"), {}],
        "kinds": [torch.Size([2, 3]), torch.float32, torch.device("cpu"), collections.Counter([1, 1]), {1, "a"}],
        "ordered": collections.OrderedDict(a=1),
        "keys": {1: "a", "x" * 1000: "c"},
        "long": "x" * 10**6,
    }  # fmt: skip


def equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.view(-1).view(torch.uint8)
            if a.dtype == torch.float8_e4m3fn else a, b.view(-1).view(torch.uint8) if b.dtype == torch.float8_e4m3fn
            else b)  # fmt: skip
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_reads_is_read_alike(tmp_path, protocol):
    path = tmp_path / "good.ckpt"
    torch.save(everything(), path, pickle_protocol=protocol)
    found, expected = read_checkpoint(path), torch.load(path, weights_only=protocol == 2)
    assert equal(found, expected)
    assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    views = found["views"]
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr(), "shared as it was"
    assert isinstance(found["parameter"], nn.Parameter) and not found["parameter"].requires_grad
    check_checkpoint(path)


def test_a_description_reads_no_tensor(tmp_path):
    path = tmp_path / "good.ckpt"
    torch.save({"global_step": 7, "w": torch.ones(10**6)}, path)
    described = describe_checkpoint(path)
    assert described["global_step"] == 7
    assert isinstance(described["w"], StoredTensor) and described["w"].shape == (10**6,)


class Own:
    pass


class Sub(torch.Tensor):
    pass


class Unknown:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


REFUSED = {
    "pickled object": (Own(), "Own, only|Own; only"),
    "function": (Unknown(), "posix.mkdir"),
    "class": (Own, "Own"),
    "meta tensor": (torch.empty(3, device="meta"), "a meta tensor, which has no values"),
    "sparse tensor": (torch.eye(3).to_sparse(), "a sparse tensor"),
    "sparse csr": (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
    "quantized tensor": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
    "nested tensor": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "subclass": (torch.ones(3).as_subclass(Sub), "a tensor of a subclass"),
    "stride 0": (torch.ones(1).expand(10**12), "repeats values of its storage"),
    "rows of one": (torch.ones(1, 5).expand(10**6, 5), "repeats values"),
    "overlap": (torch.ones(9).as_strided((5, 4), (1, 1)), "repeats values"),
    "exception": (ValueError("x"), "ValueError"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_their_place(tmp_path, kind):
    value, message = REFUSED[kind]
    path = tmp_path / "bad.ckpt"
    torch.save({"a": {"b": [0, value]}}, path)
    for read in (read_checkpoint, describe_checkpoint, check_checkpoint):
        with pytest.raises(ConfigurationError, match=rf"bad.ckpt' cannot be read: a\.b\.1 .*({message})") as caught:
            read(path)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def doubled(levels):
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def ring():
    value = {"a": []}
    value["a"].append(value)
    return value


def chain(length, make=lambda inner: [inner]):
    value = 1
    for _ in range(length):
        value = make(value)
    return value


def opcodes(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


HASHES = b"".join(b"\x8a\x14" + (k * (2**61 - 1)).to_bytes(20, "little") + b"N" for k in range(10**4))
PICKLES = {
    "billion laughs": (pickle.dumps({"x": doubled(60)}, 2), "expand to far more than the size of the file"),
    "laughs of dictionaries": (
        pickle.dumps({"x": chain(40, lambda v: {"a": v, "b": v, "c": v})}, 2), "expand to far more"),
    "a long string many times": (pickle.dumps({"x": ["y" * 10**5] * 10**5}, 2), "expand to far"),
    "a ring": (pickle.dumps(ring(), 2), "contains itself"),
    "deep lists": (b"\x80\x02}X\1\0\0\0x" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s.", "nested more than 100 levels"),
    "deep tuples as a key": (b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"Ns.", "has a tuple as a key"),
    "exponential hash": (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "an instruction that torch never"),
    "equal hashes": (b"\x80\x02}(" + HASHES + b"u.", "has a int as a key"),
    "a memo number": (b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".", "gives an object the number 2147483647"),
    "lists without end": (b"\x80\x02](" + b"]" * (3 * 10**6) + b"e.", "has more than 2,0"),
    "a bytearray of terabytes": (opcodes(b"\x96" + struct.pack("<Q", 2**40)), "an instruction that torch never"),
    "a string of exabytes": (opcodes(b"\x8d" + struct.pack("<Q", 2**62)), "truncated or damaged"),
    "a tensor type": (opcodes(b"ctorch\nFloatTensor\n(\x8a\x05\x00\x00\x00\x00\x10tR"), "torch.FloatTensor"),
    "a bytearray by name": (opcodes(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"), "bytearray"),
    "eval": (opcodes(b"c__builtin__\neval\nX\x0b\0\0\0print('no')\x85R"), "eval"),
    "a list": (pickle.dumps([1], 2), "it holds a list, not a dictionary"),
    "a string": (pickle.dumps("x", 2), "it holds a str"),
    "nothing": (b"", "truncated or damaged"),
    "a float as a key": (pickle.dumps({1.5: 1}, 2), "has a float as a key"),
    "attributes": (pickle.dumps({"x": 1}, 2)[:-1] + b"}b.", "sets a state on a dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_pickles_end_in_one_line(tmp_path, kind):
    pickled, message = PICKLES[kind]
    path = archive(tmp_path / "bad.ckpt", pickled)
    begin = time.monotonic()
    for read in (describe_checkpoint, read_checkpoint):
        with pytest.raises(ConfigurationError, match=rf"bad.ckpt' cannot be read: .*{message}") as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - begin < 60


def tensor_pickle(storage=b"FloatStorage", values=4, offset=0, shape=(4,), strides=(1,), key="0"):
    """A tensor as torch pickles it, with numbers of one's own."""
    numbers = [pickle.dumps(n, 2)[2:-1] for n in (values, offset, shape, strides)]
    return (
        b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n" + storage + b"\nX\1\0\0\0"
        + key.encode() + b"X\3\0\0\0cpu" + numbers[0] + b"tQ" + numbers[1] + numbers[2] + numbers[3] + b"\x89}tRs."
    )  # fmt: skip


def test_a_tensor_lies_within_its_entry(tmp_path):
    path, entries = tmp_path / "t.ckpt", {"0": bytes(16)}
    archive(path, tensor_pickle(), entries)
    assert read_checkpoint(path)["w"].tolist() == [0.0] * 4
    for wrong, message in (
        ({"values": 2**40}, "w has 1,099,511,627,776 values in a storage of 16 bytes"),
        ({"values": 3}, "w has 3 values in a storage of 16 bytes"),
        ({"storage": b"DoubleStorage"}, "w has 4 values in a storage of 16 bytes"),
        ({"key": "1"}, "w has 4 values in a storage of 0 bytes"),
        ({"offset": 1}, "ends beyond its storage"),
        ({"offset": 2**50}, "ends beyond its storage"),
        ({"shape": (5,)}, "ends beyond its storage"),
        ({"shape": (2, 2), "strides": (0, 1)}, "repeats values"),
        ({"shape": (2, 2), "strides": (1, 1)}, "repeats values"),
        ({"shape": (2**62,), "strides": (0,)}, "are not counts"),
        ({"shape": (-1,)}, "are not counts"),
        ({"offset": -1}, "are not counts"),
        ({"shape": (True,)}, "are not counts"),
        ({"shape": ("a",)}, "are not counts"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "are not counts"),
        ({"storage": b"NoSuchStorage"}, "w is torch.NoSuchStorage"),
        ({"storage": b"load"}, "w is torch.load"),
    ):
        archive(path, tensor_pickle(**wrong), entries)
        with pytest.raises(ConfigurationError, match=message):
            read_checkpoint(path)
    archive(path, tensor_pickle(shape=(0, 2**50), strides=(0, 0)), entries)
    assert read_checkpoint(path)["w"].shape == (0, 2**50)


def limited(path, pipe):
    """Read a file within 3 GB of address space and send what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    try:
        read_checkpoint(path)
        pipe.send("read")
    except ConfigurationError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("kind", ["lists without end", "deep lists", "zeros"])
def test_within_three_gigabytes(tmp_path, kind):
    """The largest of them, and values of 8 GB that lie in a file without blocks on the disk."""
    path = tmp_path / "bad.ckpt"
    if kind == "zeros":
        archive(path, tensor_pickle(), {"0": bytes(16)})
        os.truncate(path, 8 << 30)
    else:
        archive(path, PICKLES[kind][0])
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=limited, args=(path, theirs))
    process.start()
    assert ours.poll(60), "no answer in a minute"
    assert "cannot be read" in ours.recv()
    process.join()
    assert process.exitcode == 0


def test_the_same_in_a_part_of_a_shard(tmp_path):
    """What is no tensor in a distributed checkpoint is a small archive in a file of it."""
    from orthotrain.files.torch_files import read_part

    for kind in ("billion laughs", "a ring", "equal hashes", "a tensor type", "eval", "nothing"):
        pickled, message = PICKLES[kind]
        with pytest.raises(ValueError, match=message):
            read_part(archive(io.BytesIO(), pickled))


def test_names_from_a_file_are_written_out(tmp_path):
    torch.save({"a\x1b[2J\nb": Own()}, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigurationError) as caught:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert r"a\x1b[2J b is" in str(caught.value) and str(caught.value).isprintable()


def pickle_that_repeats(name, value, times):
    """One value, and a name that is called with it again and again: two bytes for each mention."""
    module, _, called = name.rpartition(".")
    head = b"\x80\x02]" + value + b"q\x01" + b"a" + f"c{module}\n{called}\n".encode() + b"q\x02a"
    latin = b"X\x06\x00\x00\x00latin1q\x03a"
    call = b"h\x02h\x01h\x03\x86Ra" if called == "encode" else b"h\x02h\x01\x85Ra"
    return head + latin + call * times + b"."


TEXT = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
NUMBERS = b"](" + b"".join(b"J" + number.to_bytes(4, "little") for number in range(100_000)) + b"e"


@pytest.mark.parametrize(
    ("name", "value"), [("_codecs.encode", TEXT), ("__builtin__.set", NUMBERS), ("torch.Size", NUMBERS)]
)
def test_a_value_that_is_given_to_a_name_again_and_again_is_counted_each_time(name, value):
    data = pickle_that_repeats(name, value, 50_000)
    with pytest.raises(ValueError, match="shared parts expand|Size that is not a list"):
        Interpreter(data, known_class).run()


def test_a_name_is_no_longer_than_names_are():
    with pytest.raises(ValueError, match="truncated or damaged"):
        Interpreter(b"\x80\x04" + TEXT + b"\x8c\x01b\x93.", known_class).run()


@pytest.mark.parametrize("tensor", [torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag])
def test_values_that_are_changed_when_they_are_read_are_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="w is a tensor with a conjugate bit"):
        read_file(tmp_path / "a.ckpt")
