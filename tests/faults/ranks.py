"""Runs a script in several real processes that form a group; tests load this file with ``runpy.run_path``.

The processes are forked from a server that has imported the package once: a rank starts in a fraction of a second.
"""

import multiprocessing as mp
import runpy
import socket
import time

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "orthotrain.cli.trainer_cli",
        "orthotrain.cli.main",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "torch.nn.parallel",
        "matplotlib.backends.backend_agg",
    ]
)


def free_port():
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank, ranks, port):
    """Return the variables that torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def start(script, job, ranks=1, log=None, environment=None):
    """Start ``script`` once for each rank as ``__main__``, with ``JOB`` among its globals; return the processes."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        variables = {"OMP_NUM_THREADS": "1", **(rank_environment(rank, ranks, port) if ranks > 1 else {})}
        given = {**job, "rank": rank, "ranks": ranks, "log": f"{log}.{rank}" if log else None}
        given["environment"] = {**variables, **(environment or {})}
        process = CONTEXT.Process(target=runpy.run_path, args=(str(script), {"JOB": given}, "__main__"), daemon=True)
        process.start()
        processes.append(process)
    return processes


def wait(processes, seconds=400):
    """Wait for all processes; kill those that are left after ``seconds``. Return the exit codes."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} ranks did not end within {seconds} s"
    return [process.exitcode for process in processes]
