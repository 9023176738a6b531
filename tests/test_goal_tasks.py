"""AntMaze and Adroit: D4RL's rewards and environments on Minari's data."""

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
    assert td3_opt.antmaze_goal(env_id).tolist() == list(goal)
    env = td3_opt.make_env(env_id)
    for seed in range(100):
        observation, _ = env.reset(seed=seed)
        assert observation.shape == (29,) and env.unwrapped.goal.tolist() == list(goal)
        assert np.linalg.norm(observation[:2] - start) < 0.6  # the ant's own joints are shaken by 0.1
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


class Walk(gym.Env):
    """An ant that walks up along x = -4 from y = -4, one metre a step: at the goal (-4, 4) at the eighth step.

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
        numbers = 100.0 + np.arange(27) + self.y
        return {"observation": numbers, "achieved_goal": np.array([-4, self.y]), "desired_goal": np.array([-4.0, 0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.y, self.length = -4.0, 3 if options else 12
        return self.look(), {}

    def step(self, action):
        self.y, self.length = self.y + 1, self.length - 1
        return self.look(), float(self.y == 0), False, self.length == 0, {}


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
    data = td3_opt.load_dataset("antmaze-umaze-v2", progress=False)
    # the first episode ends at its eighth step, the second one is cut after three
    assert data.rewards.tolist() == [0] * 7 + [1] + [0] * 3
    assert data.terminals.tolist() == [0] * 7 + [1] + [0] * 3
    heights = np.r_[np.arange(-4, 4), np.arange(-4, -1)]
    expected = np.hstack([np.full((11, 1), -4), heights[:, None], 100 + np.arange(27) + heights[:, None]])
    np.testing.assert_array_equal(data.observations, expected)
    np.testing.assert_array_equal(data.next_observations[:, 1], heights + 1)
    assert data.actions.shape == (11, 8) and data.observations.dtype == np.float32
    monkeypatch.setattr(td3_opt.minari, "load_dataset", lambda *_: pytest.fail("the flat copy was not used"))
    again = td3_opt.load_dataset("antmaze-umaze-v2", progress=False)
    np.testing.assert_array_equal(again.observations, data.observations)
    minari.delete_dataset("D4RL/antmaze/umaze-v1")  # the flat copy does without it
    assert len(td3_opt.load_dataset("antmaze-umaze-v2", progress=False).rewards) == 11


def test_a_newer_version_is_taken_where_the_named_one_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    assert td3_opt.minari_id("antmaze-large-diverse-v2") == "D4RL/antmaze/large-diverse-v1"
    assert td3_opt.minari_id("pen-cloned-v1") == "D4RL/pen/cloned-v2"
    (tmp_path / "store" / "D4RL" / "pen" / "cloned-v3" / "data").mkdir(parents=True)
    (tmp_path / "store" / "D4RL" / "antmaze" / "umaze-v2" / "data").mkdir(parents=True)
    assert td3_opt.minari_id("pen-cloned-v1") == "D4RL/pen/cloned-v3"
    assert td3_opt.minari_id("antmaze-umaze-v2") == "D4RL/antmaze/umaze-v2"
    (tmp_path / "store" / "D4RL" / "pen" / "cloned-v2" / "data").mkdir(parents=True)
    assert td3_opt.minari_id("pen-cloned-v1") == "D4RL/pen/cloned-v2"


@pytest.mark.parametrize(
    "env_id, dimensions, limit", [("pen-cloned-v1", (45, 24), 100), ("door-cloned-v1", (39, 28), 200)]
)
def test_adroit(tmp_path, monkeypatch, env_id, dimensions, limit):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    env = td3_opt.make_env(env_id)
    assert (*env.observation_space.shape, *env.action_space.shape) == dimensions
    assert env.spec.max_episode_steps == limit and td3_opt.make_env(env_id).action_space.high.max() == 1
    collect(f"D4RL/{env_id.split('-')[0]}/cloned-v2", gym.make(env.spec.id, max_episode_steps=7), [None, None])
    data = td3_opt.load_dataset(env_id, progress=False)
    assert len(data.rewards) == 14 and data.terminals.sum() == 0 and len(set(data.rewards.tolist())) > 5
    np.testing.assert_array_equal(data.observations[1:7], data.next_observations[:6])


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "pen-cloned-v1"])
def test_data_that_is_nowhere_or_half_written(tmp_path, monkeypatch, capsys, env_id):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))

    def no_network(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(td3_opt.minari, "download_dataset", no_network)
    data = tmp_path / "store" / td3_opt.minari_id(env_id) / "data"
    for words in (("Three ways", "--dataset", "download", "no network"), ("cannot be read", "delete it")):
        with pytest.raises(SystemExit) as error:
            td3_opt.load_dataset(env_id, progress=False)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and all(word in message for word in words), message
        data.mkdir(parents=True, exist_ok=True)
        (data / "main_data.hdf5").write_bytes(b"half")


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
    assert td3_opt.train(args) == 0
    stored = buffers[0][torch.arange(36)]
    assert stored.rewards[:32].reshape(4, 8).tolist() == [[-1] * 7 + [0]] * 4
    assert stored.rewards[32:].tolist() == [-1] * 4
    last = (tmp_path / "run" / "evals.csv").read_text().splitlines()[-1].split(",")
    assert last[3] == "0.0" and last[7] == "0.0"
    paper = td3_opt.resolve(td3_opt.Args(env_id="antmaze-umaze-v2"))
    assert (paper.eval_episodes, paper.eval_freq) == (100, 50_000)
