"""What the tests share: the script as a module, small datasets, and the script as a user starts it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

for number in (signal.SIGINT, signal.SIGHUP):  # under nohup and in background jobs what tests start would ignore them
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
torch.set_num_threads(1)  # as the processes that the tests start: the same numbers, and fast enough for small batches

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algorithms"))


def write_file(path: Path, columns: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column)
    return path


def roll_out(env: gym.Env, steps: int, seed: int, policy=None) -> dict[str, np.ndarray]:
    """D4RL's columns for `steps` steps; random actions where there is no policy."""
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = env.action_space.sample() if policy is None else policy(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, following, terminated, truncated and not terminated))
        observation = env.reset()[0] if terminated or truncated else following
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    kinds = (np.float32,) * 4 + (bool,) * 2
    return {
        key: np.asarray(column).astype(kind)
        for key, column, kind in zip(keys, zip(*rows, strict=True), kinds, strict=True)
    }


@pytest.fixture(scope="session")
def pendulum_columns() -> dict[str, np.ndarray]:
    return roll_out(gym.make("InvertedPendulum-v5"), 5_000, seed=0)


@pytest.fixture(scope="session")
def pendulum_file(pendulum_columns, tmp_path_factory) -> Path:
    return write_file(tmp_path_factory.mktemp("data") / "pendulum.hdf5", pendulum_columns)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """An empty home, so that no test finds or touches the user's datasets."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def start(home, tmp_path):
    """Start the script in a process of its own, as a user would, with one thread."""

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        names = ("XDG_CACHE_HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH")
        clean = {key: value for key, value in os.environ.items() if key not in names}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "algorithms" / "td3_opt.py"), *map(str, arguments)],
            env=clean | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def take_phase(script, phase: str, variant: dict, device: str, steps: int = 200, compiled: bool = False) -> list[dict]:
    """The metrics of each step of a phase, from one and the same state, in torch's default dtype."""
    rng, n = np.random.default_rng(0), 5_000
    columns = [rng.standard_normal((n, 11)), rng.uniform(-1, 1, (n, 3)), rng.standard_normal(n)]
    columns += [rng.standard_normal((n, 11)), np.zeros(n)]
    data = script.Transitions(*(np.asarray(column, np.float32) for column in columns))
    args = dict(vae_steps=steps // 4, offline_steps=steps, n_pretrain=steps, n_tau=100, collect_steps=100)
    args |= dict(online_steps=1_000, compile=compiled, env_id="hopper-medium-v2", device="cpu")
    args = {name: value for name, value in args.items() if hasattr(script.Args, name)}
    args = script.resolve(script.Args(**(args | variant)))
    opt = hasattr(args, "opt")
    firsts = [getattr(args, name, 0) for name in ("n_tau" if opt and args.opt else "random_steps", "collect_steps")]
    before = sum(firsts)
    args.online_steps, args.device, device = before + steps // args.utd, device, torch.device(device)
    acting = script.Agent(args, 11, 3, torch.device("cpu"))  # it learns nothing
    acts = next(name for name in ("composite", "behaviour", "ensemble", "actor") if hasattr(acting, name))
    policy = script.Policy(vars(acting)[acts])
    policy.refresh = lambda: None
    buffer = script.ReplayBuffer(data, 400, device)
    for i in range(100):
        buffer.add(*(column[i] for column in data))
    agent = script.Agent(args, 11, 3, device)
    torch.manual_seed(1)
    with_replay = hasattr(script, "BalancedReplay")
    with_balanced = with_replay and getattr(args, "replay", "balanced") == "balanced"
    balanced = script.BalancedReplay(buffer, args.batch_size, device) if with_balanced else None
    returns = [script.Returns(args, data, buffer)] if hasattr(script, "Returns") else []
    if returns and device.type == "meta":
        returns[0].end_episode = lambda steps: None  # it reads rewards
    seen = []

    class FakeRun:
        env_steps = 0

        def __init__(self):
            self.device, self.metrics, self.policy = device, {}, policy

        def loop(self, phase, total, **kwargs):
            torch.manual_seed(2)
            for step in range(total):
                yield step
                seen.append({name: value.clone() for name, value in self.metrics.items() if torch.is_tensor(value)})

    class FakeCollector:
        observation = torch.tensor(data.observations[0], dtype=torch.get_default_dtype()).numpy()
        episode_steps = 0

        def step(self, action):
            return buffer.add(*(column[0] for column in data))

    if phase == "offline":
        script.offline_pretrain(args, FakeRun(), agent, buffer, *returns)
    elif phase == "online_pretrain":
        script.online_pretrain(args, FakeRun(), agent, buffer)
    else:
        more = [balanced] * with_replay + returns
        script.online_finetune(args, FakeRun(), agent, buffer, *more, FakeCollector())
    return seen


def losses_of(seen: list[dict]) -> list[list[float]]:
    return [[float(metrics[name]) for name in sorted(metrics) if name.endswith("loss")] for metrics in seen]
