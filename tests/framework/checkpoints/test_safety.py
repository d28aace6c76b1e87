"""No file makes code run or the program crash: thousands of damaged and hostile ones end in the one clear error.

Mutations are drawn from a fixed seed: bits flipped, bytes overwritten, spans removed, doubled, zeroed or swapped, and
numbers replaced by extreme ones, of files that are valid to begin with.
"""

import copy
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.adapters.peft_folder import read_folder
from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.checkpoints.shards import load_shards, save_shards
from orthotrain.cli.main import main
from orthotrain.data.corpus.token_cache import HEADER_BYTES, CorruptCacheError, TokenCache, TokenCacheWriter
from orthotrain.distributed.consolidate import consolidate
from orthotrain.errors import ConfigurationError
from orthotrain.export import load_network
from orthotrain.files.atomic_writes import OLD_SUFFIX, remove_leftovers, rename_to_temporary
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.models.folder import check_model_folder
from orthotrain.modules import PoetLayers, PoetModule

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(data, generator):
    """Return a copy with one to eight changes."""
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4, 8])):
        if not data:
            break
        # headers and directories lie at both ends; the middle is mostly values
        place = generator.choice([0, max(0, len(data) - 400), generator.randrange(len(data))])
        at = min(len(data) - 1, place + generator.randrange(400))
        span = generator.choice([1, 2, 8, 64, 1000])
        kind = generator.randrange(7)
        if kind == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[at] = generator.randrange(256)
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind == 4:
            data[at : at + span] = bytes(len(data[at : at + span]))
        elif kind == 5:
            value = struct.pack("<Q", generator.choice(EXTREMES))[: generator.choice([2, 4, 8])]
            data[at : at + len(value)] = value
        else:
            other = generator.randrange(len(data))
            data[at : at + span] = data[other : other + span]
    return bytes(data)


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused_or_read(read, path, count, original, seed):
    """Read ``count`` files that differ from the original; return how many were refused, by the clear error only."""
    generator, refused = random.Random(seed), 0
    for _ in range(count):
        while (data := mutated(original, generator)) == original:
            pass
        path.write_bytes(data)
        try:
            read(path)
        except ConfigurationError as error:
            assert path.name in str(error) or str(path.parent) in str(error)
            refused += 1
    return refused


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "good.ckpt"
    state = {"a.weight": torch.randn(8, 8), "b": torch.arange(5), "half": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "global_step": 3, "loops": {"fit_loop": {}}, "name": "x"}, path)
    return path


def test_hundreds_of_damaged_checkpoints(checkpoint, tmp_path):
    original, target = checkpoint.read_bytes(), tmp_path / "mutant.ckpt"
    assert refused_or_read(read_checkpoint, target, 300, original, "read") > 150
    # with its checksums almost nothing passes, only changes of bytes that mean nothing (times, padding)
    assert refused_or_read(check_checkpoint, target, 300, original, "check") > 240


def repack(path, target, change):
    """Write a checkpoint's archive again, with valid checksums, ``change(name, data)`` being applied to each entry."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for entry in source.infolist():
            out.writestr(entry.filename, change(entry.filename, source.read(entry.filename)))


def test_hundreds_of_damaged_pickles_in_valid_archives(checkpoint, tmp_path):
    generator, target, refused = random.Random("pickles"), tmp_path / "mutant.ckpt", 0
    for _ in range(300):
        repack(checkpoint, target, lambda name, data: mutated(data, generator) if name.endswith(".pkl") else data)
        try:
            check_checkpoint(target)
        except ConfigurationError:
            refused += 1
    assert refused > 210
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.ckpt", "mutant.ckpt"], "nothing was made"


def described(tiny_llama, **more):
    """A checkpoint as ``orthotrain fit`` writes it, in memory."""
    network = {"class_path": "orthotrain.models.CausalLM", "init_args": {"config": tiny_llama, **more}}
    layers = {"block_size": 8, "parameterization": "cayley", "overrides": {"*mlp*": {"sides": "in"}}}
    optimization = {"lr": 0.01, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}}
    arguments = {"model": network, "layers": layers, "merge_every": 2, "optimization": optimization}
    module = PoetModule(CausalLM(tiny_llama), PoetLayers(**layers), 2)
    module.configure_model()
    names = {"class_path": "orthotrain.modules.PoetModule", "init_args": arguments}
    return {"state_dict": module.state_dict(), "hyper_parameters": names}


def places(value, path=()):
    """Every place in nested dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def test_damaged_descriptions_are_one_clear_error(tiny_llama):
    """Every value of a description, each in turn, replaced by others or taken out."""
    contents = described(tiny_llama)
    load_network(contents, "good.ckpt")
    refused, generator = 0, random.Random("descriptions")
    all_places = list(places({"state_dict": {}, "hyper_parameters": contents["hyper_parameters"]}))
    for place in all_places:
        mutant = {**contents, "hyper_parameters": copy.deepcopy(contents["hyper_parameters"])}
        holder = mutant
        for key in place[:-1]:
            holder = holder[key]
        if generator.randrange(4):
            holder[place[-1]] = generator.choice(
                [None, -1, 0, 0.5, 10**30, "x", "a.b", [], {}, [[]], {"class_path": 3}]
            )
        else:
            del holder[place[-1]]
        try:
            load_network(mutant, "mutant.ckpt")
        except ConfigurationError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(all_places) / 3


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_description_of_a_huge_network_allocates_nothing(tiny_llama, size):
    contents = described({**tiny_llama})
    contents["hyper_parameters"]["init_args"]["model"]["init_args"]["config"][size] = 2**24
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigurationError, match=r"huge.ckpt: the description is of [\d,]+ (values|layers), but there"):
        load_network(contents, "huge.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # in KiB


def test_damaged_checkpoints_that_can_be_read_load_or_are_refused(tiny_llama, tmp_path):
    original, target, generator = tmp_path / "good.ckpt", tmp_path / "mutant.ckpt", random.Random("networks")
    torch.save(described(tiny_llama), original)
    read = 0
    for _ in range(100):
        repack(original, target, lambda name, data: mutated(data, generator) if name.endswith("data.pkl") else data)
        try:
            contents = read_checkpoint(target)
            read += 1
            load_network(contents, str(target))
        except ConfigurationError as error:
            assert "mutant.ckpt" in str(error)
    assert read > 7


@pytest.mark.parametrize(
    "network",
    [
        "os.abort",
        "this.d",
        {"class_path": "no_such_package.Network"},
        "orthotrain.distributed.consolidate.consolidate",
        {"class_path": "this.d"},
        {"class_path": "functools.partial", "init_args": {"func": "os.mkdir", "args": ["TRAP"]}},
        {"class_path": "torch.nn.Sequential", "init_args": {"x": ["posix.system"]}},
        {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x"}},
        {
            "class_path": "orthotrain.export.CheckpointModel",
            "init_args": {"path": "x", "allow": ["os.abort"]},
        },
        {
            "class_path": "orthotrain.models.PretrainedModel",
            "init_args": {"name": "x", "trust_remote_code": True},
        },
    ],
    ids=str,
)
def test_a_checkpoint_does_not_choose_what_code_runs(tiny_llama, network):
    contents = described(tiny_llama)
    contents["hyper_parameters"]["init_args"]["model"] = network
    with pytest.raises(ConfigurationError, match=r"bad.ckpt (names \S+, which is not a known class|asks to run code)"):
        load_network(contents, "bad.ckpt")
    assert "this" not in sys.modules


def test_a_checkpoint_does_not_choose_another_file_as_its_description(tiny_llama, tmp_path):
    contents = described(tiny_llama)
    (tmp_path / "evil.yaml").write_text("class_path: this.d")
    contents["hyper_parameters"]["init_args"]["model"] = str(tmp_path / "evil.yaml")
    with pytest.raises(ConfigurationError, match=r"bad.ckpt names .*evil.yaml, which is not a known class"):
        load_network(contents, "bad.ckpt")


def test_classes_of_ones_own_are_allowed_by_name_or_as_classes(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "their_package.py").write_text(
        "from orthotrain.models import CausalLM\nfrom orthotrain.modules import PoetModule\n\n"
        "class Own(PoetModule):\n    pass\n\n\nclass Network(CausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    contents = described(tiny_llama)
    contents["hyper_parameters"]["class_path"] = "their_package.Own"
    contents["hyper_parameters"]["init_args"]["model"]["class_path"] = "their_package.Network"
    with pytest.raises(ConfigurationError, match=r"names their_package.Own, .* export --allow their_package.Own"):
        load_network(contents)
    with pytest.raises(ConfigurationError, match=r"names their_package.Network"):
        load_network(contents, allow=["their_package.Own"])
    assert "their_package" not in sys.modules
    names = ["their_package.Own", "their_package.Network"]
    torch.save(contents, tmp_path / "own.ckpt")
    main(["export", "--ckpt", str(tmp_path / "own.ckpt"), "--out", str(tmp_path / "out"), "--allow", *names])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    theirs = sys.modules["their_package"]
    with pytest.raises(ConfigurationError, match=r"names their_package.Own"):
        load_network(contents)  # that a class is imported does not allow it
    assert type(load_network(contents, allow=[theirs.Own, theirs.Network])).__name__ == "LlamaForCausalLM"
    monkeypatch.delitem(sys.modules, "their_package")


@pytest.mark.parametrize("form", ["torch", "legacy", "bare", "nested", "system", "meta", "rest"])
def test_hostile_pickles_run_nothing(tmp_path, form):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "hostile.ckpt"
    if form == "torch":
        torch.save({"state_dict": trap}, path)
    elif form == "legacy":
        torch.save({"state_dict": trap}, path, _use_new_zipfile_serialization=False)
    elif form == "bare":
        path.write_bytes(pickle.dumps(trap))
    elif form == "nested":
        torch.save({"state_dict": {"w": torch.ones(2), "x": [trap]}}, path)
    elif form == "system":
        torch.save({"w": torch.ones(2)}, tmp_path / "plain.ckpt")
        code = b"cposix\nsystem\n(S'mkdir " + str(tmp_path / "sprung").encode() + b"'\ntR."
        repack(tmp_path / "plain.ckpt", path, lambda name, data: code if name.endswith(".pkl") else data)
    elif form == "meta":
        shard_folder(path)
        (path / ".metadata").write_bytes(pickle.dumps(trap))
        sum_again(path)
    else:
        shard_folder(path)
        torch.save({"global_step": trap}, path / "meta.pt")
        sum_again(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        check_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def shard_folder(path, **more):
    """Write a distributed checkpoint of one process; what is no tensor becomes an entry of bytes in its shard."""
    save_shards({"state_dict": {"w": torch.arange(16.0), **more}}, {"optimizer_states": []}, path, bool)
    return path


def sum_again(path):
    """Make the checksums of a folder right again, as whoever makes a hostile one would."""
    names = [file.name for file in path.iterdir() if file.name != "checksums.json"]
    index = {name: [(path / name).stat().st_size, zlib.crc32((path / name).read_bytes())] for name in names}
    (path / "checksums.json").write_text(json.dumps(index))


def test_a_hostile_entry_in_a_shard_runs_nothing(tmp_path):
    """Not when its folder is made one file, and not when a run goes on from it."""
    folder = shard_folder(tmp_path / "hostile.ckpt", evil=Trap(tmp_path / "sprung"))
    check_checkpoint(folder)
    with pytest.raises(ConfigurationError, match="hostile.ckpt' cannot be read: the value in it is posix.mkdir"):
        consolidate(folder, tmp_path / "one.ckpt")
    with pytest.raises(ConfigurationError, match="hostile.ckpt' cannot be read: the value in it is posix.mkdir"):
        load_shards({"state_dict": {"w": torch.zeros(16), "evil": 0}}, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.ckpt"]


def test_every_file_of_a_distributed_checkpoint_is_summed(tmp_path):
    folder = shard_folder(tmp_path / "shards.ckpt", step=3)
    assert read_checkpoint(consolidate(folder, tmp_path / "one.ckpt"))["state_dict"]["step"] == 3
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        refused = refused_or_read(lambda _: check_checkpoint(folder), file, 50, original, file.name)
        # a changed index may still be the same index (spaces)
        assert refused > 40 if file.name == "checksums.json" else refused == 50
        file.write_bytes(original)
        file.unlink()
        with pytest.raises(ConfigurationError, match="shards.ckpt"):
            check_checkpoint(folder)
        file.write_bytes(original)
    check_checkpoint(folder)


def test_a_distributed_checkpoint_is_written_beside_the_older_one(tmp_path, monkeypatch, killed):
    """Killed while it writes, or between the two renames, a run leaves the older one, and the next save or resume
    nothing else."""
    folder = shard_folder(tmp_path / "last.ckpt")

    def dies(*given):
        os.kill(os.getpid(), signal.SIGKILL)

    for place in ("_write_sums", "publish"):
        with monkeypatch.context() as patch:
            patch.setattr(f"orthotrain.checkpoints.shards.{place}", dies)
            killed(lambda: shard_folder(folder, new=torch.ones(1)))
        check_checkpoint(folder)
        assert newest_good_checkpoint([tmp_path]) == (folder, [])
    killed(lambda: rename_to_temporary(folder, OLD_SUFFIX))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    shard_folder(folder, new=torch.ones(1))
    assert "new" in read_checkpoint(consolidate(folder, tmp_path / "one.ckpt"))["state_dict"]


def test_the_description_of_a_distributed_checkpoint_names_only_its_own_files(tmp_path):
    folder = shard_folder(tmp_path / "shards.ckpt")
    description = folder / ".metadata"
    original = description.read_bytes()

    def check(_):
        sum_again(folder)
        check_checkpoint(folder)

    assert refused_or_read(check, description, 500, original, "metadata") > 300
    for name, message in (("../../etc/passwd", "names a file outside its folder"), ("other", "not a file of its fold")):
        hostile = pickle.loads(original)
        for info in hostile.storage_data.values():
            info.relative_path = name
        description.write_bytes(pickle.dumps(hostile))
        with pytest.raises(ConfigurationError, match=message):
            check(folder)
    hostile = pickle.loads(original)
    hostile.planner_data = {"state_dict.w": ("state_dict", 2**40)}
    description.write_bytes(pickle.dumps(hostile))
    with pytest.raises(ConfigurationError, match="names an entry"):
        check(folder)


def test_a_description_that_asks_for_gigabytes_is_refused(tmp_path):
    folder = shard_folder(tmp_path / "shards.ckpt")
    (folder / ".metadata").write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    sum_again(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigurationError, match="it gives an object the number 2147483647 in"):
        check_checkpoint(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "train.tokens"
    with TokenCacheWriter(path, 300) as writer:
        writer.append(list(range(200)), 777)
        writer.commit("t" * 64, "s" * 64)
    return path


def test_hundreds_of_damaged_token_caches(cache):
    original = cache.read_bytes()
    assert refused_or_read(TokenCache.open, cache, 300, original, "cache") == 300, "every byte counts"


@pytest.mark.parametrize("field", ["tokens", "text_bytes", "documents"])
@pytest.mark.parametrize("value", [-1, 10**6, 2**63, 10**30, 1.5, None, "9", True, [1]])
def test_lying_counts_in_a_header_with_a_valid_checksum(cache, field, value):
    import hashlib

    raw = bytearray(cache.read_bytes())
    length = struct.unpack_from("<I", raw, 12)[0]
    metadata = json.loads(raw[16 : 16 + length])
    metadata[field] = value
    body = json.dumps(metadata).encode()
    header = raw[:12] + struct.pack("<I", len(body)) + body.ljust(HEADER_BYTES - 48, b"\0")
    cache.write_bytes(header + hashlib.sha256(header).digest() + raw[HEADER_BYTES:])
    if field == "tokens" or not (isinstance(value, int) and value is not True and value >= 0):
        with pytest.raises(CorruptCacheError, match=r"train.tokens"):
            TokenCache.open(cache)


def adapter_folder(folder):
    folder.mkdir()
    config = {"peft_type": "OFT", "oft_block_size": 4, "r": 0, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.q.oft_R.weight": torch.randn(2, 6)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_hundreds_of_damaged_adapters(tmp_path, name):
    folder = adapter_folder(tmp_path / "adapter")
    read_folder(folder)
    original = (folder / name).read_bytes()
    # a changed value of a tensor without a checksum is another adapter: that is read
    assert refused_or_read(lambda path: read_folder(folder), folder / name, 200, original, name) > 20


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{" * 1000,
        struct.pack("<Q", 2) + b"[]",
        b"",
        b"\xff" * 7,
    ],
)
def test_oversized_and_missing_headers(tmp_path, header):
    folder = adapter_folder(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(header)
    with pytest.raises(ConfigurationError, match="not a safetensors file"):
        read_folder(folder)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(-2, 2**64), max_size=4),
    offsets=st.lists(st.integers(-1, 2**64), min_size=2, max_size=2),
    dtype=st.sampled_from(["F32", "BF16", "I64", "U8", "F99", ""]),
)
def test_lying_shapes(tmp_path_factory, shape, offsets, dtype):
    folder = adapter_folder(tmp_path_factory.mktemp("lies") / "adapter")
    name = "base_model.model.q.oft_R.weight"
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(48)
    (folder / "adapter_model.safetensors").write_bytes(data)
    try:
        tensors = read_folder(folder)[1]
    except ConfigurationError:
        return
    sizes = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}
    assert tensors[name].numel() * sizes[dtype] == 48, "what is read has the bytes that the file has"


OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    "a\\..\\b",
    "C:\\x",
    3,
    None,
    "x\0y",
    ["a"],
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}} if not isinstance(name, list) else {"weight_map": name}))
    with pytest.raises(ConfigurationError, match=r"model.safetensors.index.json"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigurationError, match=r"model.safetensors.index.json"):
        PretrainedModel(str(tmp_path))()


def test_hundreds_of_damaged_indexes(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    original = json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    index.write_text(original)
    check_model_folder(tmp_path)
    assert refused_or_read(lambda _: check_model_folder(tmp_path), index, 300, original.encode(), "index") > 90


def folder_with_code(folder, trap):
    folder.mkdir()
    (folder / "modeling_own.py").write_text(
        f"import os\nos.mkdir({str(trap)!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "class OwnConfig(C):\n    model_type = 'own'\n\nclass Own(M):\n    config_class = OwnConfig\n"
    )
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    config = {**sizes, "num_attention_heads": 2, "model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder / "weights")
    (folder / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    return str(folder)


def test_code_in_a_model_folder_runs_only_if_the_user_says_so(tmp_path, monkeypatch):
    trap = tmp_path / "sprung"
    name = folder_with_code(tmp_path / "model", trap)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigurationError, match=r"comes with its own code; .* trust_remote_code: true"):
        PretrainedModel(name)()
    assert not trap.exists()
    assert type(PretrainedModel(name, trust_remote_code=True)()).__name__ == "Own"
    assert trap.exists()


@pytest.mark.parametrize(
    "option",
    [
        {"trust_remote_code": True},
        {"weights_only": False},
        {"use_safetensors": False, "weights_only": False},
        {"use_kernels": True},
        {"attn_implementation": "someone/kernels"},
    ],
)
def test_options_that_run_what_a_file_says_are_refused(tmp_path, option):
    with pytest.raises(ConfigurationError, match=f"options: {list(option)[-1]}=.*"):
        PretrainedModel(str(tmp_path), options=option)


def test_options_are_those_of_loading_and_of_the_configuration(tmp_path, tiny_llama):
    name = str(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig(**tiny_llama)).save_pretrained(name)
    assert PretrainedModel(name, options={"attention_dropout": 0.25})().config.attention_dropout == 0.25
    with pytest.raises(ConfigurationError, match="'fusion_config' is neither a key of the configuration"):
        PretrainedModel(name, options={"fusion_config": {}})()
    with pytest.raises(ConfigurationError, match="'attention_drop' is neither a key .*; try attention_dropout"):
        PretrainedModel(name, options={"attention_drop": 0.1})()


def test_a_pickle_in_place_of_weights_runs_nothing(tmp_path, tiny_llama):
    LlamaConfig(**tiny_llama).save_pretrained(tmp_path)
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        PretrainedModel(str(tmp_path))()
    assert not (tmp_path / "sprung").exists()


def test_damaged_pretrained_weights_are_one_clear_error(tmp_path, tiny_llama):
    LlamaForCausalLM(LlamaConfig(**tiny_llama)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    original, generator = weights.read_bytes(), random.Random("weights")
    for _ in range(8):
        weights.write_bytes(mutated(original, generator))
        try:
            PretrainedModel(str(tmp_path))()
        except ConfigurationError as error:
            assert str(tmp_path) in str(error)
