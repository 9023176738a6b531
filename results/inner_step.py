"""What Eq. 3's inner step does to the critics that td3_opt.py trained on a MuJoCo task, and to a fresh one.

usage: python results/inner_step.py FILE     FILE: a run's offline.pt, or its checkpoint.pt while it is under way

For batches of the dataset, 256 transitions each: the TD loss of another batch before a plain gradient step on the first
one's, and after it, for step sizes alpha; and the largest eigenvalue of the first one's Hessian, by power iteration.
Along an eigenvector of positive curvature c, a gradient step lowers a quadratic loss only if alpha c < 2.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.func import functional_call

sys.path.append(str(Path(__file__).resolve().parents[1] / "algorithms"))
from td3_opt import Actor, Critic, Transitions, load_dataset, smoothed_actions, td_loss, td_target

ALPHAS, BATCHES, POWER_STEPS = (3e-5, 3e-4), 20, 50


def largest_curvature(gradients: list[torch.Tensor], parameters: list[torch.Tensor]) -> float:
    """Largest eigenvalue, in absolute value, of the Hessian whose loss has these `gradients` (with their graph)."""
    vector, curvature = [torch.randn_like(p) for p in parameters], 0.0
    for _ in range(POWER_STEPS):
        norm = sum(v.square().sum() for v in vector).sqrt()
        vector = [v / norm for v in vector]
        product = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
        image = torch.autograd.grad(product, parameters, retain_graph=True)
        curvature = sum((v * i).sum() for v, i in zip(vector, image, strict=True)).item()
        vector = list(image)
    return curvature


def main(path: Path) -> None:
    saved = torch.load(path, weights_only=True, map_location="cpu")
    if "actor_target" not in saved.get("parts", {}):
        sys.exit(f"{path} cannot be trained on: write a run's offline.pt, or its checkpoint.pt while it is under way")
    args, parts = saved["args"], saved["parts"]
    dataset = load_dataset(args["env_id"], args["dataset"])[0]
    mean, std = saved["data"]["observation_mean"], saved["data"]["observation_std"]
    sizes, noise = (len(mean), dataset.actions.shape[1]), SimpleNamespace(**args)
    actor = Actor(*sizes)
    actor.load_state_dict(parts["actor_target"])
    torch.manual_seed(0)
    fresh = Critic(*sizes)
    critics, rng = {"fresh": (fresh, copy.deepcopy(fresh))}, np.random.default_rng(0)
    for name in ("q_off", "q_on"):
        if name in parts:
            critics[name] = Critic(*sizes), Critic(*sizes)
            for critic, part in zip(critics[name], (name, f"{name}_target"), strict=True):
                critic.load_state_dict(parts[part])

    def sample() -> Transitions:
        rows = rng.integers(len(dataset.rewards), size=args["batch_size"])
        batch = Transitions(*(torch.as_tensor(column[rows]) for column in dataset))
        return batch._replace(
            observations=(batch.observations - mean) / std, next_observations=(batch.next_observations - mean) / std
        )

    for name, (critic, critic_target) in critics.items():
        rows = []
        for _ in range(BATCHES):
            (batch, target), (other, other_target) = (
                (b, td_target(critic_target, b, smoothed_actions(actor, b.next_observations, noise), args["gamma"]))
                for b in (sample(), sample())
            )
            parameters = dict(critic.named_parameters())
            loss = td_loss(critic(batch.observations, batch.actions), target)
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            rows.append([largest_curvature(gradients, list(parameters.values()))])
            for alpha in (0, *ALPHAS):
                stepped = {n: p - alpha * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
                after = functional_call(critic, stepped, (other.observations, other.actions))
                rows[-1].append(td_loss(after, other_target).item())
        curvature, before, *after = np.median(rows, axis=0)
        losses = ", ".join(f"{a:.1f} after a step of {alpha}" for alpha, a in zip(ALPHAS, after, strict=True))
        print(f"{name}, medians of {BATCHES}: curvature {curvature:.0f}; loss {before:.1f}, {losses}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python results/inner_step.py FILE, where FILE is an offline.pt or checkpoint.pt")
    main(Path(sys.argv[1]))
