"""What a gradient step costs on this machine: `bash benchmark.sh speed`, or `python speed.py`.

A round times every gradient step of the scripts once, on data of hopper's sizes, and TD3+BC's as plain eager PyTorch
and (if jax is installed) a jitted JAX program take it. A machine's speed drifts within minutes, so look at the ratios,
each of one round. Before the rounds the steps are compiled, and data is regenerated into a folder that is removed.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import inspect
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ALGORITHMS = Path(__file__).resolve().parent / "algorithms"
NAMES = ("TD3", "SPOT", "IQL", "RLPD")  # with OPT
SCRIPTS = {name: f"{name.lower()}_opt" for name in NAMES}
BASELINES = {"PEX": "pex", "Cal-QL": "cal_ql", "OEMA": "oema", "BOORL": "boorl"}
# All that Cal-QL does, as on AntMaze, with TD3's hidden layers.
SETTINGS = {"Cal-QL": {"env_id": "antmaze-umaze-v2", "actor_layers": 2, "critic_layers": 2}}
OBSERVATION_DIM, ACTION_DIM, BATCH_SIZE, N_OFFLINE, N_ONLINE = 11, 3, 256, 1_000_000, 25_000
Q_ON_ALONE = {"kappa_init": 1.0, "kappa_end": 1.0}
MIXED = {"kappa_init": 0.1, "kappa_end": 0.9, "kappa_decay": 1_000}
TAKEN = 200  # steps a measurement; of RLPD's and Cal-QL's a fifth
PLAIN, JAX = "offline, TD3 in plain eager PyTorch", "offline, TD3 in JAX"
TEN, TWO = "offline, RLPD, 20 critic steps a policy step", "offline, RLPD of 2 critics, 20 critic steps a policy step"
ALL_PHASES = ["--offline-steps", 0, "--online-steps", 3_300, "--n-tau", 3_000, "--n-pretrain", 10]


def columns() -> list[np.ndarray]:
    """s, a, r, s', terminal of made-up transitions."""
    rng, n = np.random.default_rng(0), N_OFFLINE
    states = [rng.standard_normal((n, OBSERVATION_DIM), np.float32) for _ in range(2)]
    actions = rng.uniform(-1, 1, (n, ACTION_DIM)).astype(np.float32)
    return [states[0], actions, rng.standard_normal(n, np.float32), states[1], np.zeros(n, np.float32)]


class NoLoop:
    """In place of a Run: a phase builds its gradient step, and takes none."""

    policy, products, env_steps = None, "", 0

    def __init__(self, device: torch.device):
        self.device, self.metrics = device, {}

    def loop(self, *args, **kwargs):
        return iter(())


def script_steps(name: str, buffer, compiled: bool) -> dict[str, tuple[Callable, int]]:
    """The gradient steps of a script by what they are of, each a function of its index, and how many a round takes."""
    script, found, device = importlib.import_module((SCRIPTS | BASELINES)[name]), {}, buffer.rows.device
    built, accelerate = [], script.accelerate

    def keep(compiled: bool):
        return lambda update: built.append((accelerate(compiled)(update), inspect.signature(update))) or update

    def of_phase(phase: Callable, labels: list[str], **variant) -> None:
        args = script.resolve(script.Args(device=device.type, compile=compiled, **variant))
        agent = script.Agent(args, OBSERVATION_DIM, ACTION_DIM, device)
        others = dict.fromkeys(list(inspect.signature(phase).parameters)[4:])  # the collector, which is not asked
        if "balanced" in others and getattr(args, "replay", "balanced") == "balanced":
            others["balanced"] = script.BalancedReplay(buffer, BATCH_SIZE, device)
            others["balanced"].start(getattr(args, "init_online_fraction", 0.5))
        if "returns" in others:
            others["returns"] = script.Returns(args, script.Transitions(*columns()), buffer)
        built.clear()
        phase(args, NoLoop(device), agent, buffer, **others)
        every = getattr(args, "policy_frequency", 20 if variant.get("offline_utd") != 1 else 1)
        every = args.utd if name == "BOORL" and phase is script.online_finetune else every
        for label, (step, signature) in zip(labels, built, strict=True):
            flagged = functools.partial(lambda step, every, i: step((i + 1) % every == 0), step, every)
            found[label] = (
                (flagged if signature.parameters else lambda i, step=step: step()),
                TAKEN // 5 if name in ("RLPD", "Cal-QL") else TAKEN,
            )

    script.accelerate = keep
    try:
        if name in BASELINES:
            variant = SETTINGS.get(name, {}) | ({"collect_steps": N_ONLINE} if name == "BOORL" else {})
            of_phase(script.offline_pretrain, [f"offline, {name}"], **variant)
            of_phase(script.online_finetune, [f"fine-tuning, {name}"], **variant)
            return found
        offline = {"offline_utd": 1} if name == "RLPD" else {}
        of_phase(
            script.offline_pretrain, ["SPOT's VAE"] * (name == "SPOT") + [f"offline, {name}"], opt=False, **offline
        )
        if name == "RLPD":
            of_phase(script.offline_pretrain, [TEN], opt=False, offline_utd=20)
            of_phase(script.offline_pretrain, [TWO], opt=False, offline_utd=20, ensemble_size=2)
        of_phase(script.online_pretrain, [f"online pre-training, {name}+OPT"])
        of_phase(script.online_finetune, [f"fine-tuning, {name}"], opt=False)
        of_phase(script.online_finetune, [f"fine-tuning, {name}+OPT, kappa = 1"], **Q_ON_ALONE)
        of_phase(script.online_finetune, [f"fine-tuning, {name}+OPT, kappa < 1"], **MIXED)
    finally:
        script.accelerate = accelerate
    return found


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    hidden = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return hidden.append(nn.Linear(256, outputs))


def plain_step(data: list[torch.Tensor]) -> Callable:
    """TD3+BC as most public code writes it: a network a module, a loss.item() a step."""
    actor = nn.Sequential(mlp(OBSERVATION_DIM, ACTION_DIM), nn.Tanh())
    critics = [mlp(OBSERVATION_DIM + ACTION_DIM, 1) for _ in range(2)]
    networks = [network.to(data[0].device) for network in (actor, *critics)]
    targets = copy.deepcopy(networks)
    of_actor, *of_critics = (torch.optim.Adam(network.parameters(), 3e-4) for network in networks)

    def descend(loss: torch.Tensor, optimizers: list) -> None:
        loss.item()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def step(i: int) -> None:
        rows = torch.randint(N_OFFLINE, (BATCH_SIZE,), device=data[0].device)
        s, a, r, s2, d = (column[rows] for column in data)
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

    return step


def jax_steps(data: list[np.ndarray], n: int) -> Callable:
    """A function that takes n steps of TD3+BC in one jitted JAX program."""
    import jax
    import jax.numpy as jnp

    def mlp(key, inputs: int, outputs: int) -> list:
        keys, sizes = jax.random.split(key, 3), [(inputs, 256), (256, 256), (256, outputs)]
        return [(jax.random.normal(k, size) * 0.05, jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=True)]

    def forward(layers: list, x):
        for weight, bias in layers[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return x @ layers[-1][0] + layers[-1][1]

    def value(layers: list, s, a):
        return forward(layers, jnp.concatenate([s, a], 1))

    def adam(parameters, gradients, moments, t):
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], gradients)
        rate, scale = 3e-4 / (1 - 0.9**t), 1 / (1 - 0.999**t)
        new = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v * scale) + 1e-8), parameters, mean, square)
        return new, (mean, square)

    def step(carry, _):
        actor, critics, actor_target, critic_targets, actor_moments, critic_moments, key, t = carry
        key, for_rows, for_noise = jax.random.split(key, 3)
        s, a, r, s2, d = (column[jax.random.randint(for_rows, (BATCH_SIZE,), 0, N_OFFLINE)] for column in arrays)
        noise = jnp.clip(jax.random.normal(for_noise, a.shape) * 0.2, -0.5, 0.5)
        a2 = jnp.clip(jnp.tanh(forward(actor_target, s2)) + noise, -1, 1)
        y = r + 0.99 * (1 - d) * jnp.minimum(*(value(q, s2, a2) for q in critic_targets))
        gradients = jax.grad(lambda qs: sum(((value(q, s, a) - y) ** 2).mean() for q in qs))(critics)
        critics, critic_moments = adam(critics, gradients, critic_moments, t)

        def actor_loss(actor):
            pi = jnp.tanh(forward(actor, s))
            q = value(critics[0], s, pi)
            return -2.5 / jax.lax.stop_gradient(jnp.abs(q).mean()) * q.mean() + ((pi - a) ** 2).mean()

        def policy_step():
            new, moments = adam(actor, jax.grad(actor_loss)(actor), actor_moments, t / 2)
            soft = [jax.tree.map(lambda x, y: 0.995 * x + 0.005 * y, *pair) for pair in pairs(new)]
            return new, *soft, moments

        def pairs(new):
            return (actor_target, new), (critic_targets, critics)

        same = (actor, actor_target, critic_targets, actor_moments)
        actor, actor_target, critic_targets, actor_moments = jax.lax.cond(t % 2 == 0, policy_step, lambda: same)
        return (actor, critics, actor_target, critic_targets, actor_moments, critic_moments, key, t + 1), None

    arrays = [jnp.asarray(column.reshape(N_OFFLINE, -1)) for column in data]
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    actor = mlp(keys[0], OBSERVATION_DIM, ACTION_DIM)
    critics = [mlp(key, OBSERVATION_DIM + ACTION_DIM, 1) for key in keys[1:]]
    zeros = [jax.tree.map(jnp.zeros_like, [network, network]) for network in (actor, critics)]
    carry = [(actor, critics, actor, critics, *map(tuple, zeros), keys[0], 1)]
    program = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=n)[0])

    def take() -> tuple:
        carry[0] = jax.block_until_ready(program(carry[0]))
        return carry[0]

    return take


def plain_eager(threads: int) -> float:
    """Milliseconds a step of `plain_step`, in a process of its own: what makes the scripts fast would serve it too."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed; speed.print_plain({threads})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def print_plain(threads: int) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = plain_step([torch.from_numpy(column.reshape(N_OFFLINE, -1)).to(device) for column in columns()])
    for n in (50, 400):
        ms = milliseconds(lambda n=n: [step(i) for i in range(n)], n)
    print(ms)


def milliseconds(take: Callable, n: int) -> float:
    """Milliseconds a step of n steps."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    take()
    wait()
    return 1e3 * (time.perf_counter() - started) / n


def contestants(compiled: bool) -> dict[str, Callable[[], float]]:
    """By what is measured, a function that measures it once; all are compiled and warm."""
    sys.path.insert(0, str(ALGORITHMS))
    td3_opt = importlib.import_module("td3_opt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, steps = columns(), {}
    buffer = td3_opt.ReplayBuffer(td3_opt.Transitions(*data), N_ONLINE, device)
    buffer.load_state_dict({"added": N_ONLINE, "online_rows": buffer.rows[:N_ONLINE].clone()})
    td3_opt.tune(NoLoop(device))
    for name in SCRIPTS | BASELINES:
        steps |= script_steps(name, buffer, compiled)

    def measure(step: Callable, n: int) -> float:
        return milliseconds(lambda: [step(i) for i in range(n)], n)

    for step, n in tqdm(steps.values(), "compiling" if compiled else "warming up", unit="step"):
        measure(step, 2 * n)  # four policy steps of RLPD: CUDA graphs are captured at the fourth of a kind
    found = {what: functools.partial(measure, *step) for what, step in steps.items()}
    first = {PLAIN: functools.partial(plain_eager, torch.get_num_threads()), "offline, TD3": found["offline, TD3"]}
    with contextlib.suppress(ImportError):
        take = jax_steps(data, TAKEN)
        take()
        first[JAX] = lambda: milliseconds(take, TAKEN)
    return first | found


def hours(ms: dict[str, float]) -> dict[str, float]:
    """Hours of gradient steps in a run of the whole protocol, from milliseconds a step."""
    found = {}
    for name, script in (SCRIPTS | BASELINES).items():
        script = importlib.import_module(script)
        args = script.resolve(script.Args(**SETTINGS.get(name, {})))
        offline = args.offline_steps * ms[f"offline, {name}"]
        offline += args.vae_steps * ms["SPOT's VAE"] if name == "SPOT" else 0
        steps, step = (args.online_steps - getattr(args, "collect_steps", 0)) * args.utd, f"fine-tuning, {name}"
        found[name] = offline + steps * ms[step]
        if name in BASELINES:
            continue
        pretrain = args.n_pretrain * ms[f"online pre-training, {name}+OPT"]
        for kappa in ("kappa = 1", "kappa < 1"):
            after = steps - args.n_tau * args.utd
            found[f"{name}+OPT, {kappa}"] = offline + pretrain + after * ms[f"{step}+OPT, {kappa}"]
    return {run: total / 3.6e6 for run, total in found.items()}


def report(rounds: list[dict[str, float]]) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    every = {what: [times[what] for times in rounds] for what in rounds[0]}
    medians = {what: statistics.median(values) for what, values in every.items()}
    lines = ["| a gradient step | ms | a second |", "|---|---|---|"]
    lines += [f"| {what} | {spread(ms)} | {1e3 / medians[what]:.0f} |" for what, ms in every.items()]
    pairs = [(PLAIN, "offline, TD3")] + [("offline, TD3", JAX)] * (JAX in every)
    pairs += [(f"offline, {name}", "offline, TD3") for name in ("SPOT", "IQL", *BASELINES)] + [(TEN, TWO)]
    pairs += [(f"fine-tuning, {n}+OPT, kappa {sign} 1", f"fine-tuning, {n}") for n in NAMES for sign in "=<"]
    lines += ["", "| ratio, of one round | |", "|---|---|"]
    lines += [f"| {a} / {b} | {spread([times[a] / times[b] for times in rounds])} |" for a, b in pairs]
    lines += ["", "| a run of the whole protocol | hours of gradient steps |", "|---|---|"]
    return "\n".join(lines + [f"| {run} | {value:.1f} |" for run, value in hours(medians).items()])


def start(folder: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, ALGORITHMS / "td3_opt.py", "--env-id", "hopper-random-v2", "--no-progress"]
    command += ["--eval-episodes", 1, "--eval-freq", 0, "--checkpoint-freq", 0, "--no-save-model", "--run-dir", folder]
    return subprocess.Popen(list(map(str, [*command, *flags])), stdout=sys.stderr)


def regenerate(folder: Path) -> str:
    seconds = []
    for name in ("first", "second"):  # the second finds the data there
        started = time.perf_counter()
        _, status, usage = os.wait4(start(folder / name, *ALL_PHASES).pid, 0)
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
    return torch.cpu.get_capabilities().get("cpu_name", platform.machine())


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"speed.py: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write a whole number, 1 or more")
    return int(text)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5, of a minute each")
    parser.add_argument("--threads", type=positive, default=2, help="threads, and cores, to use (default: 2)")
    parser.add_argument("--no-compile", action="store_true", help="the scripts' steps as with their --no-compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # after Ctrl-C a run may still write there
        for variable in ("XDG_CACHE_HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
            os.environ[variable] = str(Path(name) / "data")
        regenerating = regenerate(Path(name))
    if hasattr(os, "sched_setaffinity"):  # JAX takes every core that it may
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    measures = contestants(not args.no_compile)
    rounds = []
    for _ in tqdm(range(args.rounds), "rounds"):
        rounds.append({what: measure() for what, measure in measures.items()})
    how = "not compiled" if args.no_compile else "compiled"
    print(f"{processor()}, {args.threads} threads, {how}; medians of {args.rounds} rounds (and their range)\n")
    print(f"{report(rounds)}\n\n{regenerating}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
