"""What a gradient step costs on this machine: `bash benchmark.sh speed`, or `python speed.py`.

A round measures everything once: TD3+BC in plain eager PyTorch, then short runs of the scripts on hopper-random-v2. A
machine's speed drifts within minutes, so look at the ratios, each of one round. Before the rounds the data is
regenerated, into a folder that is removed at the end, and the memory of a run is measured.
"""

import argparse
import copy
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ALGORITHMS = Path(__file__).resolve().parent / "algorithms"
# Gradient steps offline, and environment steps of fine-tuning; TD3 takes 5 gradient steps in each of these, RLPD 20.
STEPS = {"TD3": (1_000, 200), "SPOT": (1_000, 800), "IQL": (1_000, 800), "RLPD": (400, 25)}
N_TAU = 1_600
SHORT = ["--n-tau", N_TAU, "--n-pretrain", 200, "--eval-freq", 0, "--checkpoint-freq", 0, "--no-save-model"]
ALL_PHASES = ["--offline-steps", 0, "--online-steps", 3_300, "--n-tau", 3_000, "--n-pretrain", 10]
MIXED = ["--kappa-init", 0.1, "--kappa-end", 0.9, "--kappa-decay", 1_000]
Q_ON_ALONE = ["--kappa-init", 1, "--kappa-end", 1]
PLAIN, TWO_CRITICS = "offline, plain eager PyTorch", "offline, RLPD of 2 critics"


def offline(name: str) -> str:
    return f"offline, {name}" + (" of 10 critics" if name == "RLPD" else "")


def start(name: str, folder: Path, *flags) -> subprocess.Popen:
    script = ALGORITHMS / f"{name.lower()}_opt.py"
    command = [sys.executable, script, "--env-id", "hopper-random-v2", "--eval-episodes", 1, "--no-progress"]
    return subprocess.Popen(list(map(str, [*command, "--run-dir", folder, *flags])), stdout=sys.stderr)


def run(name: str, folder: Path, *flags) -> dict[str, float]:
    """Milliseconds a gradient step, phase by phase."""
    if start(name, folder, *SHORT, "--offline-steps", STEPS[name][0], *flags).wait():
        raise SystemExit(f"speed.py: the run of {name} failed")
    with open(folder / "speed.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gradient_steps"] != "0"]
    return {row["phase"]: 1e3 * float(row["seconds"]) / int(row["gradient_steps"]) for row in rows}


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    hidden = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return hidden.append(nn.Linear(256, outputs))


def plain_eager() -> float:
    """Milliseconds a step of TD3+BC as most public code writes it: a network a module, a loss.item() a step."""
    n, states, actions = 1_000_000, 11, 3
    actor, critics = nn.Sequential(mlp(states, actions), nn.Tanh()), [mlp(states + actions, 1) for _ in range(2)]
    networks = [actor, *critics]
    targets = copy.deepcopy(networks)
    of_actor, *of_critics = (torch.optim.Adam(network.parameters(), 3e-4) for network in networks)
    data = [torch.randn(n, states), torch.rand(n, actions) * 2 - 1, torch.randn(n, 1), torch.randn(n, states)]
    data.append(torch.zeros(n, 1))

    def descend(loss: torch.Tensor, optimizers: list) -> None:
        loss.item()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    for i in range(650):
        if i == 50:
            started = time.perf_counter()
        s, a, r, s2, d = (column[torch.randint(n, (256,))] for column in data)
        with torch.no_grad():
            a2 = (targets[0](s2) + (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
            y = r + 0.99 * (1 - d) * torch.min(*(q(torch.cat([s2, a2], 1)) for q in targets[1:]))
        descend(sum(F.mse_loss(q(torch.cat([s, a], 1)), y) for q in critics), of_critics)
        if i % 2:
            pi = actor(s)
            q = critics[0](torch.cat([s, pi], 1))
            descend(-2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a), [of_actor])
            for target, network in zip(targets, networks, strict=True):
                for t, p in zip(target.parameters(), network.parameters(), strict=True):
                    t.data.copy_(0.995 * t.data + 0.005 * p.data)
    return 1e3 * (time.perf_counter() - started) / 600


def measure_round(folder: Path) -> dict[str, float]:
    """Milliseconds a gradient step, by what was measured."""
    times = {PLAIN: plain_eager()}
    for name, (_, env_steps) in STEPS.items():
        own = {"SPOT": ["--vae-steps", 50], "RLPD": ["--offline-utd", 20]}.get(name, [])
        alone = run(name, folder / name, *own, "--no-opt", "--online-steps", env_steps)
        with_opt = [*own, "--offline-from", folder / name, "--online-steps", N_TAU + env_steps]
        mixed = run(name, folder / f"{name}-mixed", *with_opt, *MIXED)
        q_on_alone = run(name, folder / f"{name}-q-on-alone", *with_opt, *Q_ON_ALONE)
        if "vae" in alone:
            times[f"{name}'s VAE"] = alone["vae"]
        times[offline(name)] = alone["offline"]
        times[f"online pre-training, {name}+OPT"] = mixed["online_pretrain"]
        times[f"fine-tuning, {name}"] = alone["online_finetune"]
        times[f"fine-tuning, {name}+OPT, kappa = 1"] = q_on_alone["online_finetune"]
        times[f"fine-tuning, {name}+OPT, kappa < 1"] = mixed["online_finetune"]
    two = run("RLPD", folder / "RLPD-2", "--no-opt", "--online-steps", 0, "--offline-utd", 20, "--ensemble-size", 2)
    return times | {TWO_CRITICS: two["offline"]}


def report(rounds: list[dict[str, float]]) -> str:
    def spread(values: list[float]) -> str:
        return f"({min(values):.2f} to {max(values):.2f})"

    steps = {what: [times[what] for times in rounds] for what in rounds[0]}
    lines = [f"{what:36} {statistics.median(ms):7.2f} ms a gradient step {spread(ms)}" for what, ms in steps.items()]
    pairs = [(PLAIN, offline("TD3")), (offline("SPOT"), offline("TD3")), (offline("IQL"), offline("TD3"))]
    pairs.append((offline("RLPD"), TWO_CRITICS))
    for fine_tuning in (f"fine-tuning, {name}" for name in STEPS):
        pairs += [(f"{fine_tuning}+OPT, kappa {kappa} 1", fine_tuning) for kappa in "=<"]
    for a, b in pairs:
        ratios = [times[a] / times[b] for times in rounds]
        lines.append(f"{a} / {b}: {statistics.median(ratios):.2f} {spread(ratios)}")
    return "\n".join(lines)


def regenerate(folder: Path) -> str:
    seconds = []
    for name in ("first", "second"):  # the second finds the data there
        started = time.perf_counter()
        _, status, usage = os.wait4(start("TD3", folder / name, *ALL_PHASES).pid, 0)
        seconds.append(time.perf_counter() - started)
        if status:
            raise SystemExit("speed.py: the run of TD3 failed")
    peak = usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return (
        f"regenerating hopper-random-v2: {seconds[0] - seconds[1]:.0f} s\n"
        f"peak memory of the largest process, a run with all phases: {peak:.2f} GiB"
    )


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"speed.py: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write a whole number, 1 or more")
    return int(text)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3, of some minutes each")
    parser.add_argument("--threads", type=positive, default=2, help="threads of a run (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, rounds = Path(name), []
        for variable in ("XDG_CACHE_HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
            os.environ[variable] = str(folder / "data")
        regenerating = regenerate(folder)
        for i in range(args.rounds):
            rounds.append(measure_round(folder / str(i)))
            print(f"round {i + 1} of {args.rounds} is done", file=sys.stderr)
    print(f"{processor()}, {args.threads} threads; medians of {args.rounds} rounds (and their range)\n")
    print(f"{report(rounds)}\n{regenerating}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
