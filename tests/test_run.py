"""Whole runs, each in its own process: they learn, repeat themselves, survive being killed, leave what they promise."""

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import td3_opt
import torch
from conftest import ROOT, roll_out, write_file
from runs import equal, rows, run_killed_at, run_script, same_weights, timeless, watch_phases
from td3_opt import Args
from wandb.proto import wandb_internal_pb2

SHORT = "--env-id InvertedPendulum-v5 --offline-steps 60 --online-steps 90 --n-tau 40 --n-pretrain 50".split()
SHORT += "--utd 2 --batch-size 16 --eval-freq 25 --eval-episodes 2 --no-progress".split()


@pytest.fixture(scope="module")
def whole(pendulum_file, home, tmp_path_factory) -> Path:
    """One uninterrupted short run, which others are compared with; the others keep no snapshots."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", folder, "--snapshots")
    result = run_script("td3_opt", home, *arguments)
    assert result.returncode == 0, result.stderr
    return folder


def test_run_folder(whole):
    names = {path.name for path in whole.iterdir() if "tfevents" not in path.name and path.name != ".lock"}
    assert names == {"args.json", "evals.csv", "speed.csv", "offline.pt", "checkpoint.pt", "model.pt", "snapshots"}
    args = json.loads((whole / "args.json").read_text())
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert args["data"]["source"].endswith("pendulum.hdf5")
    assert (args["data"]["size"], args["data"]["crc32"]) == (5_000, checkpoint["data"]["crc32"])
    evals = rows(whole)
    assert list(evals[0]) == list(td3_opt.Run.EVALS)
    steps = [(row["phase"], int(row["env_steps"]), int(row["gradient_steps"])) for row in evals]
    assert steps == [
        ("offline", 0, 0),
        ("offline", 0, 25),
        ("offline", 0, 50),
        ("offline", 0, 60),
        ("online_pretrain", 40, 110),
        ("online_finetune", 50, 130),
        ("online_finetune", 75, 180),
        ("online_finetune", 90, 210),
    ]
    for row in evals:  # one point a step, but for the last one of a fall
        assert float(row["length_mean"]) - 1 <= float(row["return_mean"]) <= float(row["length_mean"])
    speed = rows(whole, "speed.csv")
    assert [(row["phase"], row["gradient_steps"], row["env_steps"]) for row in speed] == [
        ("offline", "60", "0"),
        ("collect", "0", "40"),
        ("online_pretrain", "50", "0"),
        ("online_finetune", "100", "50"),
    ]
    for row in speed:
        rate = float(row["gradient_steps_per_second"])
        assert rate == pytest.approx(int(row["gradient_steps"]) / float(row["seconds"]), rel=0.1)
    args = json.loads((whole / "args.json").read_text())
    assert args["exp_name"] == "td3_opt" and args["replay"] == "balanced" and args["device"] == "cpu"
    assert (args["kappa_init"], args["kappa_decay"], args["kappa_end"]) == (0.1, 45, 0.9)
    assert args["versions"]["torch"].startswith("2.13") and args["threads"] == 1
    known = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    assert args["device_name"] and (
        "model name" not in known or all(word in known for word in args["device_name"].split())
    )
    blob = subprocess.run(["git", "hash-object", "--no-filters", td3_opt.__file__], capture_output=True, text=True)
    assert (args["script"], args["script_blob"]) == ("td3_opt.py", blob.stdout.strip()) and blob.returncode == 0


def test_snapshots_are_the_models_of_the_evaluations(whole):
    """Each acts as its row says, here without the script; offline.pt and model.pt hold the same networks."""
    evals, models = rows(whole), []
    for row in evals:
        name = f"{row['phase']}-{row['env_steps']}-{row['gradient_steps']}.pt"
        models.append(torch.load(whole / "snapshots" / name, weights_only=True))
        model, actor, env, returns = models[-1], td3_opt.Actor(4, 1), gym.make("InvertedPendulum-v5"), []
        actor.load_state_dict(model["actor"])
        for episode in (0, 1):
            observation, done = env.reset(seed=1_000_000 + episode)[0], False
            returns.append(0.0)
            while not done:
                state = (torch.tensor(observation, dtype=torch.float32) - model["observation_mean"])[None]
                action = 3 * actor(state / model["observation_std"])[0].detach().numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                returns[-1], done = returns[-1] + reward, terminated or truncated
        assert float(row["return_mean"]) == np.mean(returns)
    assert len(list((whole / "snapshots").iterdir())) == len(evals) == 8
    networks = [name for name, part in models[0].items() if name.startswith(("actor", "q_")) and isinstance(part, dict)]
    assert len(networks) == 6 and not any(equal(models[0][name], models[-1][name]) for name in networks)
    last = torch.load(whole / "model.pt", weights_only=True)
    assert all(equal(models[-1][name], last[name]) for name in networks)
    assert {name: tuple(states.shape) for name, states in last["states"].items()} == {
        "offline": (2_500, 4),
        "first": (9, 4),
        "last": (9, 4),
    }
    offline = torch.load(whole / "offline.pt", weights_only=True)["parts"]
    assert all(equal(models[3][name], offline[name]) for name in networks if "on" not in name)


def test_tensorboard_curves(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole))
    events.Reload()
    curves = set(events.Tags()["scalars"])
    names = "q_off_loss q_on_loss q_off_mean q_on_mean q_mix_mean actor_loss kappa online_share density_ratio_loss"
    assert {f"train/{name}" for name in (*names.split(), "q_on_pretrain_loss")} | {"eval/return_mean"} <= curves
    kappa = events.Scalars("train/kappa")[-1].value
    assert kappa == pytest.approx(0.9)
    mix, off, on = (events.Scalars(f"train/{name}_mean")[-1].value for name in ("q_mix", "q_off", "q_on"))
    assert mix == pytest.approx(0.1 * off + 0.9 * on, rel=1e-4)
    scores = [(event.step, event.value) for event in events.Scalars("online/return_mean")]
    online = [(int(row["env_steps"]), float(row["return_mean"])) for row in rows(whole) if row["env_steps"] != "0"]
    assert scores == [(step, pytest.approx(value)) for step, value in online] and len(scores) == 4
    (arguments,) = events.Tensors("arguments/text_summary")
    assert b"|kappa_end|0.9|" in arguments.tensor_proto.string_val[0]
    speed = next(event.value for event in events.Scalars("train/steps_per_second") if event.step == 60)
    assert speed == pytest.approx(float(rows(whole, "speed.csv")[0]["gradient_steps_per_second"]), rel=0.01)


def test_seconds_are_counted_once_also_of_a_run_that_was_stopped(pendulum_file, tmp_path, monkeypatch):
    """By a clock on which a gradient step, or a collected one, takes 1 s and an evaluation 100 s."""
    now, evaluate, loop = [0.0], td3_opt.evaluate, td3_opt.Run.loop
    kills = [("offline", 35), ("collect", 27), ("online_finetune", 21)]

    def slow_evaluate(*args):
        now[0] += 100
        return evaluate(*args)

    def slow_steps(run, phase, total, env=0, gradient=0, **kwargs):
        for step in loop(run, phase, total, env, gradient, **kwargs):
            yield step
            now[0] += gradient or env
            if kills and (phase, step) == kills[0]:
                raise InterruptedError(kills.pop(0))

    monkeypatch.setattr(td3_opt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(td3_opt, "tune", lambda run: None)
    monkeypatch.setattr(td3_opt, "evaluate", slow_evaluate)
    monkeypatch.setattr(td3_opt.Run, "loop", slow_steps)
    args = dict(env_id="InvertedPendulum-v5", offline_steps=60, online_steps=90, n_tau=40, n_pretrain=50, utd=2)
    args |= dict(batch_size=16, eval_episodes=1, eval_freq=25, progress=False, device="cpu", dataset=str(pendulum_file))
    args |= dict(run_dir=str(tmp_path / "run"), checkpoint_freq=10, resume=True)
    for _ in range(3):
        with pytest.raises(InterruptedError):
            td3_opt.train(Args(**args))
        now[0] += 1e6  # until it is started again
    td3_opt.train(Args(**args))
    evals = rows(tmp_path / "run")
    steps = [int(row["gradient_steps"]) + min(40, int(row["env_steps"])) for row in evals]
    assert [float(row["seconds"]) for row in evals] == [step + 100 * (i + 1) for i, step in enumerate(steps)]
    speed = [(float(row["seconds"]), row["gradient_steps_per_second"]) for row in rows(tmp_path / "run", "speed.csv")]
    assert speed == [(60, "1.00"), (40, "0.00"), (50, "1.00"), (100, "1.00")]


def test_the_curve_of_training_episodes(pendulum_file, tmp_path, monkeypatch):
    """The return of each episode at its last environment step, here summed from the buffer's rows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step, finished, newest, taken = td3_opt.Collector.step, [0.0], {}, [0]

    def watch(self, action):
        episode, row = self.episode, step(self, action)
        taken[0] += 1
        finished[-1] += self.buffer[torch.tensor([row])].rewards.item()
        if self.episode != episode:
            finished.append(0.0)
            newest[taken[0]] = finished[-2]
        return row

    monkeypatch.setattr(td3_opt.Collector, "step", watch)
    monkeypatch.setattr(td3_opt.Run, "LOG_FREQ", 1)
    args = dict(env_id="InvertedPendulum-v5", offline_steps=2, online_steps=120, n_tau=20, n_pretrain=2, utd=1)
    args |= dict(batch_size=16, eval_episodes=1, eval_freq=0, progress=False, device="cpu", dataset=str(pendulum_file))
    td3_opt.train(Args(**args, run_dir=str(tmp_path / "run")))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("online/episode_return")]
    assert len(finished) > 5 and curve == list(newest.items())  # each once


def test_same_seed_same_run_and_another_seed_another(whole, run, home, pendulum_file, tmp_path):
    result = run(*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    arguments = (*SHORT, "--dataset", pendulum_file, "--seed", 1, "--run-dir", tmp_path / "other")
    assert run_script("td3_opt", home, *arguments).returncode == 0
    assert timeless(tmp_path / "again") == timeless(whole) and same_weights(tmp_path / "again", whole)
    assert timeless(tmp_path / "other") != timeless(whole) and not same_weights(tmp_path / "other", whole)


@pytest.mark.parametrize(
    "phase, step", [("offline", 33), ("collect", 27), ("online_pretrain", 41), ("online_finetune", 37)]
)
def test_a_killed_run_resumes_bit_for_bit(whole, home, pendulum_file, tmp_path, phase, step):
    """SIGKILL in the middle of each stage; the newest checkpoint is some steps old, in the middle of an episode."""
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 10)
    assert run_killed_at("td3_opt", phase, step, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == (phase, step - step % (5 if phase == "online_finetune" else 10))
    if phase in ("collect", "online_finetune"):
        assert saved["parts"]["collector"]["episode_steps"] > 0
    with open(tmp_path / "run" / "evals.csv", "a") as file:
        file.write("online_finetune,7")  # half a row, as a kill may leave it
    result = run_script("td3_opt", home, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert timeless(tmp_path / "run") == timeless(whole) and same_weights(tmp_path / "run", whole)
    phases = ["offline", "collect", "online_pretrain", "online_finetune"]
    assert [row["phase"] for row in rows(tmp_path / "run", "speed.csv")] == phases


@pytest.mark.parametrize(
    "variant",
    [("--no-opt",), ("--no-q-on",), ("--kappa-init", 1, "--kappa-end", 1, "--replay", "symmetric")]
    + [("--compile", "--no-opt", "--offline-steps", 0, "--policy-frequency", 1)],  # one kind of step to compile
    ids=str,
)
def test_other_variants_resume_bit_for_bit_too(home, pendulum_file, tmp_path, variant):
    arguments = (*SHORT, *variant, "--dataset", pendulum_file)
    assert run_script("td3_opt", home, *arguments, "--run-dir", tmp_path / "whole").returncode == 0
    arguments += ("--run-dir", tmp_path / "run", "--checkpoint-freq", 14)
    assert run_killed_at("td3_opt", "online_finetune", 27, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    again = [word for word in arguments if word != "--compile"]  # a run goes on as it began
    assert run_script("td3_opt", home, *again, "--resume").returncode == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["compile"] is ("--compile" in variant)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, home, pendulum_file, tmp_path):
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run")
    assert run_killed_at("td3_opt", "offline", 30, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert timeless(tmp_path / "run") == timeless(whole) and same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138), ("SIGHUP", 129)])
def test_ctrl_c_writes_a_checkpoint_first(whole, home, pendulum_file, tmp_path, number, status):
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run")
    result = run_killed_at("td3_opt", "online_finetune", 21, number, home, *arguments)
    assert result.returncode == status and "Traceback" not in result.stderr and "--resume" in result.stderr
    assert "stopping after this step or evaluation" in result.stderr
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == ("online_finetune", 22)
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert timeless(tmp_path / "run") == timeless(whole) and same_weights(tmp_path / "run", whole)


def test_killed_from_outside_at_any_moment(whole, start, home, pendulum_file, tmp_path):
    """SIGKILL by the clock, again and again, wherever it hits."""
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 10, "--resume")
    args, written = tmp_path / "run" / "args.json", 0
    for wait in (0.05, 0.3, 0.1):
        process = start(*arguments)
        deadline = time.time() + 300
        while not args.exists() or args.stat().st_mtime_ns == written:  # it writes that when it is ready to train
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        written = args.stat().st_mtime_ns
        time.sleep(wait)
        process.kill()
        process.communicate()
    assert run_script("td3_opt", home, *arguments).returncode == 0
    assert timeless(tmp_path / "run") == timeless(whole) and same_weights(tmp_path / "run", whole)


def test_resuming_a_complete_run_says_so(whole, run, pendulum_file):
    before = (whole / "evals.csv").read_bytes()
    result = run(*SHORT, "--dataset", pendulum_file, "--run-dir", whole, "--resume")
    assert result.returncode == 0 and "is complete" in result.stdout
    assert (whole / "evals.csv").read_bytes() == before


def test_a_write_that_fails_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    td3_opt.save(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(td3_opt.os, "fsync", full)
    with pytest.raises(OSError):
        td3_opt.save(path, "new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_variants_share_one_offline_phase(whole, home, pendulum_file, tmp_path):
    """OPT from another variant's offline.pt ends where OPT alone ends; so does the vanilla backbone."""
    data = ("--dataset", pendulum_file)
    assert run_script("td3_opt", home, *SHORT, *data, "--no-opt", "--run-dir", tmp_path / "vanilla").returncode == 0
    shared = run_script(
        "td3_opt", home, *SHORT, *data, "--offline-from", tmp_path / "vanilla", "--run-dir", tmp_path / "opt"
    )
    assert shared.returncode == 0, shared.stderr
    assert timeless(tmp_path / "opt") == timeless(whole) and same_weights(tmp_path / "opt", whole)
    again = ("--no-opt", "--offline-from", whole / "offline.pt", "--run-dir", tmp_path / "vanilla2")
    assert run_script("td3_opt", home, *SHORT, *data, *again).returncode == 0
    assert timeless(tmp_path / "vanilla2") == timeless(tmp_path / "vanilla")
    phases = [row["phase"] for row in rows(tmp_path / "vanilla2")]
    assert set(phases) == {"offline", "online_finetune"} and rows(tmp_path / "vanilla2")[-1]["env_steps"] == "90"
    assert json.loads((tmp_path / "vanilla" / "args.json").read_text())["exp_name"] == "td3"


VARIANTS = [
    {},
    {"meta_second_order": True},
    {"q_on_init": "random"},
    {"q_on_init": "online"},
    {"q_on_init": "joint"},
    {"q_on": False},
    {"replay": "online"},
    {"replay": "symmetric"},
    {"replay": "uniform"},
    {"kappa_init": 1.0, "kappa_end": 1.0, "kappa_decay": 0},
    {"kappa_init": 0.0, "kappa_end": 0.0},
    {"opt": False},
    {"offline_steps": 0},
    {"utd": 3},
]


@pytest.fixture
def watched(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process, with a copy of all parts at the start of every phase and at the end."""
    monkeypatch.setenv("HOME", str(home))
    short = dict(env_id="InvertedPendulum-v5", offline_steps=20, online_steps=60, n_tau=30, n_pretrain=20, utd=2)
    short |= dict(dataset=str(pendulum_file), batch_size=16, eval_episodes=1, progress=False)

    def watched(**arguments) -> dict[str, dict]:
        states = watch_phases(td3_opt, monkeypatch)
        td3_opt.train(Args(**(short | arguments), run_dir=str(tmp_path / "watched")))
        return states

    return watched


def unchanged(before: dict, after: dict) -> set[str]:
    return {name for name in before if equal(before[name], after[name])}


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_what_each_phase_changes(watched, arguments):
    """Bit for bit: collection changes only the buffer, online pre-training only Q_on (with --no-q-on: Q_off)."""
    states = watched(**arguments)
    q_off = {"q_off", "q_off_target", "q_off_optimizer"}
    policy = {"actor", "actor_target", "actor_optimizer"}
    q_on = {"q_on", "q_on_target", "q_on_optimizer"} & set(states["done"])
    agent = q_off | policy | q_on
    opt, with_q_on = arguments.get("opt", True), arguments.get("q_on", True) and arguments.get("opt", True)
    assert bool(q_on) == with_q_on
    fine_tuned, pretrained = q_off | policy | q_on, set()
    if opt:
        offline = unchanged(states["offline"], states["collect"])
        assert offline & agent == (agent if arguments.get("offline_steps") == 0 else q_on)
        assert unchanged(states["collect"], states["online_pretrain"]) & agent == agent
        assert len(states["online_pretrain"]["buffer"]["online_rows"]) == 30
        pretrained = set() if arguments.get("q_on_init") == "random" else q_on if with_q_on else q_off
        assert agent - unchanged(states["online_pretrain"], states["online_finetune"]) == pretrained
        if arguments.get("kappa_init") == 1.0:
            fine_tuned = policy | q_on  # at kappa = 1 Q_off costs nothing
    assert agent - unchanged(states["online_finetune"], states["done"]) == fine_tuned
    # as many updates as the protocol says: Adam counts them
    adams = {name: states["done"][name]["state"].values() for name in agent if "optim" in name}
    counts = {name: {int(state["step"]) for state in adam} for name, adam in adams.items()}
    offline, online = arguments.get("offline_steps", 20), arguments.get("utd", 2) * (30 if opt else 60)
    pretraining = len(pretrained) and 20
    fine_tuning = {name: online if name in fine_tuned else 0 for name in ("q_off_optimizer", "q_on_optimizer")}
    assert counts["actor_optimizer"] == {(offline + online) // 2}
    q_off_steps = offline + fine_tuning["q_off_optimizer"] + (0 if with_q_on or not opt else pretraining)
    assert counts["q_off_optimizer"] == ({q_off_steps} if q_off_steps else set())
    if with_q_on:
        assert counts["q_on_optimizer"] == {fine_tuning["q_on_optimizer"] + pretraining}
    if "balanced" in states["done"]:
        assert {int(s["step"]) for s in states["done"]["ratio_optimizer"]["state"].values()} == {online}
    assert len(states["done"]["buffer"]["online_rows"]) == 60
    assert ("balanced" in states["done"]) == (opt and arguments.get("replay", "balanced") == "balanced")


def test_states_are_normalised_alike_offline_and_online(watched, pendulum_columns, monkeypatch):
    offline = []
    create = td3_opt.ReplayBuffer.__init__
    monkeypatch.setattr(
        td3_opt.ReplayBuffer, "__init__", lambda self, data, *rest: (offline.append(data), create(self, data, *rest))[1]
    )
    online = watched()["done"]["buffer"]["online_rows"]
    observations = pendulum_columns["observations"]
    mean, std = observations.mean(0, dtype=np.float64), observations.std(0, dtype=np.float64) + 1e-3
    for key in ("observations", "next_observations"):
        np.testing.assert_allclose(getattr(offline[0], key), (pendulum_columns[key] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(offline[0].actions, pendulum_columns["actions"] / 3, rtol=1e-6)  # forces in [-3, 3]
    env = gym.make("InvertedPendulum-v5")
    raw, _ = env.reset(seed=int(np.random.SeedSequence([0, 0]).generate_state(1)[0]))
    for row in online[:5].numpy():
        np.testing.assert_allclose(row[:4], (raw - mean) / std, rtol=1e-4, atol=1e-5)
        raw, reward, terminated, _, _ = env.step(row[4:5] * 3)
        np.testing.assert_allclose(row[6:10], (raw - mean) / std, rtol=1e-4, atol=1e-5)
        assert row[5] == reward and row[10] == terminated


ONE_STEP = [{"q_on_init": "online"}, {"q_on_init": "joint"}, {}, {"meta_second_order": True}, {"meta_lr": 0.02}]


@pytest.mark.parametrize("arguments", ONE_STEP, ids=str)
def test_one_step_of_online_pretraining_is_the_loss_it_is_said_to_be(watched, arguments, monkeypatch):
    """Recompute the first step's gradient by plain autograd on the very batch; Adam's first step is lr * sign of it."""
    arguments = {"meta_lr": 0.01} | arguments
    seen = []
    minimize = td3_opt.minimize
    td_target = td3_opt.td_target

    def watch_target(q_target, batch, next_actions, gamma):
        target = td_target(q_target, batch, next_actions, gamma)
        seen.append((batch, target))
        return target

    monkeypatch.setattr(td3_opt, "td_target", watch_target)
    gradients = []

    def watch(loss, optimizer):
        minimize(loss, optimizer)
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(td3_opt, "minimize", watch)
    states = watched(offline_steps=0, n_pretrain=1, **arguments)
    q_on = td3_opt.Critic(4, 1)
    q_on.load_state_dict(states["online_pretrain"]["q_on"])
    (batch, target), got = seen[0], gradients[0]
    rows_ = states["online_pretrain"]["buffer"]["online_rows"]
    assert len(target) == 32 and all((rows_[:, :4] == o).all(1).any() for o in batch.observations[16:])
    parameters = dict(q_on.named_parameters())

    def loss(part, weights):
        values = torch.func.functional_call(q_on, weights, (batch.observations[part], batch.actions[part]))
        return ((values - target[part]) ** 2).mean(1).sum()

    off, on = slice(0, 16), slice(16, 32)
    kind, order = arguments.get("q_on_init", "meta"), arguments.get("meta_second_order", False)
    if kind == "online":
        total = loss(on, parameters)
    elif kind == "joint":
        total = loss(off, parameters) + loss(on, parameters)
    else:
        inner = torch.autograd.grad(loss(off, parameters), list(parameters.values()), create_graph=order)
        alpha = arguments["meta_lr"]
        adapted = {name: p - alpha * g for (name, p), g in zip(parameters.items(), inner, strict=True)}
        total = loss(off, parameters) + loss(on, adapted)
    expected = torch.autograd.grad(total, list(parameters.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_kappa_counts_the_first_n_tau_steps(watched, monkeypatch):
    """Fine-tuning begins at environment step 30 of 60: by Table 15's line from 0.1 to 0.9 over 40 steps at 0.7."""
    seen = []
    policy_loss = td3_opt.policy_loss
    monkeypatch.setattr(td3_opt, "policy_loss", lambda q, p, k: (seen.append(float(k)), policy_loss(q, p, k))[1])
    watched(kappa_init=0.1, kappa_end=0.9, kappa_decay=40)
    steps = np.minimum(np.arange(30, 60) / 40, 1)
    assert seen == pytest.approx(list(0.1 + 0.8 * steps), abs=1e-6)


def test_a_time_limit_is_not_terminal_in_the_buffer():
    class Endless(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            self.t = 0.0
            return np.array([0.0]), {}

        def step(self, action):
            self.t += 0.25
            return np.array([self.t]), 1.0, False, False, {}

    one = np.zeros((1, 1), np.float32)
    buffer = td3_opt.ReplayBuffer(td3_opt.Transitions(one, one, one[0], one, one[0]), 6, torch.device("cpu"))
    collector = td3_opt.Collector(gym.wrappers.TimeLimit(Endless(), 3), buffer, seed=0)
    for _ in range(4):
        collector.step(np.zeros(1, np.float32))
    stored = buffer[torch.arange(1, 5)]
    assert stored.terminals.tolist() == [0, 0, 0, 0]
    # the cut step has its true next observation
    assert stored.next_observations.flatten().tolist() == [0.25, 0.5, 0.75, 0.25]
    assert stored.observations.flatten().tolist() == [0, 0.25, 0.5, 0]


def test_a_loss_that_is_not_finite_ends_the_run(pendulum_columns, home, tmp_path):
    data = write_file(tmp_path / "huge.hdf5", pendulum_columns | {"rewards": np.full(5_000, 3e38, np.float32)})
    result = run_script("td3_opt", home, *SHORT, "--dataset", data, "--run-dir", tmp_path / "run")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "_loss is" in result.stderr and "phase offline" in result.stderr and "checkpoint" in result.stderr


def wandb_records(data: bytes) -> list[bytes]:
    """W&B's file is LevelDB's log: blocks of 32 KiB, with chunks of checksum, length, kind (4: last)."""
    found, position, part = [], 7, b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        chunk = data[position + 7 : position + 7 + size]
        position += 7 + size
        part = chunk if kind in (1, 2) else part + chunk
        if kind in (1, 4):
            found.append(part)
    return found


def test_wandb_gets_each_point_once_after_a_resume_too(run, home, pendulum_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "runs" / "run", "--track")
    arguments += ("--checkpoint-freq", 10)
    assert run_killed_at("td3_opt", "online_finetune", 20, "SIGTERM", home, *arguments).returncode == 143
    result = run(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_symlink() or path.name == "wandb"]
    points, ends, files = [], [], sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # one run, in two parts
    for path in files:
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            ends += [record.exit.exit_code] if record.HasField("exit") else []
            keys = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            if "eval/return_mean" in keys:
                points.append((int(keys["global_step"]), float(keys["eval/return_mean"])))
    assert ends == [1, 0]  # stopped, then finished
    evals = [(int(r["gradient_steps"]), float(r["return_mean"])) for r in rows(tmp_path / "runs" / "run")]
    assert [step for step, _ in points] == [step for step, _ in evals]
    assert [value for _, value in points] == pytest.approx([value for _, value in evals], abs=1e-3)


def test_wandb_without_a_login_leaves_no_run_behind(run, pendulum_file, tmp_path):
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--track")
    nobody = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    result = run(*arguments, **nobody)
    assert result.returncode == 2, result.stderr
    message = [line for line in result.stderr.splitlines() if not line.startswith("wandb:")]
    assert len(message) == 1 and message[0].startswith("td3_opt.py: --track: "), result.stderr
    assert "wandb login" in message[0] and "WANDB_MODE=offline" in message[0]
    assert run(*arguments, WANDB_MODE="offline").returncode == 0  # the folder is still free


def renders() -> bool:
    """Whether this machine can draw at all, tried outside the script."""
    code = "import gymnasium; e = gymnasium.make('InvertedPendulum-v5', render_mode='rgb_array'); e.reset(); e.render()"
    environment = {"MUJOCO_GL": "egl"} | os.environ
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


WATCHED = """
import sys
sys.path.insert(0, {folder!r})
import td3_opt
evaluate = td3_opt.evaluate
def watch(policy, env, *args, **kwargs):
    print("most", env.action_space.high)
    return evaluate(policy, env, *args, **kwargs)
td3_opt.evaluate = watch
td3_opt.train(td3_opt.parse_args())
"""


def test_video(home, pendulum_file, tmp_path):
    """Of the environment as the policy sees it: actions in [-1, 1], where the pendulum's are in [-3, 3]."""
    code = WATCHED.format(folder=str(ROOT / "algorithms"))
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--capture-video")
    result = run_script("td3_opt", home, *arguments, code=code)
    if renders():
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("most [1.]") == 9 == result.stdout.count("most")
        (video,) = (tmp_path / "run" / "video").glob("*.mp4")
        assert video.stat().st_size > 1_000
    else:  # it must say so before it trains
        assert result.returncode == 2 and "--capture-video" in result.stderr
        assert not (tmp_path / "run" / "evals.csv").exists()


def test_progress_bars_show_every_phase_and_the_score(home, pendulum_file, tmp_path):
    """On a terminal."""
    arguments = [argument for argument in SHORT if argument != "--no-progress"]
    arguments += ["--dataset", pendulum_file, "--run-dir", tmp_path / "run"]
    command = [sys.executable, ROOT / "algorithms" / "td3_opt.py", *map(str, arguments)]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, stderr=end, env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"})
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while more := os.read(terminal, 1 << 16):
            shown += more
    assert process.wait() == 0
    for phase in ("offline", "collect", "online_pretrain", "online_finetune"):
        assert f"{phase}: 100%" in shown.decode()
    assert "score=" in shown.decode()


@pytest.mark.parametrize("flags", [(), ("--no-progress",)], ids=str)
def test_without_a_terminal_there_is_a_line_an_evaluation_and_one_at_the_end(run, pendulum_file, tmp_path, flags):
    arguments = [argument for argument in SHORT if argument != "--no-progress"]
    result = run(*arguments, *flags, "--dataset", pendulum_file, "--run-dir", tmp_path / "run")
    assert result.returncode == 0 and "100%" not in result.stderr
    scores = [float(row["return_mean"]) for row in rows(tmp_path / "run")]  # the task has no reference
    first, *lines = result.stdout.splitlines()
    assert first.startswith(
        f"td3_opt.py: {tmp_path / 'run'}: 5,000 transitions from {pendulum_file}; 60 + 90 steps on "
    )
    found = [re.fullmatch(r"(\w+) (\d+)/(\d+): score (\S+), \d+ steps/s, \d+ min left", line) for line in lines[:-1]]
    steps = [(match[1], int(match[2]), int(match[3])) for match in found]
    assert steps == [
        ("offline", 25, 60),
        ("offline", 50, 60),
        ("offline", 60, 60),
        ("online_pretrain", 50, 50),
        ("online_finetune", 10, 50),
        ("online_finetune", 35, 50),
        ("online_finetune", 50, 50),
    ]
    assert [match[4] for match in found] == [f"{score:.1f}" for score in scores[1:]]
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'run'))}: score {scores[-1]:.1f}, after \d+ min", lines[-1])


def test_help_shows_every_flag_with_its_default_in_the_group_it_belongs_to(run):
    result = run("--help", COLUMNS="70")  # in one column
    assert result.returncode == 0
    shown = " ".join(result.stdout.replace("│", " ").split())
    groups = dict(re.findall(r"╭─ (\w+) options ─+╮(.*?)╰─", shown))
    groups.pop("options", None)
    assert list(groups) == ["task", "phases", "OPT", "TD3", "evaluation", "folder", "logging"]
    flags = {name: re.findall(r"--(\S+?)[ ,].*?\(default: (.*?)\)", text) for name, text in groups.items()}
    defaults = {key.replace("_", "-"): str(field.default) for key, field in Args.__dataclass_fields__.items()}
    assert dict(pair for group in flags.values() for pair in group) == defaults
    first = {"task": "env-id", "phases": "opt", "OPT": "kappa-init", "TD3": "batch-size"}
    first |= {"evaluation": "eval-freq", "folder": "exp-name", "logging": "progress"}
    assert {name: group[0][0] for name, group in flags.items()} == first
    assert "a D4RL task, or any Gymnasium id with Box spaces" in groups["task"]


def test_a_field_that_a_user_adds_has_a_flag(home, tmp_path):
    text = (ROOT / "algorithms" / "td3_opt.py").read_text()
    field = "    seed: int = 0  # of networks"
    (tmp_path / "mine.py").write_text(text.replace(field, f"    mine: float = 0.5\n{field}"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mine; print(mine.parse_args().mine)"
    result = run_script("mine", home, "--mine", 0.7, code=code)
    assert result.stdout.strip() == "0.7", result.stderr


def balancing(observation: np.ndarray) -> np.ndarray:
    """A noisy controller that keeps the pole up for some 200 of 1000 steps."""
    x, angle, velocity, spin = observation
    return np.clip(np.random.normal([6 * angle + 0.6 * spin + 0.3 * x + 0.4 * velocity], 0.7), -3, 3).astype(np.float32)


def test_opt_learns_to_balance_a_pole(tmp_path, monkeypatch, home):
    """90% of the maximal return of 1000, from 2,000 random steps and 3,000 of a controller that scores some 200.

    The settings are the script's own but for shorter phases, one gradient step per environment step and batches of 64.
    Their lengths were chosen on seeds 102, 105 and 106. What counts is the best of three evaluations late in
    fine-tuning: of the seeds 0 to 26 all reached 1000 there (in five), and the last evaluation alone was 1000 but for
    seed 1's 115. Which seed falls depends on the processor's rounding, so a test of the last one alone is red on some
    machines. Seeds 0 to 6 are not unseen ones: settings had been tried on them before. Seed 0's offline phase reaches
    1000 at times, too: what is shown is that fine-tuning, without its BC term, has it and keeps it.
    Longer fine-tuning falls more often, with OPT, without it, and in a plain TD3 written for comparison: once the BC
    term is gone and few transitions show a fall, the critics forget what a fall is worth.
    """
    monkeypatch.setenv("HOME", str(home))
    seed = 0
    np.random.seed(seed)
    env = gym.make("InvertedPendulum-v5")
    parts = [roll_out(env, 2_000, seed), roll_out(env, 3_000, seed, balancing)]
    data = write_file(tmp_path / "d.hdf5", {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    args = Args("InvertedPendulum-v5", str(data), seed, run_dir=str(tmp_path / "run"), progress=False)
    args.offline_steps, args.online_steps, args.n_tau, args.n_pretrain, args.utd = 3_000, 1_500, 500, 1_000, 1
    args.batch_size, args.eval_freq, args.eval_episodes = 64, 200, 5
    td3_opt.train(args)
    evals = rows(tmp_path / "run")
    assert float(evals[0]["return_mean"]) < 100  # it could not do so before
    late = [float(row["return_mean"]) for row in evals if int(row["env_steps"]) > 1_000]
    assert len(late) == 3 and max(late) >= 900


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_a_whole_checkpoint(whole, home, pendulum_file, tmp_path):
    """A limit on file size stands in for the disk: small files fit, the checkpoint does not."""
    arguments = (*SHORT, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 10)
    assert run_killed_at("td3_opt", "offline", 35, "SIGTERM", home, *arguments).returncode == 143
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    command = [sys.executable, str(Path(td3_opt.__file__)), *map(str, arguments), "--resume"]
    limit = len(before) // 2
    result = subprocess.run(
        command,
        env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr and "--resume" in result.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert timeless(tmp_path / "run") == timeless(whole) and same_weights(tmp_path / "run", whole)
