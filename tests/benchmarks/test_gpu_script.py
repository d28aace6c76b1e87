"""gpu.sh without a GPU: its rehearsal, and what becomes of a run in which something fails, hangs or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "gpu.sh"
sys.path.append(str(HERE))

import gpu_table  # noqa: E402
from gpu.device import Gpu, Rehearsal  # noqa: E402
from gpu.main import STAGES, main, stage_cases  # noqa: E402
from gpu.record import LOST, Case, Record, append_line, read_lines  # noqa: E402


def script(*arguments, python=sys.executable, **options):
    environment = {name: value for name, value in os.environ.items() if name != "OUT"} | {"PYTHON": str(python)}
    return subprocess.Popen(["bash", SCRIPT, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


def finished(process, timeout):
    output, complaints = process.communicate(timeout=timeout)
    return process.returncode, output, complaints


def test_a_rehearsal_runs_every_case_that_a_gpu_would(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOTRAIN_GPU_SCRATCH", str(tmp_path))
    committed = sorted((HERE / "results").iterdir())
    # the time of a machine that runs other tests meanwhile: alone the rehearsal takes about a minute
    code, output, complaints = finished(script(tmp_path / "out", "--rehearse", "--seconds", 1440), timeout=900)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert code == 0, output + complaints + log[-3000:]
    lines = read_lines(tmp_path / "out" / "results.jsonl")
    wrong = [line for line in lines if "error" in line or "skipped" in line or line.get("right") is False]
    assert not wrong, wrong
    assert all(line["rehearsal"] is True for line in lines)
    for stage in STAGES:
        wanted = [case.name for case in stage_cases(stage, Gpu())]
        assert len(wanted) == len(set(wanted))
        for kind in (True, False):
            assert [line["case"] for line in lines if line["stage"] == stage and ("begun" in line) is kind] == wanted
    table = [sys.executable, str(HERE / "gpu_table.py"), str(tmp_path / "out" / "results.jsonl")]
    told = subprocess.run([*table, "--out", str(tmp_path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    titles = ("Machine", "Correct", "Layer 14336x4096 N=16384", "Targets", "Operations", "Training", "POET of an 8B")
    assert all(f"**{title}" in told.stdout for title in (*titles, "orthotrain fit"))
    found = json.loads((tmp_path / "gpu_rehearsal_without_a_gpu.json").read_text())
    assert found["rehearsal"] is True and found["versions"]["torch"] and "commit" in found
    fits = found["results"]["6"]
    assert fits["bf16 in 24 GiB"]["fits"] is True and fits["nf4 in 14 GiB"]["fits"] is False
    assert found["results"]["7"]["resumed"]["summary"]["steps"] == 6
    assert "no file was written" in subprocess.run(table, capture_output=True, text=True).stdout
    assert sorted((HERE / "results").iterdir()) == committed


FAKE = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if "--stage" not in arguments:
    sys.exit(0)
given = dict(zip(arguments, arguments[1:]))
stage = int(given["--stage"])
with open(given["--results"], "a") as file:
    file.write(json.dumps({{"stage": stage, "case": "begun here", "card": "x", "begun": True}}) + "\\n")
if stage == 2 and given["--part"] == "3" and not os.path.exists("{folder}/died"):
    open("{folder}/died", "w").close()
    os.abort()
if stage == 3:
    open("{folder}/pid", "w").write(str(os.getpid()))
    time.sleep(120)
"""


@pytest.fixture
def fake(tmp_path):
    """An interpreter whose stage 2 dies once in one of its processes, and whose stage 3 never ends."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable, folder=tmp_path))
    path.chmod(0o755)
    return path


def test_a_stage_that_dies_is_started_again_and_one_that_hangs_is_ended(fake, tmp_path):
    out = tmp_path / "out"
    code, *told = finished(script(out, "--stages", "2 3 4", "--seconds", 64, python=fake), timeout=120)
    assert code == 0, told
    lines = read_lines(out / "results.jsonl")
    assert [line["stage"] for line in lines if "begun" in line] == [2] * 13 + [3, 4]
    errors = {line["case"]: line["error"] for line in lines if "error" in line}
    assert errors == {"process 3.1": "exit code 134", "process 0.1": "its time of 10 s was over"}


def test_a_script_that_is_told_to_end_leaves_no_process(fake, tmp_path):
    process = script(tmp_path / "out", "--rehearse", "--stages", "3", python=fake)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM)
    assert finished(process, timeout=30)[0] == 130
    wait_for(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists())
    assert read_lines(tmp_path / "out" / "results.jsonl")[0]["begun"] is True


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--rehears"], "unknown option --rehears"),
        ([], "results.jsonl exists"),
        (["--stages"], "--stages needs a value"),
        (["--stages", "2 9"], "there are stages 1 to 7"),
        (["--seconds", "1.5"], "take a whole number"),
    ],
)
def test_what_the_script_refuses(arguments, reason, tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    code, _, complaints = finished(script(tmp_path, *arguments), timeout=60)
    assert code == 2 and reason in complaints and complaints.count("\n") == 1


def test_without_a_gpu_the_script_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, complaints = finished(script(tmp_path / "out"), timeout=120)
    assert code == 2 and "--rehearse" in complaints and not (tmp_path / "out" / "results.jsonl").exists()


def failing():
    raise ZeroDivisionError("of its own\nin two lines")


def ended(path):
    return {line["case"]: line for line in read_lines(path) if "begun" not in line}


def test_a_case_that_fails_is_recorded_and_the_next_one_taken(tmp_path):
    path = tmp_path / "results.jsonl"
    cases = [Case("first", lambda: {"value": 1}), Case("bad", failing), Case("last", lambda: {"value": 2})]
    Record(path, 4, 60, {"card": "x"}).take([*cases, Case("long", failing, 61)])
    found = ended(path)
    assert found["first"]["value"] == 1 and found["last"]["value"] == 2 and "skipped" in found["long"]
    assert found["bad"]["error"].startswith("ZeroDivisionError: of its own in two lines [test_gpu_script.py:")


def test_a_stage_that_is_started_again_goes_on_behind_the_case_that_ended_it(tmp_path):
    path = tmp_path / "results.jsonl"
    append_line(path, {"stage": 3, "case": "deadly", "begun": True})
    append_line(path, {"stage": 2, "case": "other", "begun": True})
    record = Record(path, 3, 60, {}, is_lost=lambda error: isinstance(error, ZeroDivisionError))
    with pytest.raises(SystemExit) as ending:
        record.take([Case("deadly", failing), Case("other", failing), Case("last", lambda: {})])
    assert ending.value.code == LOST
    Record(path, 3, 60, {}).take([Case("deadly", failing), Case("other", failing), Case("last", lambda: {})])
    found = ended(path)
    assert found["deadly"]["error"] == "the process ended in this case" and "Zero" in found["other"]["error"]
    assert len(read_lines(path)) == 7 and "error" not in found["last"]


def test_a_stage_that_cannot_begin_says_why_and_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.delenv("ORTHOTRAIN_GPU_SCRATCH", raising=False)
    path = tmp_path / "results.jsonl"
    options = ["--stage", "7", "--results", str(path), "--seconds", "60", "--rehearse"]
    monkeypatch.setattr(sys, "argv", ["main.py", *options])
    main()
    (line,) = read_lines(path)
    assert line["rehearsal"] is True and line["error"].startswith("KeyError: 'ORTHOTRAIN_GPU_SCRATCH'")


def test_a_kill_loses_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    program = (
        "import sys; sys.path.append(sys.argv[1]); from gpu.record import Case, Record; from pathlib import Path\n"
        "cases = (Case(str(n), lambda: {'v': 'x' * 2000}) for n in range(10**9))\n"
        "Record(Path(sys.argv[2]), 1, 600, {}).take(cases)"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", program, str(HERE), str(path)])
    wait_for(lambda: path.exists() and path.stat().st_size > 50_000)
    process.kill()
    process.wait()
    lines = read_lines(path)
    assert len(lines) > 20 and not any("error" in line for line in lines)
    assert [line["case"] for line in lines if "v" in line] == [str(n) for n in range(len(lines) // 2)]


def test_calls_of_cuda_exist_with_the_arguments_that_they_are_given():
    machine, cuda = Gpu(), mock.create_autospec(torch.cuda, spec_set=True)
    cuda.get_device_properties.return_value = mock.Mock(
        major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    cuda.max_memory_allocated.return_value = cuda.max_memory_reserved.return_value = 3 * 2**30
    cuda.memory_allocated.return_value = 0
    cuda.Event.side_effect = lambda enable_timing: mock.Mock(elapsed_time=lambda end: 6.0)
    with mock.patch.object(torch, "cuda", cuda):
        ran = mock.Mock()
        assert machine.timed(ran, 3).device == 2.0 and ran.call_count == 3
        assert machine.captured(ran) == cuda.CUDAGraph.return_value.replay and ran.call_count == 7
        with machine.within(20):
            cuda.set_per_process_memory_fraction.assert_called_with(0.25)
        cuda.set_per_process_memory_fraction.assert_called_with(1.0)
        machine.reset_peak()
        machine.release()
        assert machine.peak() == {"peak_gib": 3.0, "reserved_gib": 3.0}
        assert machine.properties()["capability"] == "9.0" and not machine.is_lost(torch.OutOfMemoryError())
    assert set(vars(Rehearsal)) - {"TOO_SMALL"} <= set(vars(Gpu))


def results(tmp_path, *lines):
    path = tmp_path / "results.jsonl"
    for line in lines:
        append_line(path, {"card": "NVIDIA H100 80GB HBM3", **line})
    return path


def test_the_table_tells_what_failed_and_what_has_no_end(tmp_path, capsys, monkeypatch):
    path = results(
        tmp_path,
        {"stage": 1, "case": "machine", "versions": {"torch": "2.11.0"}, "commit": "abc"},
        {"stage": 2, "case": "POET float32", "errors": {"y": 0.5, "x": 1e-9}, "limit": 1e-5, "right": False},
        {"stage": 3, "case": "4096x4096 N=2048 POET", "begun": True},
    )
    with path.open("a") as file:
        file.write('{"stage": 5, "ca')
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(path), "--out", str(tmp_path)])
    assert gpu_table.main() == 1
    told = capsys.readouterr().out
    assert "| 2 | POET float32 | error above 1e-05: {'y': '5.0e-01'} |" in told
    assert "it was begun and did not end" in told and "the line is not whole" in told
    found = json.loads((tmp_path / "gpu_nvidia_h100_80gb_hbm3.json").read_text())
    assert found["device"] == "NVIDIA H100 80GB HBM3" and found["commit"] == "abc" and "rehearsal" not in found


def test_the_table_refuses_two_cards(tmp_path, capsys, monkeypatch):
    path = results(tmp_path, {"stage": 1, "case": "a"}, {"stage": 1, "case": "b", "card": "NVIDIA H200"})
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(path)])
    with pytest.raises(SystemExit) as ending:
        gpu_table.main()
    assert ending.value.code == 2 and "2 cards" in capsys.readouterr().err
