"""Where data comes from, and what is read of it."""

import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import td3_opt
from conftest import roll_out, write_file


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def small_columns(n: int = 12) -> dict[str, np.ndarray]:
    """Episodes of 4, 3 and 5 steps: a terminal, a cut one, and the file's end."""
    observations = np.arange(n, dtype=np.float32)[:, None] * [1.0, 10.0]
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[3], timeouts[6] = True, True
    actions, rewards = np.linspace(-1, 1, n, dtype=np.float32)[:, None], np.arange(n, dtype=np.float32)
    return dict(observations=observations, actions=actions, rewards=rewards, terminals=terminals, timeouts=timeouts)


def test_without_next_observations_the_last_step_of_a_cut_episode_is_dropped(tmp_path):
    data = td3_opt.read_hdf5(write_file(tmp_path / "d.hdf5", small_columns()))
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]  # not 6 (cut) and 11 (the file's end)
    assert data.terminals.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    alive = data.terminals == 0
    np.testing.assert_array_equal(data.next_observations[alive, 0], data.observations[alive, 0] + 1)
    assert all(column.dtype == np.float32 for column in data)


def test_with_next_observations_every_step_stays_and_a_time_limit_is_no_terminal(tmp_path):
    columns = small_columns()
    columns["next_observations"] = columns["observations"] + 0.5
    data = td3_opt.read_hdf5(write_file(tmp_path / "d.hdf5", columns))
    np.testing.assert_array_equal(data.next_observations, columns["next_observations"])
    assert data.terminals.tolist() == columns["terminals"].astype(float).tolist() and len(data.rewards) == 12


@pytest.mark.parametrize("says, workers", [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), (None, 4)])
def test_regeneration_takes_no_more_cores_than_a_container_has(says, workers, tmp_path, monkeypatch):
    given, read = [], Path.read_text

    def pool(n, *args, **kwargs):
        given.append(n)
        raise KeyboardInterrupt

    def read_text(path, *args, **kwargs):
        if path != Path("/sys/fs/cgroup/cpu.max"):
            return read(path, *args, **kwargs)
        if says is None:
            raise FileNotFoundError
        return says + "\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(td3_opt.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(td3_opt, "ProcessPoolExecutor", pool)
    with pytest.raises(KeyboardInterrupt):
        td3_opt.regenerate_random("hopper-random-v2", tmp_path / "a.hdf5")
    assert given == [workers]


def test_regenerated_random_data_is_d4rls_recipe_and_the_same_on_any_number_of_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(td3_opt, "RANDOM_CHUNK", 1_500)
    paths = []
    for name, cores in (("a", {0}), ("b", {0, 1}), ("c", {0, 1})):
        monkeypatch.setattr(td3_opt.os, "sched_getaffinity", lambda pid, cores=cores: cores)
        paths.append(tmp_path / f"{name}.hdf5")
        td3_opt.regenerate_random("hopper-random-v2", paths[-1], progress=False, seed=int(name == "c"), steps=4_000)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert digests[0] == digests[1] != digests[2]
    with h5py.File(paths[0]) as file:
        columns = {key: file[key][()] for key in file}
    assert sorted(columns) == sorted([*td3_opt.Transitions._fields, "timeouts"]) and len(columns["rewards"]) == 4_000
    assert np.abs(columns["actions"]).max() <= 1 and np.abs(columns["actions"].mean(0)).max() < 0.05
    assert columns["actions"].std(0) == pytest.approx([1 / 3**0.5] * 3, rel=0.03)
    ends = columns["terminals"] | columns["timeouts"]
    inside = ~ends[:-1]
    np.testing.assert_array_equal(columns["next_observations"][:-1][inside], columns["observations"][1:][inside])
    assert ends[[1_499, 2_999, 3_999]].all()
    assert set(np.flatnonzero(columns["timeouts"])) <= {1_499, 2_999, 3_999}  # hopper falls long before 1000 steps
    assert not (columns["terminals"] & columns["timeouts"]).any()
    # the same actions in Gymnasium's own environment give the same numbers
    env, seed = gym.make("Hopper-v5"), int(np.random.SeedSequence(0).generate_state(3)[0])
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    for t in range(int(np.flatnonzero(ends)[0]) + 1):
        np.testing.assert_array_equal(columns["observations"][t], observation.astype(np.float32))
        np.testing.assert_array_equal(columns["actions"][t], env.action_space.sample())
        observation, reward, terminated, _, _ = env.step(columns["actions"][t])
        assert columns["rewards"][t] == np.float32(reward) and columns["terminals"][t] == terminated


def test_halfcheetah_chunks_end_with_whole_episodes():
    assert td3_opt.RANDOM_STEPS == 1_000_000
    assert td3_opt.RANDOM_STEPS % td3_opt.RANDOM_CHUNK == 0 == td3_opt.RANDOM_CHUNK % 1_000
    assert td3_opt.RANDOM_CHUNK == 25_000  # of another length the sets would be others


def test_first_hit_wins(tmp_path, monkeypatch):
    """--dataset, then D4RL's cache, then the scripts' own, then regeneration."""
    monkeypatch.setattr(td3_opt, "regenerate_random", lambda env_id, path, progress: write_file_with_reward(path, 4))

    def write_file_with_reward(path, reward):
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = small_columns()
        columns["rewards"][:] = reward
        return write_file(path, columns)

    def first_reward(dataset=None):
        return td3_opt.load_dataset("hopper-random-v2", dataset, progress=False)[0].rewards[0]

    own = tmp_path / ".cache" / "opt-datasets" / "hopper-random-v2.hdf5"
    assert first_reward() == 4 and [path.name for path in own.parent.iterdir()] == [own.name]
    write_file_with_reward(own, 3)
    assert first_reward() == 3
    write_file_with_reward(tmp_path / ".d4rl" / "datasets" / "hopper_random-v2.hdf5", 2)
    assert first_reward() == 2
    assert first_reward(str(write_file_with_reward(tmp_path / "mine.hdf5", 1))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    write_file_with_reward(tmp_path / "xdg" / "opt-datasets" / "walker2d-random-v2.hdf5", 5)
    assert td3_opt.load_dataset("walker2d-random-v2", progress=False)[0].rewards[0] == 5
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    write_file_with_reward(tmp_path / "d4rl" / "walker2d_random-v2.hdf5", 6)
    assert td3_opt.load_dataset("walker2d-random-v2", progress=False)[0].rewards[0] == 6


@pytest.mark.parametrize(
    "kind, name",
    [("medium-replay", "medium_replay"), ("medium-expert", "medium_expert"), ("full-replay", "full_replay")],
)
def test_d4rls_files_are_found_under_their_names(tmp_path, kind, name):
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    write_file(folder / f"walker2d_{name}-v2.hdf5", small_columns())
    assert len(td3_opt.load_dataset(f"walker2d-{kind}-v2", progress=False)[0].rewards) == 10


@pytest.fixture
def server(tmp_path, monkeypatch):
    """D4RL's server, on this machine."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(td3_opt, "D4RL_URL", f"http://127.0.0.1:{httpd.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        httpd.shutdown()


def test_download_into_the_cache(server):
    write_file(server / "hopper_medium-v2.hdf5", small_columns())
    assert len(td3_opt.load_dataset("hopper-medium-v2", progress=False)[0].rewards) == 10
    (server / "hopper_medium-v2.hdf5").unlink()
    assert len(td3_opt.load_dataset("hopper-medium-v2", progress=False)[0].rewards) == 10  # from the cache


def refused(env_id: str, cache: Path) -> str:
    """The one line with which it ends where nothing can be had, and nothing is left in the cache."""
    with pytest.raises(td3_opt.BadInput) as error:
        td3_opt.load_dataset(env_id, progress=False)
    message = str(error.value)
    assert "\n" not in message and list(cache.iterdir()) == []
    return message


def test_no_data_anywhere_names_the_three_ways(server, tmp_path):
    message = refused("hopper-expert-v2", tmp_path / ".cache" / "opt-datasets")
    for way in (str(tmp_path / ".d4rl" / "datasets" / "hopper_expert-v2.hdf5"), "--dataset", td3_opt.D4RL_URL):
        assert way in message


def test_a_download_that_is_damaged_is_not_kept(server, tmp_path):
    whole = write_file(server / "whole.hdf5", small_columns()).read_bytes()
    (server / "hopper_expert-v2.hdf5").write_bytes(whole[: len(whole) // 2])
    assert "truncated file" in refused("hopper-expert-v2", tmp_path / ".cache" / "opt-datasets")


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(td3_opt.BadInput, match="^[^\n]*set XDG_CACHE_HOME[^\n]*$"):
        td3_opt.load_dataset("hopper-random-v2", progress=False)


def collect_minari(dataset_id: str, env: gym.Env, steps: int):
    env = minari.DataCollector(env)
    columns = roll_out(env, steps, seed=0)
    names = dict(algorithm_name="random", author="test", author_email="test@example.org", code_permalink="none")
    env.create_dataset(dataset_id=dataset_id, **names)
    env.close()
    return columns


def test_a_minari_dataset_is_read_and_read_anew_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    for steps in (300, 200):
        columns = collect_minari("test/pendulum-v0", gym.make("InvertedPendulum-v5"), steps)
        data, _ = td3_opt.load_dataset("InvertedPendulum-v5", "test/pendulum-v0", progress=False)
        assert len(data.rewards) == steps
        for key in td3_opt.Transitions._fields:
            np.testing.assert_array_equal(getattr(data, key), columns[key].astype(np.float32))
        minari.delete_dataset("test/pendulum-v0")


def test_environments_are_d4rls():
    assert td3_opt.make_env("hopper-medium-v2").spec.id == "Hopper-v5"
    walker = td3_opt.make_env("walker2d-random-v2")
    assert walker.spec.kwargs["xml_file"] == "walker2d.xml" and walker.spec.max_episode_steps == 1_000
    # in D4RL's Walker2d-v2 the right foot slides at 0.9 and the left one at 1.9; in the v5 model both at 1.9
    model = walker.unwrapped.model
    assert [model.geom(name).friction[0] for name in ("foot_geom", "foot_left_geom")] == [0.9, 1.9]


def test_actions_are_scaled_in_data_and_environments_alike(pendulum_file, pendulum_columns, tmp_path):
    """InvertedPendulum takes forces in [-3, 3]."""
    args = td3_opt.Args(env_id="InvertedPendulum-v5", dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
    args.normalize_states, args.progress = False, False
    run = td3_opt.Run(td3_opt.resolve(args))
    data = run.load_data(td3_opt.reward_transform)
    np.testing.assert_allclose(data.actions, pendulum_columns["actions"] / 3, rtol=1e-6)
    np.testing.assert_array_equal(data.observations, pendulum_columns["observations"])
    for env in (run.env, run.evaluation_env):
        assert env.action_space.low == -1 and env.action_space.high == 1
        plain = gym.make("InvertedPendulum-v5")
        env.reset(seed=0), plain.reset(seed=0)
        expected = plain.step(np.array([1.5], np.float32))[0]
        np.testing.assert_allclose(env.step(np.array([0.5], np.float32))[0], expected, rtol=1e-6)


class Lopsided(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(np.float32([0, -2]), np.float32([1, 6]))

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.taken = action
        return np.zeros(2, np.float32), 0.0, False, False, {}


gym.register("Lopsided-v0", Lopsided, max_episode_steps=5)


def test_boxes_of_actions_need_not_be_symmetric(tmp_path):
    columns = roll_out(gym.make("Lopsided-v0"), 300, seed=0)
    columns["actions"][:3] = [[0, -2], [0.5, 2], [1, 4]]
    args = td3_opt.Args("Lopsided-v0", str(write_file(tmp_path / "d.hdf5", columns)), run_dir=str(tmp_path / "run"))
    run = td3_opt.Run(td3_opt.resolve(args))
    data = run.load_data(td3_opt.reward_transform)
    np.testing.assert_allclose(data.actions[:3], [[-1, -1], [0, 0], [1, 0.5]], atol=1e-6)
    run.env.reset(seed=0)
    for stored, own in zip(data.actions[:3], columns["actions"][:3], strict=True):
        run.env.step(stored)
        np.testing.assert_allclose(run.env.unwrapped.taken, own, atol=1e-6)


def test_a_minari_id_may_name_its_remote(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    asked = []

    def download(dataset_id):
        asked.append(dataset_id)
        collect_minari("test/pendulum-v0", gym.make("InvertedPendulum-v5"), 200)

    monkeypatch.setattr(minari, "download_dataset", download)
    for _ in range(2):  # the second time it is there
        data, source = td3_opt.load_dataset("InvertedPendulum-v5", "hf://someone/test/pendulum-v0", progress=False)
        assert len(data.rewards) == 200 and source == "Minari's test/pendulum-v0"
    assert asked == ["hf://someone/test/pendulum-v0"]


def test_a_second_run_waits_for_the_download_of_the_first(tmp_path, monkeypatch):
    """Which has its folder already, half written."""
    whole = tmp_path / "whole"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(whole))
    collect_minari("test/pendulum-v0", gym.make("InvertedPendulum-v5"), 200)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    started, read = threading.Event(), []

    def slow_download(dataset_id):
        target = tmp_path / "store" / dataset_id / "data"
        target.mkdir(parents=True)
        started.set()
        time.sleep(1)
        for path in (whole / dataset_id / "data").iterdir():
            shutil.copy(path, target)

    monkeypatch.setattr(minari, "download_dataset", slow_download)

    def load():
        read.append(len(td3_opt.load_dataset("InvertedPendulum-v5", "test/pendulum-v0", progress=False)[0].rewards))

    first = threading.Thread(target=load)
    first.start()
    assert started.wait(60)
    load()
    first.join()
    assert read == [200, 200]


def test_where_the_data_came_from(tmp_path, monkeypatch):
    columns = small_columns()
    monkeypatch.setattr(td3_opt, "regenerate_random", lambda env_id, path, progress: write_file(path, columns))
    for _ in range(2):
        source = td3_opt.load_dataset("hopper-random-v2", progress=False)[1]
        assert source == f"{tmp_path / '.cache' / 'opt-datasets' / 'hopper-random-v2.hdf5'} (regenerated)"
    mine = write_file(tmp_path / "mine.hdf5", columns)
    assert td3_opt.load_dataset("hopper-random-v2", str(mine), progress=False)[1] == str(mine)
    (tmp_path / ".d4rl" / "datasets").mkdir(parents=True)
    own = write_file(tmp_path / ".d4rl" / "datasets" / "hopper_random-v2.hdf5", columns)
    assert td3_opt.load_dataset("hopper-random-v2", progress=False)[1] == str(own)


def test_a_file_that_another_process_writes(tmp_path):
    path = write_file(tmp_path / "open.hdf5", small_columns())
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'a'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(td3_opt.BadInput, match="another process has it open for writing"):
            td3_opt.read_hdf5(path)
        writer.stdin.close()
    assert len(td3_opt.read_hdf5(path).rewards) == 10
