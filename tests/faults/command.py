"""One process that runs the command line of ``JOB``, with a fault built in; run as ``__main__``."""

import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

JOB = JOB  # noqa: F821
os.environ.update(JOB["environment"])

import torch  # noqa: E402

from orthotrain.cli.main import main  # noqa: E402

if __name__ == "__main__":
    if JOB["log"]:
        log = os.open(JOB["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = ["orthotrain", *JOB["arguments"]]
    torch.set_num_threads(1)
    # this process must start workers as a process of a shell does: not as a daemon, and by fork
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method("fork", force=True)
    code = 0
    try:
        if "progress" in JOB:
            runpy.run_path(str(Path(__file__).parent / "injected.py"))["inject"](JOB)
        main(JOB["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
