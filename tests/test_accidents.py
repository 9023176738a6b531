"""What goes wrong outside of the script: odd environments and data, processes that end or meet, callers' settings."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import td3_opt
import torch
from conftest import ROOT, write_file
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from runs import rows, run_killed_at, run_script, same_weights, timeless
from td3_opt import Args
from torch.utils.tensorboard import SummaryWriter

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=6, online_steps=60, n_tau=20, n_pretrain=3, utd=1)
TINY |= dict(batch_size=16, eval_episodes=1, progress=False, device="cpu", eval_freq=20)
FLAGS = [text for key, value in TINY.items() if key != "progress" for text in (f"--{key.replace('_', '-')}", value)]


class OddPendulum(InvertedPendulumEnv):
    """Gives `wrong` once, in step 15 of a training episode."""

    wrong, steps, episodes = None, 0, 0

    def reset(self, *, seed=None, options=None):
        type(self).training = seed is not None and seed < 1_000_000
        observation, info = super().reset(seed=seed, options=options)
        self.episodes += 1
        return observation * (np.nan if self.wrong == "reset" and self.episodes == 3 else 1), info

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        self.steps += 1
        if self.wrong == "reward" and self.steps == 75:
            reward = np.nan
        if self.wrong == "large" and self.steps == 75:
            reward = 1e39  # infinite in float32
        if self.wrong == "observation" and self.steps == 75:
            observation = observation + np.inf
        return observation, reward, False, truncated, info


class Arrays(OddPendulum):
    """Rewards are arrays of one element, as some environments give them."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.array([reward]), *rest


class Unseeded(OddPendulum):
    """Its start does not come from the generator that reset(seed) seeds."""

    def reset_model(self):
        self.set_state(self.init_qpos + np.random.default_rng().uniform(-0.3, 0.3, 2), self.init_qvel)
        return self._get_obs()


gym.register("OddPendulum-v0", OddPendulum, max_episode_steps=50)
gym.register("Arrays-v0", Arrays, max_episode_steps=50)
counted = (gym.wrappers.RecordEpisodeStatistics.wrapper_spec(),)  # outside of the time limit, whose end they count
gym.register("Counted-v0", OddPendulum, max_episode_steps=50, additional_wrappers=counted)
gym.register("Unseeded-v0", Unseeded, max_episode_steps=50)


@pytest.mark.parametrize("wrong", ["reward", "observation", "large", "reset"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_nan_from_the_environment_ends_the_run_before_it_is_stored(wrong, pendulum_file, tmp_path, monkeypatch, capsys):
    """Step 75 of all that an environment makes: the training one's 75th, step 25 of its second episode; third reset."""
    monkeypatch.setattr(OddPendulum, "wrong", wrong)
    arguments = TINY | dict(env_id="OddPendulum-v0", online_steps=100, eval_freq=0, eval_episodes=1)
    arguments |= dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"), checkpoint_freq=10)
    at, kept = ("step 0 of training episode 3", 90) if wrong == "reset" else ("step 25 of training episode 2", 70)
    where = f"the environment gave NaN or infinity in {at}"
    with pytest.raises(FloatingPointError, match=where):
        td3_opt.train(Args(**arguments))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["env_steps"] == kept and saved["parts"]["buffer"]["online_rows"].isfinite().all()
    monkeypatch.setattr(OddPendulum, "wrong", None)
    assert np.isfinite(td3_opt.train(Args(**arguments, resume=True)).score)


@pytest.mark.parametrize("factor, fine", [(1, True), (0.03, True), (0.01, False), (1.2, False), (30, False)])
def test_actions_of_other_units_are_refused(factor, fine, pendulum_columns, tmp_path):
    """The pendulum's actions reach from -3 to 3, which are fine, as are 3% of that."""
    actions = pendulum_columns["actions"].copy()
    actions[:2] = [[-3], [3]]
    path = write_file(tmp_path / "units.hdf5", pendulum_columns | {"actions": factor * actions})
    arguments = TINY | dict(dataset=str(path), run_dir=str(tmp_path / "run"))
    if fine:
        td3_opt.train(Args(**arguments))
        return
    ranges = f"the data's actions are from {-3 * factor:g} to {3 * factor:g}, InvertedPendulum-v5's from -3 to 3"
    with pytest.raises(td3_opt.BadInput, match=ranges):
        td3_opt.train(Args(**arguments))


def test_observations_that_are_constant_in_the_data_are_named(pendulum_columns, pendulum_file, tmp_path, capsys):
    columns = {key: column.copy() for key, column in pendulum_columns.items()}
    columns["observations"][:, 2] = 0.25
    path = write_file(tmp_path / "constant.hdf5", columns)
    for flags, said in (({}, True), ({"normalize_states": False}, False), ({"dataset": str(pendulum_file)}, False)):
        folder = tmp_path / f"run{said}{len(flags)}{len(str(flags))}"
        td3_opt.train(Args(**(TINY | dict(dataset=str(path), run_dir=str(folder)) | flags)))
        assert ("observations [2] are constant in the data" in capsys.readouterr().err) == said


def test_a_folder_in_use_is_refused(home, pendulum_file, tmp_path):
    arguments = (*FLAGS, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 2)
    assert run_killed_at("td3_opt", "offline", 4, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_script("td3_opt", home, *arguments, "--resume")
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert f"another process runs in {tmp_path / 'run'}: wait for it" in result.stderr
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0


def test_a_checkpoint_that_another_process_writes_meanwhile(pendulum_file, tmp_path, monkeypatch, capsys):
    """Between the reading of a checkpoint and the lock the process before may have written its last one."""
    args = Args(**TINY, dataset=str(pendulum_file), run_dir=str(tmp_path / "run"), resume=True)
    checkpoint, flock = tmp_path / "run" / "checkpoint.pt", fcntl.flock

    def wait_for_the_other(*arguments):
        td3_opt.save(checkpoint, "newer")
        return flock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", wait_for_the_other)
        with pytest.raises(td3_opt.BadInput, match="another process has just written .*checkpoint.pt: start again"):
            td3_opt.train(args)  # its first
    checkpoint.unlink()
    td3_opt.train(args)
    os.utime(checkpoint, (0, 0))  # as some archives leave it
    saved = checkpoint.read_bytes()
    td3_opt.train(args)
    assert "is complete" in capsys.readouterr().out and checkpoint.read_bytes() == saved
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", wait_for_the_other)
        with pytest.raises(td3_opt.BadInput, match="start again") as refusal:
            td3_opt.train(args)
    checkpoint.write_bytes(saved)
    td3_opt.train(args)  # the lock is free, although the error is kept
    assert "start again" in str(refusal.value)


def test_an_environment_that_does_not_repeat_itself_is_named_on_resuming(pendulum_file, tmp_path, monkeypatch, capsys):
    step = td3_opt.Collector.step

    def stopped(self, action):
        if self.buffer.added == 45:
            raise KeyboardInterrupt
        return step(self, action)

    for env_id, said in (("Unseeded-v0", True), ("OddPendulum-v0", False)):
        arguments = TINY | dict(env_id=env_id, dataset=str(pendulum_file), run_dir=str(tmp_path / env_id))
        arguments |= dict(checkpoint_freq=10)
        monkeypatch.setattr(td3_opt.Collector, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            td3_opt.train(Args(**arguments))
        monkeypatch.setattr(td3_opt.Collector, "step", step)
        capsys.readouterr()
        td3_opt.train(Args(**arguments, resume=True))
        assert ("does not repeat an episode" in capsys.readouterr().err) == said


def test_global_generators_are_seeded(pendulum_file, tmp_path):
    drawn = []
    for name in ("a", "b"):
        td3_opt.train(Args(**TINY, dataset=str(pendulum_file), run_dir=str(tmp_path / name)))
        drawn.append((np.random.uniform(), __import__("random").random()))
    assert drawn[0] == drawn[1]


def test_a_run_that_fails_gives_back_signals_folder_and_log(pendulum_file, tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    closed, evaluate = [], td3_opt.evaluate
    close = SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: (closed.append(1), close(writer)))
    arguments = TINY | dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))

    def fail(*args, **kwargs):
        raise RuntimeError("in the first evaluation")

    monkeypatch.setattr(td3_opt, "evaluate", fail)
    with pytest.raises(RuntimeError, match="first evaluation"):
        td3_opt.train(Args(**arguments))
    now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    assert now == handlers and closed
    monkeypatch.setattr(SummaryWriter, "close", fail)  # a full disk, or Ctrl-C again
    with pytest.raises(RuntimeError, match="first evaluation"):
        td3_opt.train(Args(**arguments))
    monkeypatch.setattr(SummaryWriter, "close", close)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers[:2]
    monkeypatch.setattr(td3_opt, "evaluate", evaluate)
    td3_opt.train(Args(**arguments))  # nothing was there yet that would have to be gone on with
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_a_run_killed_before_its_first_checkpoint_logs_once(home, pendulum_file, tmp_path):
    arguments = (*FLAGS, "--dataset", pendulum_file, "--run-dir", tmp_path / "run")
    assert run_killed_at("td3_opt", "offline", 4, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_curves_by_environment_steps_survive_resuming(home, pendulum_file, tmp_path):
    """Also where those are more than the gradient steps, by which TensorBoard drops what a resumed run repeats."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = (*FLAGS, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 30)
    arguments += ("--offline-steps", 0, "--n-tau", 50)
    assert run_killed_at("td3_opt", "collect", 45, "SIGTERM", home, *arguments).returncode == 128 + signal.SIGTERM

    def points() -> list[int]:
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        return [event.step for event in events.Scalars("online/episode_return")]

    before = points()
    assert before and all(0 < step <= 46 for step in before)
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert points()[: len(before)] == before


def test_a_resumed_run_has_each_point_of_its_curves_once(home, pendulum_file, tmp_path):
    """Killed two evaluations after its newest checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = (*FLAGS, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--checkpoint-freq", 25)
    arguments += ("--offline-steps", 60, "--eval-freq", 10)
    assert run_killed_at("td3_opt", "offline", 45, "SIGKILL", home, *arguments).returncode == -signal.SIGKILL
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    steps = [int(row["gradient_steps"]) for row in rows(tmp_path / "run")]
    assert [event.step for event in events.Scalars("eval/return_mean")] == steps and steps[:7] == [*range(0, 70, 10)]


def test_nohup_is_respected(home, pendulum_file, tmp_path):
    arguments = (*FLAGS, "--dataset", pendulum_file)
    assert run_script("td3_opt", home, *arguments, "--run-dir", tmp_path / "whole").returncode == 0
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); {before}; import runs; exec(runs.KILLED.format("
    code += f"folder={str(ROOT / 'algorithms')!r}, script='td3_opt', phase='offline', step=3, signal='SIGHUP'))"
    result = run_script("td3_opt", home, *arguments, "--run-dir", tmp_path / "run", code=code)
    assert result.returncode == 0 and timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert rows(tmp_path / "run")[-1]["phase"] == "online_finetune"


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=str)
def test_processes_that_regenerate_data_end_with_their_parent(number, status, home, tmp_path):
    """Ctrl-C reaches all of them, and says nothing."""
    command = [sys.executable, ROOT / "algorithms" / "td3_opt.py", "--env-id", "hopper-random-v2", "--run-dir"]
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [*command, tmp_path / "run"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(5 if number == signal.SIGKILL else 1)  # in a step, and while they still import
    workers, deadline = children(process.pid), time.monotonic() + 400
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    errors = process.communicate(timeout=300)[1]  # what the workers have begun they end
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(workers) >= 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert process.returncode == status and "Traceback" not in errors, errors


def test_a_script_without_a_main_guard_is_told_so(home, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'algorithms')!r}); import td3_opt\n"
        "td3_opt.train(td3_opt.Args(env_id='hopper-random-v2', run_dir='run'))\n"
    )
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "mine.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1  # an exception of the user's own script
    last = result.stderr.splitlines()[-1]
    assert last.startswith("td3_opt.BadInput: no data for hopper-random-v2") and "if __name__ == '__main__'" in last


def test_rewards_may_be_arrays_of_one_element_and_episodes_counted_already(pendulum_file, tmp_path):
    scores = []
    for env_id in ("OddPendulum-v0", "Arrays-v0", "Counted-v0"):
        arguments = TINY | dict(env_id=env_id, dataset=str(pendulum_file), run_dir=str(tmp_path / env_id))
        scores.append(td3_opt.train(Args(**arguments)).score)
    assert scores[0] == scores[1] == scores[2]


def test_a_terminal_that_is_closed(pendulum_file, home, tmp_path):
    """SIGHUP, and nothing can be printed any more: a checkpoint all the same."""
    arguments = [*FLAGS, "--online-steps", 90_000, "--dataset", pendulum_file, "--run-dir", tmp_path / "run"]
    command = [sys.executable, ROOT / "algorithms" / "td3_opt.py", *arguments]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, list(map(str, command)))
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "offline.pt").exists():
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError, OSError):
            os.read(terminal, 10_000)
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["gradient_steps"] >= 6


def test_what_train_gives_back(pendulum_file, tmp_path, capsys):
    """The score of the last row, the folder and the model; the same of a run that is complete already."""
    arguments = TINY | dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
    first, again = td3_opt.train(Args(**arguments)), td3_opt.train(Args(**arguments, resume=True))
    assert again == first and first.folder == tmp_path / "run" and first.model == tmp_path / "run" / "model.pt"
    assert first.score == pytest.approx(float(rows(first.folder)[-1]["return_mean"]), abs=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"td3_opt.py: {tmp_path / 'run'}: 5,000 transitions from {pendulum_file}; 6 + 60 steps on cpu"
    )
    assert lines[-2].startswith(f"{tmp_path / 'run'}: score {first.score:.1f}, after ")
    arguments |= dict(run_dir=str(tmp_path / "b"), save_model=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "events.out.tfevents.another's").touch()  # in a fresh run's folder it stays
    assert td3_opt.train(Args(**arguments)).model is None
    assert td3_opt.train(Args(**(arguments | dict(save_model=True)), resume=True)).model is None  # none was written
    assert len(list((tmp_path / "b").glob("events.out.tfevents.*"))) == 2


def test_an_evaluation_with_random_numbers_leaves_those_of_training_alone(pendulum_file, tmp_path, monkeypatch):
    """The same weights with one evaluation and with four; each evaluation draws the same numbers."""
    plain, drawn = td3_opt.evaluate, []

    def evaluate(*args, **kwargs):
        drawn.append(torch.rand(1).item())
        return plain(*args, **kwargs)

    monkeypatch.setattr(td3_opt, "evaluate", evaluate)
    for frequency in (0, 20):
        arguments = TINY | dict(dataset=str(pendulum_file), eval_freq=frequency, run_dir=str(tmp_path / str(frequency)))
        td3_opt.train(Args(**arguments))
    assert len(set(drawn)) == 1 and len(drawn) > 8 and same_weights(tmp_path / "0", tmp_path / "20")


class Counting:
    """The nth episode has n steps of reward n."""

    def __init__(self):
        self.seeds = []

    def reset(self, seed):
        self.seeds.append(seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.steps += 1
        n = len(self.seeds)
        return np.zeros(4, np.float32), float(n), self.steps == n, False, {}


STILL = type("Still", (), {"refresh": lambda self: None, "__call__": lambda self, observation: observation})()


def test_an_evaluation_by_hand():
    """Returns 1, 4, 9; seeds that no training episode has, the same ones in each evaluation of a run."""
    env = Counting()
    row = td3_opt.evaluate(STILL, env, "Counting-v0", 3, 7)
    assert env.seeds == [1_000_007, 1_000_008, 1_000_009]
    assert (row["return_mean"], row["length_mean"], row["success_rate"]) == (4.6667, 2.0, "")
    assert row["return_std"] == round(((11 / 3) ** 2 + (2 / 3) ** 2 + (13 / 3) ** 2) ** 0.5 / 3**0.5, 4)


def test_without_checkpoints_there_is_the_last_one(pendulum_file, tmp_path, monkeypatch):
    saved, save_checkpoint = [], td3_opt.Run.save_checkpoint
    monkeypatch.setattr(td3_opt.Run, "save_checkpoint", lambda run: (saved.append(run.phase), save_checkpoint(run)))
    td3_opt.train(Args(**TINY, dataset=str(pendulum_file), run_dir=str(tmp_path / "run"), checkpoint_freq=0))
    assert saved == ["done"]


@pytest.mark.parametrize("number, waits", [(signal.SIGINT, False), (signal.SIGHUP, True)], ids=str)
def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(number, waits, pendulum_file, tmp_path, monkeypatch):
    """A terminal that closes sends SIGHUP, and its shell passes on its own: that asks once."""
    loop, steps = td3_opt.Run.loop, []

    def twice(run, phase, *args, **kwargs):
        for step in loop(run, phase, *args, **kwargs):
            steps.append(step)
            for _ in range(2 if step == 3 else 0):
                signal.raise_signal(number)
            yield step

    monkeypatch.setattr(td3_opt.Run, "loop", twice)
    with pytest.raises(SystemExit) as end:
        td3_opt.train(Args(**TINY, dataset=str(pendulum_file), run_dir=str(tmp_path / "run")))
    assert end.value.code == 128 + number and steps == [0, 1, 2, 3]
    assert (tmp_path / "run" / "checkpoint.pt").exists() == waits


def test_ctrl_c_that_ends_tee_too_leaves_a_checkpoint(home, pendulum_file, tmp_path):
    """`python td3_opt.py 2>&1 | tee log`: while an evaluation runs, the reader of both streams ends."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "algorithms")!r})
import td3_opt
plain = td3_opt.evaluate
def evaluate(policy, env, *args, **kwargs):
    evaluate.calls += 1
    if evaluate.calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1), os.dup2(writer, 2)
    return plain(policy, env, *args, **kwargs)
evaluate.calls = 0
td3_opt.evaluate = evaluate
td3_opt.train(td3_opt.parse_args())
"""
    arguments = [*FLAGS, "--online-steps", 90_000, "--dataset", pendulum_file, "--run-dir", tmp_path / "run"]
    assert run_script("td3_opt", home, *arguments, code=code).returncode == 130
    evaluations = len(rows(tmp_path / "run"))
    assert len(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["evals"]) == 1 + evaluations == 4


def test_an_environment_of_ones_own_is_registered_on_import(pendulum_file, tmp_path, monkeypatch):
    text = "import gymnasium\nfrom gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv\n"
    text += "class Own(InvertedPendulumEnv):\n    def __init__(self):\n        super().__init__()\n"  # no render_mode
    text += "gymnasium.register('Own-v0', Own, max_episode_steps=20)\n"
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "envs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = TINY | dict(env_id="own_package.envs:Own-v0", dataset=str(pendulum_file))
    assert 1 <= td3_opt.train(Args(**arguments, run_dir=str(tmp_path / "run"))).score <= 20


class Endless:
    """An environment without a time limit, for one evaluation."""

    steps = 0

    def reset(self, **_):
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(4, np.float32), 0.0, False, self.steps == self.last, {}


@pytest.mark.parametrize("last, said", [(99_999, False), (100_001, True)])
def test_an_episode_that_does_not_end_is_named(last, said, capsys):
    env = Endless()
    env.last = last
    assert td3_opt.evaluate(STILL, env, "Endless-v0", 1, 0)["length_mean"] == last
    message = "warning: an evaluation episode has not ended in 100,000 steps: register it with max_episode_steps"
    assert (message in capsys.readouterr().err) == said
