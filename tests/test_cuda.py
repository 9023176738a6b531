"""The CUDA path: some eager steps, then CUDA graphs, do what the plain code does."""

import contextlib
import types

import iql_opt
import pytest
import spot_opt
import td3_opt
import torch
from conftest import losses_of, take_phase
from test_device import cases


def test_every_step_is_taken_once(monkeypatch):
    """Three eager ones of each kind, then its graph's, which has none of its own; with stand-ins for CUDA's graphs."""
    taken, capturing = [], []

    def update(flag: bool) -> dict:
        if capturing:
            capturing[0].flag = flag
        else:
            taken.append(("eager", flag))
        loss = types.SimpleNamespace(is_cuda=True, flag=flag, detach=lambda: loss)
        return {"loss": loss}

    class Graph:
        def replay(self):
            taken.append(("replay", self.flag))

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    step, flags = td3_opt.accelerate(False)(update), [False, True] * 5
    assert [step(flag)["loss"].flag for flag in flags] == flags
    assert taken == [("eager", flag) for flag in flags[:6]] + [("replay", flag) for flag in flags[6:]]


def phase_losses(script, phase: str, variant: dict, graphs: bool, compiled: bool, monkeypatch) -> list[list[float]]:
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    if not graphs:
        monkeypatch.setattr(script, "accelerate", lambda compiled: lambda update: update)
    seen = take_phase(script, phase, variant, "cuda", compiled=compiled)
    monkeypatch.undo()
    assert (len(replays) > 30) == graphs
    return losses_of(seen)


CASES = [
    ("offline", {}),
    ("online_pretrain", {}),
    ("online_pretrain", {"meta_second_order": True}),
    ("online_pretrain", {"q_on": False}),
    ("online_finetune", {}),
    ("online_finetune", {"kappa_init": 1.0, "kappa_end": 1.0}),
    ("online_finetune", {"opt": False}),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@cases(CASES)
def test_cuda_graphs_equal_the_plain_code(script, phase, variant, monkeypatch):
    plain, graphs = (phase_losses(script, phase, variant, graphs, False, monkeypatch) for graphs in (False, True))
    assert len(plain) == len(graphs) >= 10
    for a, b in zip(plain, graphs, strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase, variant", CASES, ids=str)
@pytest.mark.parametrize("script", [td3_opt, spot_opt, iql_opt], ids=lambda script: script.__name__)
def test_compiled_cuda_graphs_start_as_the_plain_code_does(script, phase, variant, monkeypatch):
    plain = phase_losses(script, phase, variant, False, False, monkeypatch)
    compiled = phase_losses(script, phase, variant, True, True, monkeypatch)
    for a, b in zip(plain[:10], compiled[:10], strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-3)
