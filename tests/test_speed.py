"""speed.py: the steps are the scripts' own, JAX's and plain PyTorch's are TD3+BC's; its table; bad input."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import speed

FINE_TUNING = ("fine-tuning, {}", "fine-tuning, {}+OPT, kappa = 1", "fine-tuning, {}+OPT, kappa < 1")
STEPS = {name: ["offline, {}", "online pre-training, {}+OPT", *FINE_TUNING] for name in speed.NAMES}
STEPS |= {name: ["offline, {}", "fine-tuning, {}"] for name in speed.BASELINES}
LABELS = [label.format(name) for name, labels in STEPS.items() for label in labels]
LABELS += ["SPOT's VAE", speed.TEN, speed.TWO, speed.PLAIN, speed.JAX]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(speed, "N_OFFLINE", 2_000)
    monkeypatch.setattr(speed, "N_ONLINE", 500)
    monkeypatch.setattr(speed, "TAKEN", 20)


def test_every_step_of_every_script_is_timed(small, monkeypatch):
    """Without compiling; a step moves the networks, and nothing of the scripts is left changed."""
    scripts = [importlib.import_module(script) for script in (speed.SCRIPTS | speed.BASELINES).values()]
    accelerate, agents = [script.accelerate for script in scripts], []
    for script in scripts:
        monkeypatch.setattr(script, "tune", lambda args: None)
        new = script.Agent
        monkeypatch.setattr(script, "Agent", lambda *args, new=new: agents.append(new(*args)) or agents[-1])
    monkeypatch.setattr(speed, "plain_eager", lambda threads: 7.0)
    monkeypatch.setattr(speed, "milliseconds", lambda take, n: (take(), n)[1])
    measures = speed.contestants(compiled=False)
    assert sorted(measures) == sorted(LABELS)
    assert [script.accelerate for script in scripts] == accelerate
    for label in (label for label in LABELS if "TD3" not in label):
        assert measures[label]() == (4 if "RLPD" in label or "Cal-QL" in label else 20)
    assert len(agents) == 5 + 5 + 5 + 7 + 2 * 4
    for agent in agents:
        moved = [float(state["step"]) for part in agent.parts().values() if isinstance(part, torch.optim.Adam)
                 for state in part.state.values()]  # fmt: skip
        assert max(moved) >= 8


def test_jax_and_plain_pytorch_learn_what_td3_bc_learns(small, monkeypatch):
    """Every state is terminal, r = -|a - 0.5|^2, the data's actions are around 0.5: so is the policy, and Q is r."""
    data, networks, mlp = speed.columns(), [], speed.mlp
    data[0][:], data[1][:] = 1, data[1] / 2 + 0.5
    data[2][:], data[4][:] = -np.square(data[1] - 0.5).sum(1), 1
    states, ends = data[0][:100], np.ones((100, 3), np.float32)
    monkeypatch.setattr(speed, "mlp", lambda *sizes: networks.append(mlp(*sizes)) or networks[-1])
    torch.manual_seed(0)
    step = speed.plain_step([torch.from_numpy(column.reshape(len(column), -1)) for column in data])
    for i in range(2_000):
        step(i)
    actor, first, _ = networks
    actions = torch.tanh(actor(torch.from_numpy(states)))
    assert actions.mean().item() == pytest.approx(0.5, abs=0.1)
    values = first(torch.cat([torch.from_numpy(states), torch.from_numpy(ends)], 1))
    assert values.mean().item() == pytest.approx(-0.75, abs=0.1)

    take = speed.jax_steps(data, 2_000)
    jax_actor, critics = take()[:2]

    def forward(layers, x):
        for weight, bias in layers[:-1]:
            x = np.maximum(x @ np.asarray(weight) + np.asarray(bias), 0)
        return x @ np.asarray(layers[-1][0]) + np.asarray(layers[-1][1])

    assert np.tanh(forward(jax_actor, states)).mean() == pytest.approx(0.5, abs=0.1)
    inputs = np.concatenate([states, ends], 1)
    assert all(forward(q, inputs).mean() == pytest.approx(-0.75, abs=0.1) for q in critics)


def test_medians_ratios_and_hours():
    ms = {label: 2.0 for label in LABELS} | {speed.PLAIN: 7.0, speed.JAX: 1.0}
    ms |= {f"fine-tuning, {name}+OPT, kappa = 1": 4.0 for name in speed.NAMES}
    rounds = [ms | {speed.TWO: 0.5}, ms | {speed.TWO: 1.0}]
    out = speed.report(rounds)
    assert "| offline, TD3 | 2.00 (2.00 to 2.00) | 500 |" in out
    assert f"| {speed.PLAIN} / offline, TD3 | 3.50 (3.50 to 3.50) |" in out
    assert f"| offline, TD3 / {speed.JAX} | 2.00 (2.00 to 2.00) |" in out
    assert f"| {speed.TEN} / {speed.TWO} | 3.00 (2.00 to 4.00) |" in out
    assert "| fine-tuning, IQL+OPT, kappa = 1 / fine-tuning, IQL | 2.00 (2.00 to 2.00) |" in out
    hours = dict(re.findall(r"\| (\S+(?:, kappa . 1)?) \| (\d+\.\d) \|", out.split("protocol")[1]))
    assert hours["TD3"] == f"{(1e6 * 2 + 300e3 * 5 * 2) / 3.6e6:.1f}"
    assert hours["TD3+OPT, kappa = 1"] == f"{(1e6 * 2 + 50e3 * 2 + 275e3 * 5 * 4) / 3.6e6:.1f}"
    assert hours["SPOT"] == f"{(100e3 * 2 + 1e6 * 2 + 300e3 * 2) / 3.6e6:.1f}"
    assert hours["BOORL"] == f"{(1e6 * 2 + 275e3 * 5 * 2) / 3.6e6:.1f}"  # 25,000 steps without an update
    without = [{label: 2.0 for label in LABELS if label != speed.JAX}]
    assert "JAX" not in speed.report(without)


def test_a_failing_run_and_bad_input(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "start", lambda *args: subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]))
    with pytest.raises(SystemExit, match="speed.py: the run of TD3 failed"):
        speed.regenerate(tmp_path)
    for arguments, words in {"--rounds 0": "1 or more", "--threads x": "1 or more", "now": "unrecognized"}.items():
        command = ["bash", ROOT / "benchmark.sh", "speed", *arguments.split()]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == "" and words in result.stderr
        assert result.stderr.startswith("speed.py: ") and result.stderr.count("\n") == 1
