"""AntMaze and Adroit: D4RL's rewards and environments on Minari's data."""

import dataclasses
import functools
import importlib

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import pytest
import td3_opt
import torch
from test_data import empty_home  # noqa: F401

gym.register_envs(gymnasium_robotics)


def test_relabelling_of_a_hand_made_trajectory():
    """The goal at (2, 0) is passed at the third step; what comes later does not exist."""
    positions = np.array([[2.0, 0.0], [0, 0], [1.5, 0], [2.3, 0.3], [1, 0], [2, 0]])  # the start does not count
    steps, rewards = td3_opt.relabel_antmaze(positions, np.array([2.0, 0.0]))
    assert steps == 3 and rewards.tolist() == [0, 0, 1]
    steps, rewards = td3_opt.relabel_antmaze(positions, np.array([2.0, 5.0]))
    assert steps == 5 and rewards.tolist() == [0, 0, 0, 0, 0]
    at, beyond = np.array([[0, 0], [0.45, 0]]), np.array([[0, 0], [0.4501, 0]])
    assert [td3_opt.relabel_antmaze(p, np.zeros(2))[1].tolist() for p in (at, beyond)] == [[1], [0]]


CELLS = {"umaze": ((-4, -4), (-4, 4)), "medium": ((-10, 10), (10, -10)), "large": ((-18, 12), (14, -12))}


@pytest.mark.parametrize("env_id", td3_opt.ANTMAZE_TASKS)
def test_every_evaluation_starts_and_ends_where_the_data_was_relabelled_to(env_id):
    """Cells are 4 m wide and the maze is centred on (0, 0): the positions are worked out by hand from the maps."""
    start, goal = CELLS[env_id.split("-")[1]]
    env = td3_opt.make_env(env_id)
    observations = []
    for seed in range(100):
        observation, _ = env.reset(seed=seed)
        observations.append(observation)
        assert observation.shape == (29,) and env.unwrapped.goal.tolist() == list(goal)
    # D4RL's ant starts shaken: position and joints by up to 0.1, velocities (the last 14 numbers) normally by 0.1
    shaken = np.array(observations) - [*start, 0.75, 1, *[0] * 25]
    assert 0.09 < np.abs(shaken[:, :15]).max() <= 0.1 and abs(np.std(shaken[:, 15:]) - 0.1) < 0.01
    assert len(np.unique(shaken[:, 0])) == 100
    assert env.spec.max_episode_steps == (700 if "umaze" in env_id else 1_000)
    assert env.unwrapped.continuing_task is False and env.unwrapped.reward_type == "sparse"


def test_success_ends_the_episode_with_the_one_reward():
    env = td3_opt.make_env("antmaze-umaze-v2")
    env.reset(seed=0)
    ant = env.unwrapped.ant_env
    position, velocity = ant.data.qpos.copy(), ant.data.qvel.copy()
    position[:2] = (-4, 3.8)
    ant.set_state(position, velocity)
    observation, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (1, True, False, True)
    np.testing.assert_allclose(observation[:2], (-4, 3.8), atol=0.3)


LAP = [(x, -4) for x in (-4, -2, 0, 2, 4)] + [(4, y) for y in (-2, 0, 2, 4)] + [(x, 4) for x in (2, 0, -2, -4)]


class Walk(gym.Env):
    """An ant that walks around the umaze, two metres a step: at the goal (-4, 4) at the twelfth step, where it stays.

    The goal of the episode is elsewhere, and it is rewarded there: both are to be ignored.
    """

    observation_space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-np.inf, np.inf, (27,), np.float64),
            "achieved_goal": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "desired_goal": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def look(self):
        position = np.array(LAP[min(self.t, 12)], float)
        numbers = 100.0 + np.arange(27) + self.t
        return {"observation": numbers, "achieved_goal": position, "desired_goal": np.array([4.0, 0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.end = 0, 3 if options else 15
        return self.look(), {}

    def step(self, action):
        self.t += 1
        return self.look(), float(self.t == 6), False, self.t == self.end, {}


def collect(dataset_id: str, env: gym.Env, episodes: list) -> None:
    env = minari.DataCollector(env)
    env.action_space.seed(0)
    for options in episodes:
        env.reset(seed=0, options=options)
        done = False
        while not done:
            *_, terminated, truncated, _ = env.step(env.action_space.sample())
            done = terminated or truncated
    names = dict(algorithm_name="test", author="test", author_email="test@example.org", code_permalink="none")
    env.create_dataset(dataset_id=dataset_id, **names)
    env.close()


def test_antmaze_data_is_made_d4rls(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/antmaze/umaze-v1", Walk(), [None, {"short": True}])
    data, _ = td3_opt.load_dataset("antmaze-umaze-v2", progress=False)
    # the first episode ends at its twelfth step, the second one is cut after three
    assert data.rewards.tolist() == [0] * 11 + [1] + [0] * 3
    assert data.terminals.tolist() == [0] * 11 + [1] + [0] * 3
    times = np.r_[np.arange(12), np.arange(3)]
    for observations, t in ((data.observations, times), (data.next_observations, times + 1)):
        np.testing.assert_array_equal(observations, np.hstack([np.array(LAP)[t], 100 + np.arange(27) + t[:, None]]))
    assert data.actions.shape == (15, 8) and data.observations.dtype == np.float32


MINARI = {"antmaze-umaze-v2": "D4RL/antmaze/umaze-v1", "antmaze-large-diverse-v2": "D4RL/antmaze/large-diverse-v1"}
MINARI |= {"pen-cloned-v1": "D4RL/pen/cloned-v2"}


def test_a_newer_version_is_taken_where_the_named_one_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    asked = []

    def ask(kind, dataset_id):
        asked.append((kind, dataset_id))
        raise OSError

    for kind in ("load", "download"):
        monkeypatch.setattr(td3_opt.minari, f"{kind}_dataset", functools.partial(ask, kind))

    def taken(env_id: str) -> tuple[str, str]:
        with pytest.raises(td3_opt.BadInput):
            td3_opt.load_dataset(env_id, progress=False)
        return asked[-1]

    for env_id, dataset_id in MINARI.items():
        assert taken(env_id) == ("download", dataset_id)
    (tmp_path / "store" / "D4RL" / "pen" / "cloned-v3" / "data").mkdir(parents=True)
    (tmp_path / "store" / "D4RL" / "antmaze" / "umaze-v2" / "data").mkdir(parents=True)
    assert taken("pen-cloned-v1") == ("load", "D4RL/pen/cloned-v3")
    assert taken("antmaze-umaze-v2") == ("load", "D4RL/antmaze/umaze-v2")
    (tmp_path / "store" / "D4RL" / "pen" / "cloned-v2" / "data").mkdir(parents=True)
    assert taken("pen-cloned-v1") == ("load", "D4RL/pen/cloned-v2")


@pytest.mark.parametrize("kind, apart", [("door", 2), ("hammer", 3), ("relocate", 2)])
def test_adroit_pays_what_d4rl_pays(kind, apart):
    """A random policy's returns are those of D4RL's; with gymnasium-robotics' rewards they are 6 to 17 more."""
    env, returns = td3_opt.make_env(f"{kind}-cloned-v1"), []
    env.action_space.seed(0)
    for episode in range(6):
        env.reset(seed=episode)
        steps = [env.step(env.action_space.sample()) for _ in range(200)]
        assert [truncated for _, _, _, truncated, _ in steps] == [False] * 199 + [True]
        assert not any(terminated for _, _, terminated, _, _ in steps)
        returns.append(sum(reward for _, reward, *_ in steps))
    assert np.mean(returns) == pytest.approx(td3_opt.REFERENCE_RETURNS[kind][0], abs=apart)


def test_a_dropped_pen_ends_the_episode():
    env, lengths = td3_opt.make_env("pen-cloned-v1"), []
    env.action_space.seed(0)
    pen = env.unwrapped.model.body("Object").id
    for episode in range(6):
        env.reset(seed=episode)
        done = False
        for step in range(100):
            assert not done
            action = env.action_space.sample()
            *_, terminated, truncated, _ = env.step(0.1 * action if episode % 2 else action)
            done = env.unwrapped.data.xpos[pen, 2] < 0.075 or step == 99
            assert terminated == (env.unwrapped.data.xpos[pen, 2] < 0.075) and truncated == (step == 99)
            if done:
                break
        lengths.append(step + 1)
    assert min(lengths) < 60 and max(lengths) == 100, lengths


@pytest.mark.parametrize(
    "env_id, dimensions, limit",
    [("pen-cloned-v1", (45, 24), 100), ("door-cloned-v1", (39, 28), 200), ("hammer-cloned-v1", (46, 26), 200),
     ("relocate-cloned-v1", (39, 30), 200)],
)  # fmt: skip
def test_adroit(tmp_path, monkeypatch, env_id, dimensions, limit):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    env = td3_opt.make_env(env_id)
    assert (*env.observation_space.shape, *env.action_space.shape) == dimensions
    assert env.spec.max_episode_steps == limit and td3_opt.make_env(env_id).action_space.high.max() == 1
    collect(f"D4RL/{env_id.split('-')[0]}/cloned-v2", gym.make(env.spec.id, max_episode_steps=7), [None, None])
    data, _ = td3_opt.load_dataset(env_id, progress=False)
    assert len(data.rewards) == 14 and data.terminals.sum() == 0 and len(set(data.rewards.tolist())) > 5
    np.testing.assert_array_equal(data.observations[1:7], data.next_observations[:6])
    env.reset(seed=0)  # rewards as here online
    rewards = [env.step(action)[1] for action in data.actions[:7]]
    np.testing.assert_allclose(data.rewards[:7], rewards, rtol=1e-6, atol=1e-6)
    if env_id in ("door-cloned-v1", "relocate-cloned-v1"):  # data with D4RL's rewards keeps them
        own = gym.wrappers.TimeLimit(td3_opt.make_env(env_id), 7)
        collect("own/rewards-v0", own, [None])
        kept, _ = td3_opt.load_dataset(env_id, "own/rewards-v0", progress=False)
        np.testing.assert_allclose(kept.rewards, rewards, rtol=1e-6, atol=1e-6)
    actions = data.actions.copy()
    actions[:2, 0] = 1.3, -1.2  # as those of the cloned policies may be
    monkeypatch.setattr(td3_opt, "load_dataset", lambda *given: (data._replace(actions=actions), "here"))
    run = td3_opt.Run(td3_opt.resolve(td3_opt.Args(env_id, batch_size=8, run_dir=str(tmp_path / "run"))))
    np.testing.assert_array_equal(run.load_data(td3_opt.reward_transform).actions, actions)


@pytest.mark.parametrize("kind", ["pen", "door", "hammer"])
def test_minari_data_of_another_environment_is_refused_for_adroit(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("own/pendulum-v0", gym.make("InvertedPendulum-v5"), [None])
    data, _ = td3_opt.load_dataset(f"{kind}-cloned-v1", "own/pendulum-v0", progress=False)
    args = td3_opt.Args(f"{kind}-cloned-v1", batch_size=1)
    with pytest.raises(td3_opt.BadInput, match="the data's observations have shape"):
        td3_opt.check_dataset(data, td3_opt.make_env(args.env_id), args)


def test_pen_data_ends_with_the_drop(tmp_path, monkeypatch):
    """As the environment does: its actions end an episode in the same step."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/pen/cloned-v2", gym.make("AdroitHandPen-v1", max_episode_steps=80), [None, None])
    data, _ = td3_opt.load_dataset("pen-cloned-v1", progress=False)
    env, ends = td3_opt.make_env("pen-cloned-v1"), np.flatnonzero(data.terminals)
    assert len(ends) == 2 and ends[1] == len(data.rewards) - 1 and ends[1] < 159
    for actions in np.split(data.actions, ends[:1] + 1):
        env.reset(seed=0)
        terminated = [env.step(action)[2] for action in actions]
        assert terminated == [False] * (len(actions) - 1) + [True]


def test_rewards_of_a_door_are_known_whatever_its_first_action(tmp_path, monkeypatch):
    """With all joints at full speed the costs of velocity are more than the palm's distance."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    env, ones = gym.make("AdroitHandDoor-v1", max_episode_steps=3), np.ones(28, np.float32)
    env.action_space.sample = lambda: ones
    collect("D4RL/door/cloned-v2", env, [None])
    data, _ = td3_opt.load_dataset("door-cloned-v1", progress=False)
    env = td3_opt.make_env("door-cloned-v1")
    env.reset(seed=0)
    np.testing.assert_allclose(data.rewards, [env.step(ones)[1] for _ in range(3)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "pen-cloned-v1"])
def test_data_that_is_nowhere_or_half_written(tmp_path, monkeypatch, env_id):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))

    def no_network(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(td3_opt.minari, "download_dataset", no_network)
    data = tmp_path / "store" / MINARI[env_id] / "data"
    again = f"minari download --force {MINARI[env_id]}"
    for words in (("Three ways", "--dataset", "download", "no network"), ("cannot be read", again)):
        with pytest.raises(td3_opt.BadInput) as error:
            td3_opt.load_dataset(env_id, progress=False)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message
        data.mkdir(parents=True, exist_ok=True)
        (data / "main_data.hdf5").write_bytes(b"half")


def test_broken_minari_datasets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    dataset_id = "D4RL/antmaze/umaze-v1"
    collect(dataset_id, Walk(), [None, {"short": True}])
    load = minari.load_dataset

    def refused(episodes, *words, env_id="antmaze-umaze-v2"):
        monkeypatch.setattr(td3_opt.minari, "load_dataset", lambda _: episodes)
        with pytest.raises(td3_opt.BadInput) as error:
            td3_opt.load_dataset(env_id, dataset_id, progress=False)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    episodes = list(load(dataset_id))
    refused([], "holds no episodes", "write another")
    short = dataclasses.replace(episodes[1], actions=episodes[1].actions[:2])
    refused([episodes[0], short], "different lengths", "mend that")
    cut = {key: column[:3] for key, column in episodes[1].observations.items()}
    refused([dataclasses.replace(episodes[1], observations=cut)], "different lengths")
    vectors = dataclasses.replace(episodes[1], observations=episodes[1].observations["observation"])
    refused([vectors], "no AntMaze dataset", "antmaze-umaze-v2")
    refused(episodes, "dict observations", env_id="pen-cloned-v1")


def test_data_of_another_maze_is_refused(tmp_path, monkeypatch):
    """D4RL's origin is the start cell; umaze data in the large maze walks through its walls."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/antmaze/umaze-v1", Walk(), [None] * 4)
    data, _ = td3_opt.load_dataset("antmaze-umaze-v2", progress=False)
    shifted = data._replace(observations=data.observations + 4)
    args = td3_opt.resolve(td3_opt.Args(env_id="antmaze-umaze-v2", batch_size=8))
    td3_opt.check_dataset(data, td3_opt.make_env("antmaze-umaze-v2"), args)
    for wrong, env_id in ((shifted, "antmaze-umaze-v2"), (data, "antmaze-large-play-v2")):
        args.env_id = env_id
        with pytest.raises(td3_opt.BadInput, match="outside the maze"):
            td3_opt.check_dataset(wrong, td3_opt.make_env(env_id), args)


def test_minari_can_download():
    importlib.import_module("minari.storage.remotes.huggingface")  # Minari's default remote; an extra of its


@pytest.mark.parametrize("name", ["td3_opt", "spot_opt", "iql_opt", "rlpd_opt"])
def test_rewards_that_agents_train_on(name):
    """r - 1 on AntMaze; Adroit's as they are."""
    script = importlib.import_module(name)
    zeros, ones = np.zeros((2, 1)), np.ones((2, 1))
    data = script.Transitions(zeros, zeros, np.array([0.0, 1.0]), ones, np.zeros(2))
    for env_id in script.ANTMAZE_TASKS:
        assert script.reward_transform(env_id, data) == (1.0, -1.0)
    for env_id in script.ADROIT_TASKS:
        assert script.reward_transform(env_id, data) == (1.0, 0.0)


@pytest.mark.parametrize("keep", [True, False], ids=["told at every step", "told at a success alone"])
def test_success_on_the_last_step_counts_and_early_success_is_kept(keep):
    class Tries(gym.Env):
        """Episodes of three steps: success on the last one, on the first one, never."""

        observation_space = action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        episode, keep = -1, None

        def reset(self, **_):
            self.episode, self.steps = self.episode + 1, 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            success = self.steps == {0: 3, 1: 1}.get(self.episode)
            info = {"success": success} if self.keep or success else {}
            return np.zeros(1, np.float32), 0.0, False, self.steps == 3, info

    policy = td3_opt.Policy(td3_opt.Actor(1, 1))
    env = Tries()
    env.keep = keep
    result = td3_opt.evaluate(policy, env, "antmaze-umaze-v2", 4, 0)
    assert result["success_rate"] == 0.5 and result["length_mean"] == 3


def test_antmaze_trains_on_minus_one_a_step_and_is_scored_by_success(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/antmaze/umaze-v1", Walk(), [None] * 4)
    buffers, create = [], td3_opt.ReplayBuffer.__init__

    def watch(self, data, *rest):
        buffers.append(self)
        create(self, data, *rest)

    monkeypatch.setattr(td3_opt.ReplayBuffer, "__init__", watch)
    short = dict(offline_steps=1, online_steps=4, n_tau=2, n_pretrain=1, batch_size=8, eval_episodes=1, eval_freq=0)
    args = td3_opt.Args(env_id="antmaze-umaze-v2", run_dir=str(tmp_path / "run"), progress=False, utd=1, **short)
    assert td3_opt.train(args).score == 0
    stored = buffers[0][torch.arange(52)]
    assert stored.rewards[:48].reshape(4, 12).tolist() == [[-1] * 11 + [0]] * 4
    assert stored.rewards[48:].tolist() == [-1] * 4
    last = (tmp_path / "run" / "evals.csv").read_text().splitlines()[-1].split(",")
    assert last[3] == "0.0" and last[7] == "0.0"
    paper = td3_opt.resolve(td3_opt.Args(env_id="antmaze-umaze-v2"))
    assert (paper.eval_episodes, paper.eval_freq) == (100, 50_000)
