"""Whole runs of any script, each a process of its own; what their folders hold; killing them at a given step."""

import copy
import csv
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ALGORITHMS = Path(__file__).resolve().parent.parent / "algorithms"
KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import {script} as script
loop = script.Run.loop
def killed(self, phase, *args, **kwargs):
    for step in loop(self, phase, *args, **kwargs):
        if (phase, step) == ({phase!r}, {step}):
            os.kill(os.getpid(), signal.{signal})
        yield step
script.Run.loop = killed
script.train(script.parse_args())
"""


# Importing PyTorch takes most of a short run's time: here processes are forked from one that has (on macOS such forks
# may crash). tests/conftest.py's `start` and `run` are what a user types.
FORKED = multiprocessing.get_context("forkserver")
if sys.platform == "linux":
    FORKED.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard"])


def become(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """In a new process: run a file, or code after -c, as `python` would."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 where PyTorch is imported after it
    first, sys.argv = arguments[0], arguments
    if first == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


def run_script(script: str, home: Path, *arguments, code: str | None = None) -> subprocess.CompletedProcess:
    """Run algorithms/<script>.py, or `code`, in a process of its own with one thread and an empty home."""
    start = [str(ALGORITHMS / f"{script}.py")] if code is None else ["-c", code]
    command = [*start, *map(str, arguments)]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"}
        process = FORKED.Process(target=become, args=(command, environment, out.name, err.name))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{command} did not end")
        return subprocess.CompletedProcess(command, process.exitcode, out.read(), err.read())


def run_killed_at(script: str, phase: str, step: int, number: str, home: Path, *arguments):
    """Run a script that sends itself the signal in the middle of a phase."""
    code = KILLED.format(folder=str(ALGORITHMS), script=script, phase=phase, step=step, signal=number)
    return run_script(script, home, *arguments, code=code)


def watch_phases(script, monkeypatch) -> dict[str, dict]:
    """What a run in this process fills: a copy of all its parts' states at the start of each phase, and when "done"."""
    states, loop, finish = {}, script.Run.loop, script.Run.finish

    def keep(run, phase: str) -> None:
        states[phase] = copy.deepcopy({name: part.state_dict() for name, part in run.parts.items()})

    monkeypatch.setattr(script.Run, "loop", lambda run, *args, **kw: (keep(run, args[0]), loop(run, *args, **kw))[1])
    monkeypatch.setattr(script.Run, "finish", lambda run: (keep(run, "done"), finish(run))[1])
    return states


def rows(folder: Path, name: str = "evals.csv") -> list[dict]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder: Path) -> list[dict]:
    """evals.csv without its clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def tensors(state, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists, by their path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: tensor for k, value in items for key, tensor in tensors(value, f"{name}/{k}").items()}


def equal(a, b) -> bool:
    """Whether two nested states hold the same tensors, bit for bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (a, b))
    assert len(tensors(first)) > 15
    return equal(first, second)
