"""What a run's critics say, beside its policy's discounted returns: td3_opt.py on MuJoCo, cal_ql.py on AntMaze.

usage: python results/monte_carlo.py FILE [EPISODES]

FILE is a run's model.pt, its offline.pt, or, before its end, checkpoint.pt; EPISODES are 20 unless given. The policy
acts without noise (Cal-QL's critics are of its samples, of ten the best). Values are those that the policy is trained
on: of TD3 the first critic's (Eq. 4), of Cal-QL the smaller one; in units of the rewards that the agent trains on. Of
a roll-out that is cut off, the last 400 steps are left out: what follows a step by more counts less than 2%
(0.99^400). For Cal-QL also the dataset's returns, which bound its critics and are of other policies, and the values in
its states, of its actions and of the policy's, for episodes with and without success.
"""

import importlib
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "algorithms"))

CUT = 400


def discounted_returns(rewards: list[float], gamma: float) -> np.ndarray:
    """sum_k gamma^k r_{t+k} for each step t, [T]."""
    returns, following = np.empty(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + gamma * following
    return returns


def compare(name: str, values: np.ndarray, returns: np.ndarray) -> None:
    error, correlation = values - returns, np.corrcoef(values, returns)[0, 1]
    rmse = np.sqrt(np.mean(error**2))
    print(f"{name}: mean {values.mean():.1f}, bias {error.mean():.1f}, rmse {rmse:.1f}, corr {correlation:.2f}")


@torch.no_grad()
def main(path: Path, episodes: int) -> None:
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model, data = (saved, saved) if "parts" not in saved else (saved["parts"], saved["data"])
    if "actor" not in model or saved.get("script", "td3_opt.py") not in ("td3_opt.py", "cal_ql.py"):
        sys.exit(f"{path} has no actor of td3_opt.py or cal_ql.py")
    script = importlib.import_module("cal_ql" if "calibration" in saved["args"] else "td3_opt")
    args = script.Args(**{name: x for name, x in saved["args"].items() if name in script.Args.__annotations__})
    mean, std = data["observation_mean"], data["observation_std"]
    scale, shift = script.reward_transform(args.env_id, None)  # None: of these two scripts it does not ask the data
    agent = script.Agent(args, len(mean), data["action_dim"], torch.device("cpu"))
    critics = {name: getattr(agent, name) for name in ("q_off", "q_on", "q") if name in model}
    for name, network in {"actor": agent.actor, **critics}.items():
        network.load_state_dict(model[name])
    env = gym.wrappers.RescaleAction(script.make_env(args.env_id), np.float32(-1), np.float32(1))
    states, actions, returns, scores = [], [], [], []
    for episode in range(episodes):
        observation, rewards, terminated, truncated = env.reset(seed=5_000_000 + episode)[0], [], False, False
        start = len(states)
        while not (terminated or truncated):
            states.append((torch.as_tensor(observation, dtype=torch.float32) - mean) / std)
            actions.append(agent.actor(states[-1][None])[0])
            observation, reward, terminated, truncated, _ = env.step(actions[-1].numpy())
            rewards.append(float(reward))
        kept = len(rewards) if terminated else max(0, len(rewards) - CUT)
        del states[start + kept :], actions[start + kept :]
        returns.append(discounted_returns([scale * reward + shift for reward in rewards], args.gamma)[:kept])
        scores.append(sum(rewards))
    returns = np.concatenate(returns)
    if not states:
        sys.exit(f"all {episodes} roll-outs were cut off within {CUT} steps")
    print(f"{path}: return {np.mean(scores):.1f} (std {np.std(scores):.1f}, {episodes} episodes)")
    print(f"discounted return of {len(returns)} steps: mean {returns.mean():.1f}, std {returns.std():.1f}")
    for name, critic in critics.items():
        values = critic(torch.stack(states), torch.stack(actions))
        compare(name, (values.amin(0) if name == "q" else values[0]).numpy(), returns)
    if "q" in critics:
        dataset, _ = script.load_dataset(args.env_id, args.dataset)
        episodes = np.split(scale * dataset.rewards + shift, script.episode_starts(dataset)[1:])
        returns = np.concatenate([script.returns_to_go(args, episode) for episode in episodes])
        reached = np.concatenate([np.full(len(episode), episode.max() > shift) for episode in episodes])
        for where, rows in (("with", np.flatnonzero(reached)), ("without", np.flatnonzero(~reached))):
            rows = np.random.default_rng(0).permutation(rows)[:20_000]
            states, g = (torch.from_numpy(dataset.observations[rows]) - mean) / std, returns[rows]
            print(f"the data's episodes {where} success, {len(rows)} rows: return mean {g.mean():.1f}")
            for whose, chosen in (("its", torch.from_numpy(dataset.actions[rows])), ("pi's", agent.actor(states))):
                values = agent.q(states, chosen).amin(0).numpy()
                print(f"  q of {whose} actions: mean {values.mean():.1f}, below the return {np.mean(values < g):.0%}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python results/monte_carlo.py FILE [EPISODES], where FILE is a run's .pt")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 20)
