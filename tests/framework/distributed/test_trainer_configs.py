"""Every config of configs/trainer, added to the config of a run, with real processes as far as a CPU allows."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from orthotrain.callbacks.merge_rotations import check_merging
from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.cli.config_files import shipped_configs
from orthotrain.cli.trainer_cli import OrthotrainCLI
from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.errors import ConfigurationError
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, PoetLayers, PoetModule

FAULTS = Path(__file__).parents[2] / "faults"
RANKS = runpy.run_path(str(FAULTS / "ranks.py"))
QUICK = ["-c", "pretrain/poet_quickstart.yaml"]
TRAINERS = [name for name in shipped_configs() if name.startswith("trainer/")]


def finished(run, ranks=1):
    """Return the optimizer step of the last checkpoint of a run, and the number of ranks that it was written by."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    (place,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return checkpoint["global_step"], place["num_replicas"]


def test_there_is_one_for_each_way_of_running():
    assert {Path(name).stem for name in TRAINERS} == {"cpu", "ddp", "fsdp2", "multinode", "slurm"}
    for name in TRAINERS:
        assert shipped_configs()[name].read_text().startswith("# ")


RUNS = [n for n in shipped_configs() if n.startswith(("pretrain/", "finetune/")) and "/options/" not in n]


@pytest.mark.parametrize("run", RUNS)
def test_it_combines_with_any_run(run):
    for trainer in TRAINERS:
        paths = [str(shipped_configs()[name]) for name in (run, trainer)]
        overrides = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
        # SLURM's own environment is only valid inside a job
        overrides += ["--trainer.plugins", "null"] if "slurm" in trainer else []
        cli = OrthotrainCLI([*(part for path in paths for part in ("-c", path)), *overrides], run=False)
        expected = {"cpu": "SingleDevice", "fsdp2": "Sharded"}.get(Path(trainer).stem, "DDP")
        assert type(cli.trainer.strategy).__name__ == f"{expected}Strategy"


@pytest.mark.parametrize("kind", ["PoetModule", "LoraModule", "LoraModule without merges", "OftModule"])
def test_deepspeed_is_refused_where_a_merge_would_be_lost(kind):
    """DeepSpeed's optimizer steps its own copies. DeepSpeed is not installed here: this tests the check, not a run."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 8))
    if kind == "OftModule":
        module = OftModule(network, OftLayers(block_size=4))
    elif kind == "PoetModule":
        module = PoetModule(network, PoetLayers(block_size=4, init="keep"))
    else:
        module = LoraModule(network, LoraLayers(rank=2), merge_every=2 if kind == "LoraModule" else None)
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    if kind in ("PoetModule", "LoraModule"):
        with pytest.raises(ConfigurationError, match=r"DeepSpeed keeps copies .* -c trainer/fsdp2.yaml"):
            check_merging(strategy, module.configure_callbacks())
        check_merging(ShardedStrategy.__new__(ShardedStrategy), module.configure_callbacks())
    else:
        check_merging(strategy, module.configure_callbacks())


def forked(arguments, tmp_path, ranks=1, environment=None):
    job = {"arguments": arguments}
    processes = RANKS["start"](FAULTS / "command.py", job, ranks, log=tmp_path / "log", environment=environment)
    codes = RANKS["wait"](processes)
    assert codes == [0] * ranks, "".join(path.read_text()[-3000:] for path in tmp_path.glob("log.*"))


def test_cpu(small_config, tmp_path):
    forked(["fit", *QUICK, "-c", str(small_config), "-c", "trainer/cpu.yaml"], tmp_path)
    assert finished(tmp_path / "run") == (6, 1)


def test_ddp_as_the_command_line_starts_it(small_config, tmp_path):
    """The config that starts its other process itself, through the installed command."""
    command = [
        shutil.which("orthotrain", path=str(Path(sys.executable).parent)),
        "fit",
        *QUICK,
        "-c",
        str(small_config),
    ]
    command += ["-c", "trainer/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world_size=2" in done.stderr.replace("/", "=") or "2 processes" in done.stderr
    assert finished(tmp_path / "run") == (6, 2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def test_fsdp2(small_config, tmp_path):
    arguments = ["fit", *QUICK, "-c", str(small_config), "-c", "trainer/fsdp2.yaml"]
    forked([*arguments, "--trainer.accelerator", "cpu", "--trainer.devices", "2"], tmp_path, 2)
    assert finished(tmp_path / "run") == (6, 2)
    assert "spectrum drift" in (tmp_path / "run" / "summary.txt").read_text()


def test_slurm(small_config, tmp_path):
    """The variables that ``srun`` sets for two tasks on one node; there is no SLURM here."""
    port = str(RANKS["free_port"]())
    variables = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    variables |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["fit", *QUICK, "-c", str(small_config), "-c", "trainer/slurm.yaml", "--trainer.accelerator", "cpu"]
    job = {"arguments": [*arguments, "--trainer.devices", "2", "--trainer.num_nodes", "1"]}
    processes = []
    for rank in range(2):
        own = {**variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        log = tmp_path / f"task{rank}"
        processes += RANKS["start"](FAULTS / "command.py", job, 1, log=log, environment=own)
    codes = RANKS["wait"](processes)
    assert codes == [0, 0], "".join(path.read_text()[-3000:] for path in tmp_path.glob("task*"))
    assert finished(tmp_path / "run") == (6, 2)


class Hosts:
    """Two network namespaces, each with an address of its own, joined by a pair of virtual interfaces."""

    def __init__(self):
        self.names = [f"orthotrain-{os.getpid()}-{host}" for host in "ab"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]

    def __enter__(self):
        if shutil.which("ip") is None:
            pytest.skip("two hosts need the command `ip`, which is not installed")
        added = subprocess.run(["ip", "netns", "add", self.names[0]], capture_output=True, text=True)
        if added.returncode:
            pytest.skip(f"network namespaces are not permitted here: {added.stderr.strip()}")
        self.do("netns", "add", self.names[1])
        ends = [f"ot{os.getpid() % 100000}{host}" for host in "ab"]
        pair = ["link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", "name", ends[1]]
        self.do(*pair, "netns", self.names[1])
        for name, end, address in zip(self.names, ends, self.addresses, strict=True):
            self.do("-n", name, "addr", "add", f"{address}/24", "dev", end)
            self.do("-n", name, "link", "set", end, "up")
            self.do("-n", name, "link", "set", "lo", "up")
        self.ends = ends
        return self

    def __exit__(self, *exception):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def do(self, *arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def start(self, host, command, log):
        own = {"GLOO_SOCKET_IFNAME": self.ends[host], "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        inside = ["ip", "netns", "exec", self.names[host], *command]
        environment = {**os.environ, **own}
        with log.open("w") as file:
            return subprocess.Popen(inside, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)


def test_multinode_on_two_hosts(small_config, tmp_path):
    """torchrun on two hosts with a network between them, with the command of the manual."""
    binaries = Path(sys.executable).parent
    run = ["--no-python", str(binaries / "orthotrain"), "fit", *QUICK, "-c", str(small_config)]
    run += ["-c", "trainer/multinode.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    with Hosts() as hosts:
        rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        rendezvous += ["--rdzv-endpoint", f"{hosts.addresses[0]}:29411"]
        logs = [tmp_path / f"host{host}.log" for host in range(2)]
        launch = [str(binaries / "torchrun"), *rendezvous]
        processes = []
        for host, log in enumerate(logs):
            # both hosts have the same name here, by which torchrun decides who serves the rendezvous
            own = ["--local-addr", hosts.addresses[host], "--rdzv-conf", f"is_host={1 - host}"]
            processes.append(hosts.start(host, [*launch, *own, *run], log))
        try:
            codes = [process.wait(timeout=400) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        text = "".join(log.read_text()[-4000:] for log in logs)
        assert codes == [0, 0], text
    assert finished(tmp_path / "run") == (6, 2)
    assert re.search(r"GLOBAL_RANK: 1", text)
