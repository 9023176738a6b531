"""The CUDA path: some eager steps, then CUDA graphs, do what the plain code does."""

import contextlib
import types

import iql_opt
import numpy as np
import pytest
import rlpd_opt
import spot_opt
import td3_opt
import torch


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
    step, flags = td3_opt.accelerate(update), [False, True] * 5
    assert [step(flag)["loss"].flag for flag in flags] == flags
    assert taken == [("eager", flag) for flag in flags[:6]] + [("replay", flag) for flag in flags[6:]]


def losses(script, phase: str, variant: dict, graphs: bool, monkeypatch) -> list[list[float]]:
    """The losses of 200 gradient steps from one and the same state, in the plain code or as the script takes them."""
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    if not graphs:
        monkeypatch.setattr(script, "accelerate", lambda update: update)
    n = 5_000
    columns = (rng.standard_normal((n, 11)), rng.uniform(-1, 1, (n, 3)), rng.standard_normal(n))
    columns += (rng.standard_normal((n, 11)), np.zeros(n))
    data = script.Transitions(*(np.asarray(column, np.float32) for column in columns))
    steps = {"vae_steps": 200} if script is spot_opt else {}
    steps |= dict(offline_steps=200, n_pretrain=200, n_tau=100, online_steps=140)
    args = script.resolve(script.Args(**(dict(env_id="hopper-medium-v2", device="cuda") | steps | variant)))
    buffer = script.ReplayBuffer(data, 200, device)
    for i in range(100):
        buffer.add(*(column[i] for column in data))
    agent = script.Agent(args, 11, 3, device)
    torch.manual_seed(1)
    balanced = script.BalancedReplay(buffer, args.batch_size, device) if args.replay == "balanced" else None
    seen = []

    class FakeRun:
        env_steps = 0

        def __init__(self):
            self.device, self.metrics, self.policy = device, {}, script.Policy(agent.actor)

        def loop(self, phase, total, **kwargs):
            torch.manual_seed(2)
            for step in range(total):
                yield step
                seen.append([float(self.metrics[name]) for name in sorted(self.metrics) if name.endswith("loss")])

    class FakeCollector:
        observation = data.observations[0]

        def step(self, action):
            return buffer.add(*(column[0] for column in data))

    if phase == "offline":
        script.offline_pretrain(args, FakeRun(), agent, buffer)
    elif phase == "online_pretrain":
        script.online_pretrain(args, FakeRun(), agent, buffer)
    else:
        script.online_finetune(args, FakeRun(), agent, buffer, balanced, FakeCollector())
    monkeypatch.undo()
    assert (len(replays) > 30) == graphs
    return seen


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
@pytest.mark.parametrize("phase, variant", CASES, ids=str)
@pytest.mark.parametrize("script", [td3_opt, spot_opt, iql_opt, rlpd_opt], ids=lambda script: script.__name__)
def test_cuda_graphs_equal_the_plain_code(script, phase, variant, monkeypatch):
    plain, graphs = (losses(script, phase, variant, graphs, monkeypatch) for graphs in (False, True))
    assert len(plain) == len(graphs) >= 40
    for a, b in zip(plain, graphs, strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-3)
