# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari==0.5.4", "huggingface_hub==2.4.0", "h5py==3.16.0", "tyro==1.0.17", "tqdm==4.70.1", "tensorboard==2.21.0",
#     "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""TD3+OPT: Online Pre-Training for offline-to-online reinforcement learning (OPT, ICML 2025) on TD3.

usage: python td3_opt.py --env-id hopper-random-v2            TD3+BC offline, then OPT
       python td3_opt.py --env-id hopper-random-v2 --no-opt   the vanilla backbone: TD3+BC, then TD3

How to read this file: first the algorithm, in the order of the paper, down to `train`. Then, from the banner on, the
same text in every script: replay buffer, tasks and data, the run's folder; it has nothing of OPT.

Equation, table and section numbers are those of the OPT paper. The backbone is TD3+BC (Fujimoto & Gu 2021) offline and
TD3 (Fujimoto et al. 2018) online; balanced replay is that of Off2On (Lee et al. 2022) and its code. A line marked
[choice] decides something on which the paper is silent.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import hashlib
import http.client
import importlib.metadata
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Arguments ============================================================================================================


@dataclasses.dataclass
class Args:
    """TD3+OPT. Defaults are the paper's protocol; None stands for the paper's value for this task."""

    # task
    env_id: str = "hopper-random-v2"  # a D4RL task, or any Gymnasium id with Box spaces together with --dataset
    dataset: str | None = None  # a D4RL-style .hdf5 file or a Minari id; None: D4RL's own data for the task
    seed: int = 0  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA where there is one
    compile: bool | None = None  # compile the gradient step; None: in runs of 100,000 and more, if that works here
    # phases
    opt: bool = True  # --no-opt: the vanilla backbone, offline then online: no Q_on, and no use for the flags of OPT
    offline_steps: int = 1_000_000  # gradient steps of offline pre-training
    online_steps: int = 300_000  # environment steps of the online phase, the first n_tau included
    n_tau: int = 25_000  # environment steps collected with the offline policy before online pre-training (Section 4.1)
    n_pretrain: int = 50_000  # gradient steps of online pre-training (Section 4.1)
    utd: int = 5  # gradient steps per environment step of online fine-tuning
    # OPT
    kappa_init: float | None = None  # weight of Q_on in the policy at first; MuJoCo: random 1, medium 0.3; else 0.1
    kappa_end: float | None = None  # weight of Q_on from kappa_decay steps on; Table 15: random 1, else 0.9
    kappa_decay: int | None = None  # T_decay: medium(-replay) 150k, AntMaze 100k/200k, Adroit 250k, else online_steps/2
    q_on_init: Literal["meta", "random", "online", "joint"] = "meta"  # Fig. 5: Eq. 3, nothing, B_on only, or Eq. 10
    q_on: bool = True  # --no-q-on (Fig. 7): phase 2 trains Q_off, and the policy follows Q_off alone
    meta_lr: float = 3e-4  # step size of the inner step of Eq. 3 (alpha; OEMA's code)
    meta_second_order: bool = False  # differentiate through the inner step: Eq. 3 to the letter; not OEMA's code
    replay: Literal["balanced", "online", "symmetric", "uniform"] | None = None  # None: balanced, with --no-opt uniform
    init_online_fraction: float = 0.5  # share of online samples at the start of balanced replay [choice]
    # TD3
    batch_size: int = 256  # transitions per batch; from each buffer in online pre-training
    learning_rate: float = 3e-4  # of every Adam optimiser but the density ratio's
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    policy_frequency: int = 2  # gradient steps per update of policy and targets
    policy_noise: float = 0.2  # standard deviation of target policy smoothing, for actions in [-1, 1]
    noise_clip: float = 0.5  # bound of target policy smoothing
    exploration_noise: float = 0.1  # standard deviation of the noise on online actions
    collect_noise: float | None = None  # the same of the n_tau steps, 0 in OEMA's code; None: exploration_noise
    bc_alpha: float = 2.5  # TD3+BC's trade-off: lambda = bc_alpha / mean|Q|
    normalize_states: bool = True  # by the dataset's mean and std, offline and online (TD3+BC's code; TD3's does not)
    # evaluation
    eval_freq: int | None = None  # (environment) steps between two; 0: ends of phases; None: 5,000, on AntMaze 50,000
    eval_episodes: int | None = None  # episodes of an evaluation; None: 10, on AntMaze 100 (CORL)
    snapshots: bool = False  # keep a model at each evaluation, for `report.py bias` (Figs. 9, 10)
    capture_video: bool = False  # write an mp4 of one evaluation episode at the end
    # folder
    exp_name: str | None = None  # name of the variant in the run's folder; None: td3_opt or td3
    run_dir: str | None = None  # the run's folder; None: runs/<env_id>__<exp_name>__<seed>
    offline_from: str | None = None  # start at phase 2 from the offline.pt of another run of the same task and seed
    checkpoint_freq: int = 50_000  # gradient (collecting: environment) steps between two; 0: only on Ctrl-C, SIGTERM
    resume: bool = False  # go on from the run folder's checkpoint; from the beginning where there is none yet
    save_model: bool = True  # write model.pt at the end
    # logging
    progress: bool = True  # show progress bars; else, and where there is no terminal, a line an evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "opt"  # W&B project
    wandb_entity: str | None = None  # W&B team or user


PHASES = ("start", "offline", "collect", "online_pretrain", "online_finetune", "done")
OFFLINE_ARGS = """env_id seed offline_steps batch_size learning_rate gamma tau policy_frequency policy_noise noise_clip
    bc_alpha normalize_states""".split()  # what offline.pt depends on
BOUNDS = {  # what an error says: (arguments, test)
    "0 or more": ("offline_steps online_steps n_tau n_pretrain eval_freq checkpoint_freq", lambda x: x >= 0),
    "a whole number from 0 to 4294967295": ("seed kappa_decay", lambda x: 0 <= x < 2**32),
    "1 or more": ("utd batch_size eval_episodes policy_frequency", lambda x: x >= 1),
    "a number from 0 to 1": ("kappa_init kappa_end gamma tau", lambda x: 0 <= x <= 1),
    "a number between 0 and 1": ("init_online_fraction", lambda x: 0 < x < 1),
    "a positive number": ("learning_rate meta_lr bc_alpha", lambda x: 0 < x < math.inf),
    "a number, 0 or more": ("policy_noise noise_clip exploration_noise collect_noise", lambda x: 0 <= x < math.inf),
}
# Table 15: kappa_init, T_decay in environment steps, kappa_end. With constant kappa = 1, T_decay does not matter.
KAPPA_SCHEDULES = {
    "(halfcheetah|hopper|walker2d)-random-v2": (1.0, 0, 1.0),
    "(halfcheetah|hopper|walker2d)-medium-v2": (0.3, 150_000, 0.9),
    "(halfcheetah|hopper|walker2d)-medium-replay-v2": (0.1, 150_000, 0.9),
    "antmaze-large-diverse-v2": (0.1, 200_000, 0.9),
    "antmaze-.*-v2": (0.1, 100_000, 0.9),
    "(pen|hammer|door|relocate)-cloned-v1": (0.1, 250_000, 0.9),
}


def kappa_schedule(env_id: str, online_steps: int) -> tuple[float, int, float]:
    """Table 15's (kappa_init, T_decay, kappa_end); for any other task 0.1 to 0.9 over half of online_steps [choice]."""
    found = (schedule for task, schedule in KAPPA_SCHEDULES.items() if re.fullmatch(task, env_id))
    return next(found, (0.1, online_steps // 2, 0.9))


def kappa_at(step: int, kappa_init: float, kappa_end: float, kappa_decay: int) -> float:
    """Weight of Q_on at an environment step of the online phase: linear over kappa_decay, then constant (Table 15)."""
    return kappa_init + (kappa_end - kappa_init) * min(1.0, step / kappa_decay if kappa_decay else 1.0)


def kappa_values(args: Args) -> dict:
    """Kappa's arguments for this task where they are not given; 0 without Q_on."""
    init, decay, end = kappa_schedule(args.env_id, args.online_steps) if args.opt and args.q_on else (0.0, 0, 0.0)
    if decay == 0 and (args.kappa_init, args.kappa_end) != (None, None):
        decay = args.online_steps // 2  # the random sets' constant kappa has no T_decay [choice]
    return {"kappa_init": init, "kappa_decay": decay, "kappa_end": end}


def paper_values(args: Args) -> dict:
    """The paper's values for this task of the arguments that are None."""
    name, replay = ("td3_opt", "balanced") if args.opt else ("td3", "uniform")  # uniform: [choice]
    return {"exp_name": name, "replay": replay, "collect_noise": args.exploration_noise} | kappa_values(args)


def check(args: Args) -> None:
    """Refuse arguments that do not go together."""
    n_tau, limit = args.n_tau, f"less than --online-steps ({args.online_steps})"
    require(not args.opt or 0 < n_tau < args.online_steps, f"--n-tau is {n_tau}: write 1 or more, and {limit}")
    allowed = (args.opt and args.q_on) or args.kappa_init == args.kappa_end == args.kappa_decay == 0
    require(allowed, "--kappa-* weight Q_on, which --no-opt and --no-q-on do without: leave them out")
    what = "--replay balanced starts from what only OPT collects: write --replay uniform with --no-opt"
    require(args.opt or args.replay != "balanced", what)
    even = args.replay != "symmetric" or args.batch_size % 2 == 0
    require(even, "--replay symmetric takes half a batch from each buffer: write an even --batch-size")


def reward_transform(env_id: str, dataset: Transitions) -> tuple[float, float]:
    """Scale and shift of the rewards that the agent trains on, offline and online; scores count the task's own."""
    return 1.0, -1.0 if env_id in ANTMAZE_TASKS else 0.0  # AntMaze: -1 a step until the goal is reached


# Networks =============================================================================================================


class Actor(nn.Module):
    """pi(s) in [-1, 1]: observations [B, observation_dim] to actions [B, action_dim]."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        hidden = [nn.Linear(observation_dim, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
        self.network = nn.Sequential(*hidden, nn.Linear(256, action_dim), nn.Tanh())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.network(observations)


class EnsembleLinear(nn.Module):
    """`members` linear layers (nn.Linear's init) in one call, [members, B, inputs] to [members, B, outputs].
    [B, inputs] to [B, outputs] is the first member alone."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if x.dim() == 2:  # p[0]'s backward pass fills a gradient of zeros for all members, squeeze's does not
            weight, bias = (p.squeeze(0) if len(p) == 1 else p[0] for p in (weight, bias))
        if weight.shape[-1] == 1:  # a dot product a row: several times faster than a product with a one-column matrix
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        if x.dim() == 2:  # a batched product uses one thread a member
            return torch.addmm(bias, x, weight)
        return torch.baddbmm(bias, x, weight)


class Critic(nn.Module):
    """Twin Q(s,a): observations [B, observation_dim], actions [B, action_dim] to values [2, B]."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        sizes = ((observation_dim + action_dim, 256), (256, 256), (256, 1))
        self.layers = nn.ModuleList(EnsembleLinear(2, *size) for size in sizes)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor, first_only: bool = False) -> torch.Tensor:
        """Values of both critics; with `first_only` [1, B], of the first."""
        x = torch.cat([observations, actions], 1)
        x = x if first_only else x.expand(2, -1, -1)
        x = self.layers[0](x).relu_()
        x = self.layers[1](x).relu_()
        return self.layers[2](x).view(-1, len(observations))


def make_adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam with its state, so that a compiled step finds it."""
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True, capturable=parameters[0].is_cuda)
    for p in parameters:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
    return optimizer


@torch.no_grad()
def adam_step(optimizer: torch.optim.Adam, gradients: Iterable[torch.Tensor]) -> None:
    """A step of Adam. torch.compile cannot look into optimizer.step(): there, the same by its formula."""
    group = optimizer.param_groups[0]
    if not torch.compiler.is_compiling():
        for p, gradient in zip(group["params"], gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        return
    beta1, beta2 = group["betas"]
    for p, gradient in zip(group["params"], gradients, strict=True):
        step, mean, square = (optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))
        step += 1
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt() + group["eps"]
        p -= group["lr"] * mean / ((1 - beta1**step) * deviation)


def minimize(loss: torch.Tensor, optimizer: torch.optim.Adam) -> None:
    """One step of `optimizer` down `loss`; only its own parameters get gradients."""
    adam_step(optimizer, torch.autograd.grad(loss, optimizer.param_groups[0]["params"]))


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# TD3 and OPT: the equations ===========================================================================================


@torch.no_grad()
def smoothed_actions(actor_target: nn.Module, observations: torch.Tensor, args: Args) -> torch.Tensor:
    """TD3's target policy smoothing: pi'(s) + clip(noise), [B, action_dim]."""
    actions = actor_target(observations)
    noise = (torch.randn_like(actions) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
    return (actions + noise).clamp(-1, 1)


@torch.no_grad()
def td_target(q_target: nn.Module, batch: Transitions, next_actions: torch.Tensor, gamma: float) -> torch.Tensor:
    """The bracket of Eq. 2: r + gamma (1 - terminal) min_i Q'_i(s', a'), [B]."""
    next_values = q_target(batch.next_observations, next_actions).amin(0)
    return batch.rewards + gamma * (1 - batch.terminals) * next_values


def td_loss(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. 2 on values [members, B] and target [B]: mean squared error, summed over the ensemble."""
    return (values - target).square().mean(1).sum()


def meta_adaptation_loss(
    critic: nn.Module, offline_pair: tuple, online_pair: tuple, args: Args, loss: Callable = td_loss
) -> torch.Tensor:
    """Eq. 3: L_off(psi) + L_on(psi - alpha grad L_off(psi)), L being `loss` of the critic's values and a target.

    First order (OEMA's code): the inner gradient is a constant. Second order: Eq. 3 to the letter. A pair
    is (Transitions, target); no target is of adapted parameters: these serve L_on's prediction alone.
    """
    (offline, offline_target), (online, online_target) = offline_pair, online_pair
    parameters = dict(critic.named_parameters())
    offline_loss = loss(critic(offline.observations, offline.actions), offline_target)
    second_order, weights = args.meta_second_order, list(parameters.values())
    gradients = torch.autograd.grad(offline_loss, weights, retain_graph=True, create_graph=second_order)
    adapted = {name: p - args.meta_lr * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    online_loss = loss(functional_call(critic, adapted, (online.observations, online.actions)), online_target)
    return offline_loss + online_loss


def td3_bc_loss(values: torch.Tensor, pi: torch.Tensor, actions: torch.Tensor, bc_alpha: float) -> torch.Tensor:
    """TD3+BC, values [B], actions [B, action_dim]: -lambda mean Q + mean (pi(s) - a)^2, lambda = bc_alpha / mean|Q|."""
    return -bc_alpha / values.abs().mean().detach() * values.mean() + F.mse_loss(pi, actions)


def policy_value(critic: nn.Module, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The value that Eq. 4 takes from an ensemble: its first critic's, [B]."""
    return critic(observations, actions, first_only=True)[0]


def policy_loss(q_off: torch.Tensor | None, q_on: torch.Tensor | None, kappa: torch.Tensor | float) -> torch.Tensor:
    """Eq. 4 on values [B] of pi(s): -mean[(1 - kappa) Q_off + kappa Q_on]; a Q that never counts may be None."""
    if q_on is None or q_off is None:
        return -(q_off if q_on is None else q_on).mean()
    return -((1 - kappa) * q_off + kappa * q_on).mean()


# Balanced replay ======================================================================================================


class SumTree(nn.Module):
    """Draws leaves proportionally to their priorities: two levels, a node the sum of 128 leaves, in float64."""

    WIDTH = 128

    def __init__(self, capacity: int, device: torch.device):
        super().__init__()
        nodes = math.ceil(capacity / self.WIDTH)
        self.register_buffer("leaves", torch.zeros(nodes, self.WIDTH, dtype=torch.float64, device=device))
        self.register_buffer("nodes", torch.zeros(nodes, dtype=torch.float64, device=device))

    def set(self, leaves: torch.Tensor, priorities: torch.Tensor) -> None:
        """Give leaves [n] new priorities [n]. Sums are taken anew, not adjusted, so that no rounding piles up."""
        self.leaves.view(-1)[leaves] = priorities.double()
        nodes = leaves // self.WIDTH
        self.nodes[nodes] = self.leaves.index_select(0, nodes).sum(1)

    def sample(self, n: int) -> torch.Tensor:
        """n leaves [n], each with probability priority / total: one from each n-th part of the total (as Off2On)."""
        draws = torch.arange(n, device=self.nodes.device) + torch.rand(n, dtype=torch.float64, device=self.nodes.device)
        ends = self.nodes.cumsum(0)
        mass = draws * (ends[-1] / n * (1 - 1e-12))  # rounding must not lead past the last positive priority
        node = torch.searchsorted(ends, mass, right=True)
        mass -= (ends - self.nodes).index_select(0, node)  # what of it lies in the node
        ends = self.leaves.index_select(0, node).cumsum(1)
        mass = mass.clamp_(min=0).minimum(ends[:, -1] * (1 - 1e-12))  # nor to an empty leaf
        leaf = torch.searchsorted(ends, mass.unsqueeze(1), right=True).squeeze(1)
        return node * self.WIDTH + leaf


def density_ratio_loss(offline_ratio: torch.Tensor, online_ratio: torch.Tensor) -> torch.Tensor:
    """Negative Jensen-Shannon bound, least where w is the density ratio online / offline (Lee et al. 2022)."""
    offline_loss = -torch.log(2 / (offline_ratio + 1) + 1e-10)
    return (offline_loss - torch.log(2 * online_ratio / (online_ratio + 1) + 1e-10)).mean()


class BalancedReplay(nn.Module):
    """One prioritised buffer over B_off and B_on whose priorities follow the density ratio (Lee et al. 2022)."""

    TEMPERATURE, PRIORITY_MIN, PRIORITY_MAX = 5, 1e-3, 1e3  # Off2On

    def __init__(self, buffer: ReplayBuffer, batch_size: int, device: torch.device):
        super().__init__()
        self.buffer, self.batch_size = buffer, batch_size
        self.tree = SumTree(len(buffer.rows), device)
        inputs = sum(buffer.widths[:2])
        hidden = [nn.Linear(inputs, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
        self.ratio = nn.Sequential(*hidden, nn.Linear(256, 1), nn.ReLU()).to(device)
        for layer, bound in zip(self.ratio[::2], (1 / 16, 1 / 16, 3e-3), strict=True):  # Off2On's initial weights
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.constant_(layer.bias, float(layer is self.ratio[4]))
        self.optimizer = make_adam(self.ratio, 3e-4)
        # With a dimension: of a float64 number without one a compiled step loses the changes on the CPU (PyTorch 2.13)
        self.register_buffer("largest", torch.ones(1, dtype=torch.float64, device=device))

    def start(self, online_fraction: float) -> None:
        """Priority 1 offline; online such that a share `online_fraction` of the first samples is online."""
        online = self.buffer.n_offline * online_fraction / ((1 - online_fraction) * self.buffer.n_online)
        offline, leaves = self.buffer.n_offline, self.tree.leaves.view(-1)
        leaves[:offline], leaves[offline : offline + self.buffer.n_online] = 1.0, online
        self.tree.nodes.copy_(self.tree.leaves.sum(1))
        self.largest.fill_(max(1.0, online))

    def add(self, row: int) -> None:
        """A new online transition enters at the largest priority seen."""
        self.tree.set(torch.tensor([row], device=self.largest.device), self.largest)

    def density_ratio(self, batch: Transitions) -> torch.Tensor:
        """w(s,a) >= 0, an estimate of the online density over the offline one, [B]."""
        return self.ratio(torch.cat([batch.observations, batch.actions], 1)).squeeze(1)

    def update(self, rows: torch.Tensor, batch: Transitions) -> torch.Tensor:
        """A step of the density ratio on a uniform batch of each buffer, then new priorities for the rows used."""
        n = self.batch_size
        uniform = self.buffer[torch.cat([self.buffer.sample("offline", n), self.buffer.sample("online", n)])]
        offline_ratio, online_ratio = self.density_ratio(uniform).split(n)
        loss = density_ratio_loss(offline_ratio, online_ratio)
        minimize(loss, self.optimizer)
        with torch.no_grad():
            scale = offline_ratio.pow(1 / self.TEMPERATURE).mean() + 1e-10
            priorities = self.density_ratio(batch).pow(1 / self.TEMPERATURE) / scale
            priorities = priorities.clamp(self.PRIORITY_MIN, self.PRIORITY_MAX).double()
            self.tree.set(rows, priorities)
            torch.maximum(self.largest, priorities.max(), out=self.largest)
        return loss


# The agent and the three phases (Algorithm 1) =========================================================================


class Agent:
    """Networks, targets and optimisers. Q_on has a seed of its own, so that every variant shares one offline phase."""

    def __init__(self, args: Args, observation_dim: int, action_dim: int, device: torch.device):
        torch.manual_seed(args.seed)
        self.actor = Actor(observation_dim, action_dim).to(device)
        self.q_off = Critic(observation_dim, action_dim).to(device)
        self.actor_target, self.q_off_target = copy.deepcopy(self.actor), copy.deepcopy(self.q_off)
        self.actor_optimizer = make_adam(self.actor, args.learning_rate)
        self.q_off_optimizer = make_adam(self.q_off, args.learning_rate)
        self.offline_parts = dict(vars(self))  # what offline.pt holds
        if args.opt and args.q_on:
            torch.manual_seed(args.seed + 1_000)
            self.q_on = Critic(observation_dim, action_dim).to(device)
            self.q_on_target = copy.deepcopy(self.q_on)
            self.q_on_optimizer = make_adam(self.q_on, args.learning_rate)

    def parts(self) -> dict:
        """Every network and optimiser by name."""
        return {name: part for name, part in vars(self).items() if name != "offline_parts"}

    def critic(self, name: str) -> tuple[nn.Module, nn.Module, torch.optim.Adam]:
        """A value function ("q_off" or "q_on"), its target and its optimiser."""
        if name == "q_off":
            return self.q_off, self.q_off_target, self.q_off_optimizer
        return self.q_on, self.q_on_target, self.q_on_optimizer


def offline_pretrain(args: Args, run: Run, agent: Agent, buffer: ReplayBuffer) -> None:
    """Phase 1: TD3+BC on B_off."""

    @accelerate(args.compile)
    def update(update_policy: bool) -> dict:
        batch = buffer[buffer.sample("offline", args.batch_size)]
        next_actions = smoothed_actions(agent.actor_target, batch.next_observations, args)
        target = td_target(agent.q_off_target, batch, next_actions, args.gamma)
        values = agent.q_off(batch.observations, batch.actions)
        q_off_loss = td_loss(values, target)  # Eq. 2
        minimize(q_off_loss, agent.q_off_optimizer)
        metrics = {"q_off_loss": q_off_loss, "q_off_data_mean": values.mean()}
        if update_policy:
            actions = agent.actor(batch.observations)
            values = policy_value(agent.q_off, batch.observations, actions)
            actor_loss = td3_bc_loss(values, actions, batch.actions, args.bc_alpha)
            minimize(actor_loss, agent.actor_optimizer)
            soft_update(agent.q_off_target, agent.q_off, args.tau)
            soft_update(agent.actor_target, agent.actor, args.tau)
            metrics |= {"actor_loss": actor_loss, "q_off_mean": values.mean()}
        return metrics

    for step in run.loop("offline", args.offline_steps, gradient=1):
        run.metrics |= update((step + 1) % args.policy_frequency == 0)


def explore(policy: Policy, observation: np.ndarray, noise: float) -> np.ndarray:
    """The policy's action with Gaussian exploration noise, in [-1, 1]."""
    action = policy(observation)
    return np.clip(action + noise * torch.randn(action.shape).numpy(), -1, 1)


def collect(args: Args, run: Run, collector: Collector) -> None:
    """Phase 2, first part: N_tau transitions with pi_off, by default with the noise of every online action [choice]."""
    for _ in run.loop("collect", args.n_tau, env=1, scores="never"):
        collector.step(explore(run.policy, collector.observation, args.collect_noise))


def online_pretrain(args: Args, run: Run, agent: Agent, buffer: ReplayBuffer) -> None:
    """Phase 2, second part: N_pretrain gradient steps on Q_on (with --no-q-on, Q_off) alone; all else is frozen."""
    name = "q_on" if args.q_on else "q_off"
    critic, critic_target, optimizer = agent.critic(name)

    @accelerate(args.compile)
    def update(update_target: bool) -> dict:
        n = args.batch_size
        batch = buffer[torch.cat([buffer.sample("offline", n), buffer.sample("online", n)])]
        # The target policy is the offline phase's, held still [choice]
        next_actions = smoothed_actions(agent.actor_target, batch.next_observations, args)
        offline_target, online_target = td_target(critic_target, batch, next_actions, args.gamma).split(n)
        offline, online = Transitions(*(x[:n] for x in batch)), Transitions(*(x[n:] for x in batch))
        if args.q_on_init == "meta":
            loss = meta_adaptation_loss(critic, (offline, offline_target), (online, online_target), args)  # Eq. 3
        else:
            loss = td_loss(critic(online.observations, online.actions), online_target)
            if args.q_on_init == "joint":
                loss = loss + td_loss(critic(offline.observations, offline.actions), offline_target)  # Eq. 10
        minimize(loss, optimizer)
        if update_target:  # every second step, as TD3's [choice]
            soft_update(critic_target, critic, args.tau)
        return {f"{name}_pretrain_loss": loss}

    steps = 0 if args.q_on_init == "random" else args.n_pretrain  # random: N_tau is collected all the same [choice]
    for step in run.loop("online_pretrain", steps, gradient=1, scores="end"):
        run.metrics |= update((step + 1) % args.policy_frequency == 0)


def online_finetune(
    args: Args, run: Run, agent: Agent, buffer: ReplayBuffer, balanced: BalancedReplay | None, collector: Collector
) -> None:
    """Phase 3: act, store, utd gradient steps of Eq. 2 (Q_off, Q_on) and Eq. 4 (policy). Vanilla: TD3 on Q_off."""
    with_q_on = args.opt and args.q_on
    # With kappa = 1 throughout, Q_off never reaches the policy: it is not updated.
    with_q_off = not (with_q_on and args.kappa_init == args.kappa_end == 1)
    critics = {name: agent.critic(name) for name in ["q_off"] * with_q_off + ["q_on"] * with_q_on}
    kappa, before = torch.zeros((), device=run.device), args.n_tau if args.opt else 0

    @accelerate(args.compile)
    def update(update_policy: bool) -> dict:
        rows = balanced.tree.sample(args.batch_size) if balanced else buffer.sample(args.replay, args.batch_size)
        batch = buffer[rows]
        metrics = {"online_share": (rows >= buffer.n_offline).float().mean()}
        next_actions = smoothed_actions(agent.actor_target, batch.next_observations, args)
        for name, (critic, critic_target, optimizer) in critics.items():
            target = td_target(critic_target, batch, next_actions, args.gamma)
            critic_loss = td_loss(critic(batch.observations, batch.actions), target)  # Eq. 2, each with its own target
            minimize(critic_loss, optimizer)
            metrics[f"{name}_loss"] = critic_loss
        if update_policy:
            actions = agent.actor(batch.observations)
            values = {name: policy_value(critics[name][0], batch.observations, actions) for name in critics}
            actor_loss = policy_loss(values.get("q_off"), values.get("q_on"), kappa)  # Eq. 4
            minimize(actor_loss, agent.actor_optimizer)
            for critic, critic_target, _ in critics.values():
                soft_update(critic_target, critic, args.tau)
            soft_update(agent.actor_target, agent.actor, args.tau)
            metrics |= {"actor_loss": actor_loss, "q_mix_mean": -actor_loss}
            metrics |= {f"{name}_mean": q.mean() for name, q in values.items()}
        if balanced:
            metrics["density_ratio_loss"] = balanced.update(rows, batch)
        return metrics

    for step in run.loop("online_finetune", args.online_steps - before, env=1, gradient=args.utd):
        if step == 0 and balanced:
            balanced.start(args.init_online_fraction)
        run.policy.refresh()
        row = collector.step(explore(run.policy, collector.observation, args.exploration_noise))
        if balanced:
            balanced.add(row)
        if with_q_on:  # Table 15's environment steps are those of the online phase, the first n_tau included [choice]
            run.metrics["kappa"] = kappa_at(run.env_steps, args.kappa_init, args.kappa_end, args.kappa_decay)
            kappa.fill_(run.metrics["kappa"])
        for i in range(step * args.utd, (step + 1) * args.utd):
            run.metrics |= update((i + 1) % args.policy_frequency == 0)


def train(args: Args) -> Result:
    """Run all phases."""
    args = resolve(args)
    with contextlib.closing(Run(args)) as run:
        if run.phase == "done":
            return run.finish()
        tune(run)
        buffer = ReplayBuffer(run.load_data(reward_transform), args.online_steps, run.device)
        agent = Agent(args, *buffer.widths[:2], run.device)
        torch.manual_seed(args.seed + 2_000)
        balanced = BalancedReplay(buffer, args.batch_size, run.device) if args.replay == "balanced" else None
        collector = Collector(run.env, buffer, args.seed)
        replay = {"balanced": balanced, "ratio_optimizer": balanced.optimizer} if balanced else {}
        run.start(Policy(agent.actor), buffer, agent, collector=collector, **replay)

        offline_pretrain(args, run, agent, buffer)
        run.save_offline()
        if args.opt:
            collect(args, run, collector)
            online_pretrain(args, run, agent, buffer)
        online_finetune(args, run, agent, buffer, balanced, collector)
        return run.finish()


########################################################################################################################
# The same text in every script from here on: replay buffer, tasks and data, the run and its folder, speed. It knows
# nothing of the algorithm and takes Args, PHASES, BOUNDS, OFFLINE_ARGS, paper_values, check, Agent, train from above.
########################################################################################################################


class Transitions(NamedTuple):
    """N transitions in float32, a dataset's as arrays, a batch's as tensors. A time limit is not a terminal."""

    observations: np.ndarray | torch.Tensor  # [N, observation_dim]
    actions: np.ndarray | torch.Tensor  # [N, action_dim]; in a replay buffer scaled to [-1, 1]
    rewards: np.ndarray | torch.Tensor  # [N]
    next_observations: np.ndarray | torch.Tensor  # [N, observation_dim]
    terminals: np.ndarray | torch.Tensor  # [N], 1 where the episode ended by itself, else 0


class ReplayBuffer:
    """Offline and online data in one table on the training device, a row a transition: the dataset, then a ring."""

    def __init__(self, dataset: Transitions, online_capacity: int, device: torch.device):
        self.widths = [dataset.observations.shape[1], dataset.actions.shape[1], 1, dataset.observations.shape[1], 1]
        self.n_offline, self.online_capacity, self.n_online, self.added = len(dataset.rewards), online_capacity, 0, 0
        self.rows = torch.zeros(self.n_offline + online_capacity, sum(self.widths), device=device)
        for column, values in zip(self.rows[: self.n_offline].split(self.widths, 1), dataset, strict=True):
            column.copy_(torch.from_numpy(values).view(self.n_offline, -1))
        self.online_size = torch.zeros((), dtype=torch.float64, device=device)  # there a CUDA graph sees it grow

    def add(self, *transition) -> int:
        """Store one online transition (the fields of Transitions) over the oldest; returns its row."""
        row = self.n_offline + self.added % self.online_capacity
        self.rows[row].copy_(torch.from_numpy(np.hstack(transition).astype(np.float32)))
        self.added += 1
        self.n_online = min(self.added, self.online_capacity)
        self.online_size.fill_(self.n_online)
        return row

    def __getitem__(self, rows: torch.Tensor) -> Transitions:
        batch = Transitions(*self.rows.index_select(0, rows).split(self.widths, 1))
        return batch._replace(rewards=batch.rewards.squeeze(1), terminals=batch.terminals.squeeze(1))

    def sample(self, which: str, n: int) -> torch.Tensor:
        """n rows, uniformly, with replacement: "offline", "online", "uniform" of both, "symmetric" half of each."""
        if which == "symmetric":
            return torch.cat([self.sample("offline", n // 2), self.sample("online", n // 2)])
        if which == "offline":
            return torch.randint(self.n_offline, (n,), device=self.rows.device)
        first = self.n_offline if which == "online" else 0
        size = self.online_size + self.n_offline - first
        return first + (torch.rand(n, dtype=torch.float64, device=self.rows.device) * size).long()

    def some_states(self) -> dict[str, torch.Tensor]:
        """Some 2,000 observations each of the dataset and of the first and the last 10,000 online transitions (of
        fewer than 20,000 the halves)."""
        offline, online = self.rows[:, : self.widths[0]].split([self.n_offline, self.online_capacity])
        online, n = online[: self.n_online], max(1, min(10_000, self.n_online // 2))
        parts = {"offline": offline[:: max(1, self.n_offline // 2_000)], "first": online[:n:5], "last": online[-n::5]}
        return {name: part.cpu().clone() for name, part in parts.items()}

    def state_dict(self) -> dict:
        return {"added": self.added, "online_rows": self.rows[self.n_offline :][: self.n_online].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.n_online = state["added"], len(state["online_rows"])
        self.rows[self.n_offline :][: self.n_online] = state["online_rows"].to(self.rows.device)
        self.online_size.fill_(self.n_online)


class Collector:
    """Steps the training environment into the buffer. Every episode is reset from a seed of its own, so that a resumed
    run gets the environment's state back by repeating the unfinished episode's actions, the newest in the buffer."""

    def __init__(self, env: gym.Env, buffer: ReplayBuffer, seed: int):
        self.env, self.buffer, self.seed, self.episode = env, buffer, seed, -1
        self.reset()

    def reset(self) -> None:
        self.episode, self.episode_steps = self.episode + 1, 0
        seed = int(np.random.SeedSequence([self.seed, self.episode]).generate_state(1)[0])
        self.observation = self.env.reset(seed=seed)[0]
        self.require_finite(self.observation)

    def require_finite(self, *values: np.ndarray) -> None:
        """FloatingPointError, before anything is stored, if one is NaN or infinity, in the buffer's float32 too."""
        if not all(np.isfinite(np.float32(value)).all() for value in values):
            where = f"in step {self.episode_steps} of training episode {self.episode + 1}"
            raise FloatingPointError(f"the environment gave NaN or infinity {where}; {CHECKPOINT_KEPT}")

    def step(self, action: np.ndarray) -> int:
        """Take an action in [-1, 1], store the transition, return its row. Starts the next episode where one ends."""
        next_observation, reward, terminated, truncated, _ = self.env.step(action)
        self.episode_steps += 1
        self.require_finite(next_observation, reward)
        row = self.buffer.add(self.observation, action, reward, next_observation, terminated)
        self.observation = next_observation
        if terminated or truncated:
            self.reset()
        return row

    def state_dict(self) -> dict:
        return {"episode": self.episode, "episode_steps": self.episode_steps}

    def load_state_dict(self, state: dict) -> None:
        self.episode = state["episode"] - 1
        self.reset()
        for i in range(self.buffer.added - state["episode_steps"], self.buffer.added):
            row = self.buffer.rows[self.buffer.n_offline + i % self.buffer.online_capacity].cpu().numpy()
            _, action, _, stored, _ = np.split(row, np.cumsum(self.buffer.widths)[:-1])
            self.observation = self.env.step(action)[0]
            if not np.allclose(self.observation, stored, rtol=1e-3, atol=1e-3):
                what = "the environment does not repeat an episode from its seed and actions"
                print(f"{PROGRAM}: warning: {what}: other numbers than without the stop", file=sys.stderr)
                break
        self.episode_steps = state["episode_steps"]


class Policy:
    """The policy for acting: a CPU copy of the actor that `refresh` brings up to date (on the CPU the actor itself)."""

    def __init__(self, actor: nn.Module):
        self.source = actor
        self.actor = copy.deepcopy(actor).cpu() if next(actor.parameters()).is_cuda else actor

    @torch.no_grad()
    def refresh(self) -> None:
        if self.actor is not self.source:
            torch._foreach_copy_(list(self.actor.parameters()), list(self.source.parameters()))

    @torch.no_grad()
    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Observation [observation_dim] to action [action_dim]."""
        return self.actor(torch.from_numpy(observation).unsqueeze(0)).squeeze(0).numpy()


# Tasks: environments, data, evaluation ================================================================================

# Gymnasium's v5 has the dynamics of D4RL's -v2 tasks, Walker2d's with this model: v5's own has another foot friction.
MUJOCO_ENVS = {"halfcheetah": ("HalfCheetah-v5", {}), "hopper": ("Hopper-v5", {})}
MUJOCO_ENVS |= {"walker2d": ("Walker2d-v5", {"xml_file": "walker2d.xml"})}
MUJOCO_KINDS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
MUJOCO_TASKS = tuple(f"{env}-{kind}-v2" for env in MUJOCO_ENVS for kind in MUJOCO_KINDS)
# The ant's start and its goal as (row, column) of the maze's map; one each, as D4RL evaluates. Minari's data is of -v4.
ANTMAZE_ENVS = {"umaze": ("AntMaze_UMaze-v4", (3, 1), (1, 1)), "medium": ("AntMaze_Medium-v4", (1, 1), (6, 6))}
ANTMAZE_ENVS |= {"large": ("AntMaze_Large-v4", (1, 1), (7, 9))}
ANTMAZE_KINDS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
ANTMAZE_TASKS = tuple(f"antmaze-{kind}-v2" for kind in ANTMAZE_KINDS)
ANTMAZE_RADIUS = 0.45  # within it the goal is reached; gymnasium-robotics' own
ADROIT_LIMITS = {"pen": 100, "hammer": 200, "door": 200, "relocate": 200}  # D4RL's; pen is registered with 200
ADROIT_TASKS = tuple(f"{env}-cloned-v1" for env in ADROIT_LIMITS)
ADROIT_PALM = {"hammer": 33, "door": 29, "relocate": 33}  # in a state: palm, then object (of relocate, from the target)
TASKS = MUJOCO_TASKS + ANTMAZE_TASKS + ADROIT_TASKS
REFERENCE_RETURNS = {"halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3)}  # D4RL's (min, max)
REFERENCE_RETURNS |= {"walker2d": (1.629008, 4592.3), "antmaze": (0.0, 1.0), "pen": (96.262799, 3076.8331017826877)}
REFERENCE_RETURNS |= {"hammer": (-274.856578, 12794.134825156867), "door": (-56.512833, 2880.5693087298737)}
REFERENCE_RETURNS |= {"relocate": (-6.425911, 4233.877797728884)}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
WAYS = "Three ways to get it: --dataset FILE.hdf5; --dataset and an id of `minari list local`; or run once with network"
RANDOM_STEPS, RANDOM_CHUNK = 1_000_000, 25_000  # D4RL's size; steps that a process regenerates at a time


def normalized_score(env_id: str, episode_return: float) -> float:
    """D4RL's score: 0 for its random policy's return, 100 for its expert's; NaN where D4RL has no reference."""
    low, high = REFERENCE_RETURNS[env_id.split("-")[0]] if env_id in TASKS else (math.nan, math.nan)
    return 100 * (episode_return - low) / (high - low)


def adroit_excess(kind: str, states: np.ndarray) -> np.ndarray:
    """What gymnasium-robotics 1.2.1 to 1.4.2 pays more than D4RL in states [..., S]: 0.1 a metre from the palm to the
    handle, hammer or ball is added there, and subtracted by D4RL (Gymnasium-Robotics' pull request 220)."""
    i = ADROIT_PALM.get(kind, 0)
    return 0.2 * (i > 0) * np.linalg.norm(states[..., i : i + 3] - states[..., i + 3 : i + 6], axis=-1)


class AdroitHand(gym.Wrapper):
    """An Adroit task with D4RL's rewards and ends: gymnasium-robotics goes on with a dropped pen (its issue 112)."""

    kind: str

    def step(self, action: np.ndarray) -> tuple:
        state, reward, terminated, truncated, info = self.env.step(action)
        terminated |= self.kind == "pen" and bool(state[26] < 0.075)
        return state, reward - adroit_excess(self.kind, state), terminated, truncated, info


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment of a task or a Gymnasium id. BadInput unless observations and actions are flat Boxes."""
    name, kwargs, kind = env_id, {}, env_id.split("-")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Farama's notices of other environments
            importlib.import_module(env_id.rpartition(":")[0] or "gymnasium_robotics")
        if env_id in MUJOCO_TASKS:
            name, kwargs = MUJOCO_ENVS[kind[0]]
        elif env_id in ADROIT_TASKS:
            name, kwargs = f"AdroitHand{kind[0].title()}-v1", {"max_episode_steps": ADROIT_LIMITS[kind[0]]}
        elif env_id in ANTMAZE_TASKS:
            name, start, goal = ANTMAZE_ENVS[kind[1]]
            maze = copy.deepcopy(gym.spec(name).kwargs["maze_map"])
            maze[start[0]][start[1]], maze[goal[0]][goal[1]] = "r", "g"
            kwargs = {"maze_map": maze, "continuing_task": False}
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
            env = gym.make(name, **kwargs, **({"render_mode": render_mode} if render_mode else {}))
        if env_id in ADROIT_TASKS:
            env = AdroitHand(env)
            env.kind = kind[0]
        elif env_id in ANTMAZE_TASKS:
            env.unwrapped.position_noise_range = 0  # the noise moves the goal, which the observation does not tell
            env.unwrapped.ant_env.unwrapped._reset_noise_scale = 0.1  # D4RL's; without it all episodes start the same
            env = gym.wrappers.FilterObservation(env, ("achieved_goal", "observation"))  # D4RL's 2 + 27 numbers
            env = gym.wrappers.FlattenObservation(env)
        if render_mode:  # whether this machine can, and moviepy is there to write the video
            importlib.import_module("moviepy")
            env.reset()
            env.render()
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv):
        near = difflib.get_close_matches(env_id, [*TASKS, *gym.registry], n=3, cutoff=0.5) or TASKS[:3]
        raise BadInput(f"unknown --env-id {env_id!r}: did you mean {', '.join(near)}, or module:Env-v0?") from None
    except Exception as error:  # a package that it needs is missing, or a user's own environment fails in its own way
        advice = "try MUJOCO_GL=egl or =osmesa, or no --capture-video" if render_mode else "write another, or mend it"
        raise BadInput(f"--env-id {env_id} cannot be made ({one_line(error)}): {advice}") from None
    spaces = (env.observation_space, env.action_space)
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    found = " and ".join(f"{type(space).__name__}{space.shape or ''}" for space in spaces)
    bounded = flat and spaces[1].dtype.kind == "f" and max(-spaces[1].low.min(), spaces[1].high.max()) < 1e30
    what = "its observations and actions have to be flat Boxes, the actions' of floats with finite bounds"
    require(bounded, f"--env-id {env_id} has {found}: {what}")
    return env


def checked_columns(columns: dict[str, np.ndarray], source: str | Path) -> dict[str, np.ndarray]:
    """Columns of transitions in float32. BadInput unless they are finite numbers, and equally many."""
    for key, column in columns.items():
        numbers = np.issubdtype(column.dtype, np.number) or column.dtype == bool
        require(numbers, f"{source} has '{key}' of type {column.dtype}: write numbers")
        with np.errstate(over="ignore"):
            column = column.astype(np.float32)
        require(np.isfinite(column).all(), f"{source} has NaN or infinity in '{key}': remove those transitions")
        columns[key] = column.reshape(-1) if key in ("rewards", "terminals", "timeouts") else np.atleast_1d(column)
    counts = ", ".join(f"{key} {len(column)}" for key, column in columns.items())
    equal = len(set(map(len, columns.values()))) == 1
    require(equal, f"{source} has columns of different lengths ({counts}): make them equal")
    return columns


def read_hdf5(path: Path) -> Transitions:
    """Read a D4RL-style file, without next_observations but for the last step of a cut episode. BadInput if damaged."""
    try:
        with h5py.File(path, "r") as file:
            columns = {key: np.asarray(file[key][()]) for key in (*Transitions._fields, "timeouts") if key in file}
    except (OSError, TypeError, KeyError) as error:
        advice = "give a D4RL-style .hdf5 file; if this one is a broken download, delete it"
        if isinstance(error, BlockingIOError):
            advice = "another process has it open for writing, close it there"
        raise BadInput(f"{path} cannot be read as HDF5 ({one_line(error)}): {advice}") from None
    needed = {"observations", "actions", "rewards", "terminals"}
    complete = columns.keys() >= needed and columns.keys() & {"next_observations", "timeouts"}
    what = "observations, actions, rewards, terminals, and next_observations or timeouts (where episodes are cut)"
    require(complete, f"{path} has only {', '.join(columns) or 'other keys'}: write {what}")
    columns = checked_columns(columns, path)
    timeouts = columns.pop("timeouts", None)
    if "next_observations" not in columns:
        terminal = columns["terminals"] > 0
        keep = terminal | (timeouts == 0)
        keep[-1:] &= terminal[-1:]  # the file's last row has no successor
        columns["next_observations"] = np.roll(columns["observations"], -1, axis=0)  # unused behind a terminal
        columns = {key: column[keep] for key, column in columns.items()}
    return Transitions(**columns)


def random_chunk(env_id: str, seed: int, steps: int) -> list[np.ndarray]:
    """`steps` steps of a uniformly random policy: a column for each field of Transitions, and timeouts."""
    env, rows = make_env(env_id), []
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, next_observation, terminated, truncated and not terminated))
        observation = env.reset()[0] if terminated or truncated else next_observation
    columns = [np.asarray(column) for column in zip(*rows, strict=True)]
    columns[5][-1] = not columns[4][-1]  # the chunk's last episode is cut like one at the time limit
    return [column.astype(np.float32 if i < 4 else bool) for i, column in enumerate(columns)]


def end_with_parent() -> None:
    """In a worker: end when the parent ends, however it does."""
    watch = threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True)
    watch.start()


def regenerate_random(env_id: str, path: Path, progress: bool = True, seed: int = 0, steps: int = RANDOM_STEPS) -> None:
    """Write a *-random-v2 set by D4RL's recipe; a seed gives the same bytes on any number of cores."""
    sizes = [min(RANDOM_CHUNK, steps - start) for start in range(0, steps, RANDOM_CHUNK)]
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(sizes))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # of which a container may have a share; it says "max" for all
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    workers, spawn = min(cores, len(sizes), 8), multiprocessing.get_context("spawn")
    bar = {"total": len(sizes), "unit": "step", "disable": not progress or None}
    try:
        with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the workers for good: Ctrl-C is ours
            chunks = pool.map(random_chunk, [env_id] * len(sizes), seeds, sizes)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            chunks = list(tqdm(chunks, f"regenerating {env_id}", unit_scale=RANDOM_CHUNK, **bar))
    except BrokenProcessPool:
        what = "a process that regenerates it ended: too little memory, or a script that calls train without"
        raise BadInput(f"no data for {env_id}: {what} if __name__ == '__main__': before it") from None
    with h5py.File(path, "w") as file:
        for key, parts in zip((*Transitions._fields, "timeouts"), zip(*chunks, strict=True), strict=True):
            file[key] = np.concatenate(parts)


def relabel_antmaze(positions: np.ndarray, goal: np.ndarray) -> tuple[int, np.ndarray]:
    """D4RL's rewards for the one evaluation goal, from the ant's x-y positions [T + 1, 2], and how many steps are left:
    success ends the episode. Minari's rewards are for each episode's own goal, which the observation does not tell."""
    reached = np.linalg.norm(positions[1:] - goal, axis=1) <= ANTMAZE_RADIUS
    steps = int(reached.argmax()) + 1 if reached.any() else len(reached)
    return steps, reached[:steps].astype(np.float32)


def read_minari(dataset_id: str | None, env_id: str, progress: bool) -> tuple[Transitions, str]:
    """Read a Minari dataset (None: D4RL's of the task), downloaded if it is not there; AntMaze's is made D4RL's.
    An id may name its remote, hf://owner/D4RL/door/human-v2."""
    store = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
    antmaze, env, columns = env_id in ANTMAZE_TASKS, make_env(env_id), {key: [] for key in Transitions._fields}
    env.reset()  # which sets AntMaze's goal
    if dataset_id is None:  # a newer version where only that is in the local store
        domain, kind = env_id.rsplit("-v", 1)[0].split("-", 1)
        ids = [f"D4RL/{domain}/{kind}-v{version}" for version in range(1 if antmaze else 2, 10)]
        dataset_id = next((i for i in ids if os.path.isdir(store / i / "data")), ids[0])
    remote_id, dataset_id = dataset_id, re.sub("^[a-z]+://[^/]+/", "", dataset_id)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a store that is read-only is complete
            store.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(store / ".lock", "w")), fcntl.LOCK_EX)  # while another run downloads
        if not os.path.isdir(store / dataset_id / "data"):
            try:
                minari.download_dataset(remote_id)
            except Exception as error:  # whatever the remote's client raises: without network, or for an unknown id
                why = f"{dataset_id} is no file, not in the local Minari store ({store}), and could not be downloaded"
                raise BadInput(f"no data for {env_id}: {why} ({one_line(error)}). {WAYS}") from None
    what = f"the Minari dataset {store / dataset_id}"
    try:
        episodes = minari.load_dataset(dataset_id)
        bar = {"total": len(episodes), "unit": "episode", "disable": not progress or None}
        for episode in tqdm(episodes, f"reading {dataset_id}", **bar):
            observations, actions, rewards = episode.observations, episode.actions, episode.rewards
            terminals, dicts = episode.terminations, isinstance(observations, dict)
            lengths = {len(column) - 1 for column in (observations.values() if dicts else [observations])}
            if lengths != {len(column) for column in (actions, rewards, terminals)}:
                raise ValueError(f"episode {episode.id} has columns of different lengths")
            fits = (dicts and "achieved_goal" in observations) if antmaze else not (dicts or isinstance(actions, dict))
            found = "no AntMaze dataset" if antmaze else "a dataset of dict observations or actions"
            require(fits, f"--dataset {dataset_id} is {found}: write another for {env_id}")
            if antmaze:
                positions = observations["achieved_goal"]
                steps, rewards = relabel_antmaze(positions, env.unwrapped.goal)
                observations = np.hstack([positions, observations["observation"]])[: steps + 1]
                actions, terminals = actions[:steps], rewards
            elif env_id == "pen-cloned-v1" and observations.shape[1:] == env.observation_space.shape:
                # Minari's go on after the drop
                terminals = observations[1:, 26] < 0.075
                steps = int(terminals.argmax()) + 1 if terminals.any() else len(terminals)
                observations, actions = observations[: steps + 1], actions[:steps]
                rewards, terminals = rewards[:steps], terminals[:steps]
            row = (observations[:-1], actions, rewards, observations[1:], terminals)
            for column, values in zip(columns.values(), row, strict=True):
                column.append(np.asarray(values, np.float32))
    except BadInput:
        raise
    except Exception as error:  # Minari has no error of its own for a dataset that is half written
        again = f"mend that; after a broken download: minari download --force {remote_id}"
        raise BadInput(f"{what} cannot be read ({one_line(error)}): {again}") from None
    require(columns["rewards"], f"{what} holds no episodes: write another --dataset")
    columns = checked_columns({key: np.concatenate(parts) for key, parts in columns.items()}, what)
    kind, rewards, states = env_id.split("-")[0], columns["rewards"], columns["next_observations"]
    if env_id in ADROIT_TASKS and states.shape[1:] == env.observation_space.shape:  # of others check_dataset tells
        excess, closed = adroit_excess(kind, states), 0.1 * (states[:1, 28] - 1.57) ** 2 * (kind == "door")
        if kind == "hammer" or (rewards[:1] + closed + excess[:1] / 2 > 1e-4).any():  # else they are D4RL's already
            columns["rewards"] = rewards - excess
    return Transitions(**columns), f"Minari's {dataset_id}"


def load_dataset(env_id: str, dataset: str | None = None, progress: bool = True) -> tuple[Transitions, str]:
    """The offline data of a task, and where it came from. First hit wins: `dataset` (a file or a Minari id), D4RL's
    cache, the scripts' cache, the local Minari store, regeneration of a random set, download."""
    if dataset is not None:
        path = Path(os.path.expanduser(dataset))
        if os.path.isfile(path):
            return read_hdf5(path), str(path)
        minari_id = re.search(r"-v\d+$", dataset) and not os.path.exists(path)
        require(minari_id, f"--dataset {dataset} is no file, nor a Minari id (ends in -v0, say): write such a one")
        return read_minari(dataset, env_id, progress)
    require(env_id in TASKS, f"--env-id {env_id} has no D4RL data: give --dataset, a .hdf5 file or a Minari id")
    if env_id in ANTMAZE_TASKS:  # D4RL's own files are no help: their mazes have another origin
        return read_minari(None, env_id, progress)
    name = f"{env_id[:-3].replace('-', '_')}-v2.hdf5" if env_id in MUJOCO_TASKS else f"{env_id}.hdf5"
    d4rl_cache = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / name
    own_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opt-datasets" / f"{env_id}.hdf5"
    own_source = f"{own_cache} ({'regenerated' if env_id.endswith('-random-v2') else 'downloaded'})"
    for path, source in ((d4rl_cache, str(d4rl_cache)), (own_cache, own_source)):
        if os.path.exists(path):
            return read_hdf5(path), source
    if env_id in ADROIT_TASKS:
        return read_minari(None, env_id, progress)
    temporary = own_cache.with_name(f"{own_cache.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise BadInput(f"cannot write {own_cache} ({one_line(error)}): set XDG_CACHE_HOME to another folder") from None
    try:
        if env_id.endswith("-random-v2"):
            regenerate_random(env_id, temporary, progress)
        else:
            socket.setdefaulttimeout(20)
            torch.hub.download_url_to_file(D4RL_URL + name, str(temporary), progress=progress and sys.stderr.isatty())
        h5py.File(temporary).close()  # a download that broke ends here: what has the final name is complete
        temporary.replace(own_cache)
    except (OSError, http.client.HTTPException) as error:
        why = f"it is not at {d4rl_cache}, and not to be made here or had from {D4RL_URL}{name} ({one_line(error)})"
        raise BadInput(f"no data for {env_id}: {why}. {WAYS}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return read_hdf5(own_cache), own_source


def check_dataset(dataset: Transitions, env: gym.Env, args: Args) -> None:
    """BadInput if the data does not fit the environment or is smaller than a batch."""
    n, size = len(dataset.rewards), args.batch_size
    advice = "lower it" if n else "they are empty, give others by --dataset"
    require(n >= size, f"--batch-size {size} exceeds the data's {n} transitions: {advice}")
    for key in ("observations", "actions", "next_observations"):
        shape = (env.action_space if key == "actions" else env.observation_space).shape
        found, other = getattr(dataset, key).shape[1:], f"those of {args.env_id} {shape}: give its --dataset"
        require(found == shape, f"the data's {key} have shape {found}, {other}")
    if args.env_id in ANTMAZE_TASKS:
        maze, positions = env.unwrapped.maze, dataset.observations[:: max(1, len(dataset.rewards) // 1_000), :2]
        cells = [tuple(int(i) for i in maze.cell_xy_to_rowcol(position)) for position in positions]
        free = {(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1}
        what = f"the data's ant walks outside the maze of {args.env_id}: give data of this maze"
        origin = "with the origin that Gymnasium-Robotics gives it (D4RL's own files have another)"
        require(np.mean([cell in free for cell in cells]) >= 0.9, f"{what}, {origin}")
    low, high, actions = env.action_space.low, env.action_space.high, dataset.actions
    inside = ((low - actions) / (high - low)).max() < 1e-3 and ((actions - high) / (high - low)).max() < 1e-3
    inside = inside and (np.ptp(actions, axis=0) / (high - low)).max() > 0.02  # else they are of smaller units
    ranges = f"from {actions.min():g} to {actions.max():g}, {args.env_id}'s from {low.min():g} to {high.max():g}"
    what = f"the data's actions are {ranges}: write them in the environment's units"
    require(inside or args.env_id in ADROIT_TASKS, what)  # Adroit's hand clips the actions of its cloned policies


def evaluate(policy: Policy, env: gym.Env, env_id: str, episodes: int, seed: int) -> dict:
    """Roll out `episodes` episodes with `policy(s)`, from the same start states each time; columns of evals.csv."""
    policy.refresh()
    returns, lengths, successes, told = [], [], [], False
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + 1_000_000 + episode)
        total, length, done, success = 0.0, 0, False, False
        while not done:
            if length == 100_000:
                what = "an evaluation episode has not ended in 100,000 steps: register it with max_episode_steps"
                print(f"{PROGRAM}: warning: {what}", file=sys.stderr)
            observation, reward, terminated, truncated, info = env.step(policy(observation))
            total, length, done = total + np.asarray(reward).item(), length + 1, terminated or truncated
            success |= bool(info.get("success", info.get("is_success", False)))  # at any step of the episode
            told |= "success" in info or "is_success" in info
        returns.append(total)
        lengths.append(length)
        successes.append(success)
    mean, rate = float(np.mean(returns)), round(float(np.mean(successes)), 4) if told else ""
    row = {"normalized_score": round(normalized_score(env_id, mean), 4), "return_mean": round(mean, 4)}
    row |= {"return_std": round(float(np.std(returns)), 4), "length_mean": round(float(np.mean(lengths)), 2)}
    return row | {"success_rate": rate}


# The run: arguments, folder, logs, checkpoints ========================================================================

PROGRAM = Path(__file__).name
CHECKPOINT_KEPT = "the last checkpoint, if any, is kept"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # ask for a checkpoint; the last is Slurm's


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class BadInput(ValueError):
    """What the user can mend: one line says what is wrong and what to write instead. The command line exits with 2."""


def require(condition: object, message: str) -> None:
    """Refuse bad input unless the condition holds."""
    if not condition:
        raise BadInput(message)


def parse_args() -> Args:
    """The command line. --help shows the fields of Args with their comments, under the comment that heads them."""
    hints, sections = get_type_hints(Args), {}
    for line in inspect.getsource(Args).splitlines():
        if heading := re.fullmatch(r"    # (\w+)", line):
            fields = sections[heading[1]] = []
        elif field := re.match(r"    (\w+): (?:.*?  # (.*))?", line):
            flag = bool if hints[field[1]] == bool | None else None  # --x and --no-x, not --x True
            kind = Annotated[hints[field[1]], tyro.conf.arg(help=field[2], constructor=flag)]
            fields.append((field[1], kind, getattr(Args, field[1])))
    kinds = {name: dataclasses.make_dataclass(name, fields) for name, fields in sections.items()}
    groups = [(n, tyro.conf.OmitArgPrefixes[k], dataclasses.field(default_factory=k)) for n, k in kinds.items()]
    parsed = tyro.cli(dataclasses.make_dataclass("Groups", groups), description=Args.__doc__)
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def resolve(args: Args) -> Args:
    """Replace every None but compile's by the value for the task, and refuse what cannot work."""
    args, antmaze = copy.copy(args), args.env_id in ANTMAZE_TASKS
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {"eval_freq": 50_000 if antmaze else 5_000, "eval_episodes": 100 if antmaze else 10} | paper_values(args)
    values["run_dir"] = "runs/" + f"{args.env_id}__{args.exp_name or values['exp_name']}__{args.seed}".replace("/", "-")
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for allowed, (names, holds) in BOUNDS.items():
        for name in names.split():
            value = getattr(args, name)
            require(holds(value), f"--{name.replace('_', '-')} is {value}: write {allowed}")
    cuda = args.device == "cpu" or torch.cuda.is_available()
    require(cuda, "--device cuda, but torch finds no CUDA device: write --device cpu, or install a CUDA build")
    require(os.path.expanduser("~") != "~", "this user has no home folder, where data is kept: set HOME to a folder")
    check(args)
    return args


def choose_compile(args: Args) -> bool:
    """Whether to compile: what is asked for, else in long runs. BadInput where that is asked for and fails."""
    if args.compile is None and args.offline_steps * (not args.offline_from) + args.utd * args.online_steps < 100_000:
        return False
    try:
        if args.compile is not False:
            torch.compile(torch.sin, options=COMPILER)(torch.ones(9, device=args.device))
    except Exception as error:  # no compiler, a broken one, no Python.h
        require(not args.compile, f"--compile fails here ({one_line(error)}): mend that, or write --no-compile")
        print(f"{PROGRAM}: torch.compile fails here ({one_line(error)}): slower, without it", file=sys.stderr)
        return False
    return args.compile is not False


class Result(NamedTuple):
    """What a finished run gives back."""

    score: float  # the last evaluation's: normalised, or the mean return where D4RL has no reference
    folder: Path
    model: Path | None  # model.pt; None with --no-save-model


class Run:
    """A run: its environments, folder and counters. `loop` is the loop of every phase."""

    EVALS = ["phase", "env_steps", "gradient_steps", "normalized_score", "return_mean", "return_std", "length_mean"]
    EVALS += ["success_rate", "seconds"]
    SPEED = ["phase", "gradient_steps", "env_steps", "seconds", "gradient_steps_per_second"]
    SAVED = ("phase", "step", "phase_seconds", "env_steps", "gradient_steps", "seconds", "score", "evals", "speed")
    FREE = ("resume", "run_dir", "offline_from", "checkpoint_freq", "save_model", "snapshots", "capture_video", "track")
    FREE += ("wandb_project_name", "wandb_entity", "progress", "dataset", "compile")  # may change on resuming
    LOG_FREQ = 1_000  # gradient steps between two points of a TensorBoard curve

    def __init__(self, args: Args):
        """Make the environments and the folder, and read what the run goes on from. BadInput where that cannot be."""
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit(1)  # in a worker that imports a script without main guard: the first process says so
        random.seed(args.seed)  # for environments that draw from the global generators
        np.random.seed(args.seed)
        self.args, self.device, self.folder = args, torch.device(args.device), Path(os.path.expanduser(args.run_dir))
        self.env, self.evaluation_env = make_env(args.env_id), make_env(args.env_id)
        if args.capture_video:
            os.environ.setdefault("MUJOCO_GL", "glfw" if os.environ.get("DISPLAY") else "egl")
            self.video_env = make_env(args.env_id, render_mode="rgb_array")
        self.phase, self.step, self.phase_seconds = PHASES[0], 0, 0.0  # the phase, its steps so far, the time they took
        self.env_steps, self.gradient_steps, self.seconds = 0, 0, 0.0  # of the whole run; seconds with evaluation
        self.score = math.nan  # the newest: normalised, or the mean return where D4RL has no reference
        self.evals, self.speed = [self.EVALS], [self.SPEED]  # what the .csv files hold
        self.metrics, self.signal, self.old_handlers = {}, 0, {}  # signal: which asked to stop
        self.tracker = self.writer = None
        self.products = ""  # which library multiplies matrices, "bf16" or "ieee" (see tune): a resumed run has the same
        checkpoint, self.state = self.folder / "checkpoint.pt", {}
        written = [os.stat(checkpoint).st_mtime_ns] if os.path.exists(checkpoint) else []
        free = args.resume or not (written or os.path.exists(self.folder / "evals.csv"))  # its first row
        advice = "write --resume to go on with it, or another --run-dir or --exp-name"
        require(free, f"{self.folder} holds a run already: {advice}")
        if written:
            names = [field.name for field in dataclasses.fields(args) if field.name not in self.FREE]
            advice, other = "delete it, and --resume starts from the beginning", "start a new run in another --run-dir"
            self.state = load(checkpoint, "checkpoint.pt", args, names, advice, other)
        elif args.offline_from:
            path, advice = Path(os.path.expanduser(args.offline_from)), "write another --offline-from, a run's folder"
            path = path / "offline.pt" if os.path.isdir(path) else path
            self.state = load(path, "offline.pt", args, OFFLINE_ARGS, advice, "leave out --offline-from")
        vars(self).update({name: self.state[name] for name in (*self.SAVED, "products") if name in self.state})
        if written and args.compile is None:  # go on as it began
            args.compile = self.state["args"].get("compile", False)
        args.compile = choose_compile(args)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")  # which ends with the process
        except OSError as error:
            what = f"the run folder {self.folder} cannot be written ({error.strerror})"
            raise BadInput(f"{what}: write another --run-dir") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process runs in {self.folder}: wait for it, or write another --run-dir") from None
        except OSError:  # some file systems of clusters have no locks
            pass
        if written != ([os.stat(checkpoint).st_mtime_ns] if checkpoint.exists() else []):
            self.lock.close()
            raise BadInput(f"another process has just written {checkpoint}: start again")

    def load_data(self, reward_transform: Callable[[str, Transitions], tuple[float, float]]) -> Transitions:
        """The dataset as the agent sees it, rewards scaled and shifted by `reward_transform(env_id, dataset)`, states
        normalised where args say so. The environments likewise; evaluation counts the task's own rewards."""
        dataset, source = load_dataset(self.args.env_id, self.args.dataset, self.args.progress)
        check_dataset(dataset, self.env, self.args)
        scale, shift = reward_transform(self.args.env_id, dataset)
        mean, std = np.float32([[0], [1]]) * np.ones_like(dataset.observations[0])
        if self.args.normalize_states:
            mean = dataset.observations.mean(0, dtype=np.float64).astype(np.float32)
            std = dataset.observations.std(0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)  # TD3+BC, CORL
        low, high = self.env.action_space.low, self.env.action_space.high
        self.mean, self.std, self.scaled = mean, std, not ((low == -1).all() and (high == 1).all())
        dataset = dataset._replace(
            observations=(dataset.observations - mean) / std,
            actions=(dataset.actions - (high + low) / 2) / ((high - low) / 2),
            rewards=scale * dataset.rewards + shift,
            next_observations=(dataset.next_observations - mean) / std,
        )
        self.env = self.seen(gym.wrappers.RecordEpisodeStatistics(self.env, stats_key="ours"))  # of the task's rewards
        self.env = gym.wrappers.TransformReward(self.env, lambda reward: scale * reward + shift)
        self.evaluation_env = self.seen(self.evaluation_env)
        crc = zlib.crc32(b"".join(column.tobytes() for column in dataset))
        self.data = {"source": source, "size": len(dataset.rewards), "crc32": crc}
        self.data |= {"reward_scale": scale, "action_dim": len(low)}
        self.data |= {"observation_mean": torch.from_numpy(mean), "observation_std": torch.from_numpy(std)}
        same = not self.state or self.state["data"].get("crc32") == crc
        what = f"{self.state.get('kind')} was made with other data for {self.args.env_id}"
        require(same, f"{what}: give it the same --dataset")
        if self.args.normalize_states and (still := np.flatnonzero(std < 1.001e-3)).size:
            what = f"observations {still.tolist()} are constant in the data: a change online counts 1,000-fold"
            print(f"{PROGRAM}: warning: {what} (--no-normalize-states)", file=sys.stderr)
        return dataset

    def seen(self, env: gym.Env) -> gym.Env:
        """An environment as the agent sees it: states normalised, actions in [-1, 1]."""
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if self.scaled else env
        space = env.observation_space
        return gym.wrappers.TransformObservation(env, lambda state: (np.float32(state) - self.mean) / self.std, space)

    def start(self, policy: Policy, buffer: ReplayBuffer, agent: Agent, **parts) -> None:
        """Go on from a checkpoint or offline.pt, write args.json, open the logs, take over Ctrl-C and other STOPS.
        A checkpoint holds agent, buffer and `parts`, each by its state_dict."""
        self.policy, self.buffer, self.agent, state = policy, buffer, agent, self.state
        self.parts, resumed = agent.parts() | {"buffer": buffer} | parts, "rng" in state
        try:
            for name, part in (self.parts if resumed else agent.offline_parts if state else {}).items():
                part.load_state_dict(state["parts"][name])
                if isinstance(part, torch.optim.Adam):  # the file may come from another device
                    part.param_groups[0]["capturable"] = self.device.type == "cuda"
        except (KeyError, RuntimeError, ValueError) as error:
            advice = "take that version (script_blob in its args.json), or start a new run in another --run-dir"
            what = f"{state['kind']} is of another script, or another version of {PROGRAM}"
            raise BadInput(f"{what} ({one_line(error)}): {advice}") from None
        if resumed:
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"])
        self.state = {}
        policy.refresh()
        args, path, text = dataclasses.asdict(self.args), self.folder / "args.json", Path(__file__).read_bytes()
        packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
        versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
        blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()  # git's name of this text
        facts = {"versions": versions, "script": PROGRAM, "script_blob": blob, "threads": torch.get_num_threads()}
        facts["products"] = {"bf16": "oneDNN", "ieee": "MKL"}.get(self.products, "cuBLAS")
        facts["data"] = {name: self.data[name] for name in ("source", "size", "crc32")}
        processor = torch.cpu.get_capabilities().get("cpu_name", "cpu")
        facts["device_name"] = torch.cuda.get_device_name() if self.device.type == "cuda" else processor
        facts["wandb_id"] = os.urandom(4).hex()
        if resumed and path.exists():  # W&B goes on with the run it had
            facts["wandb_id"] = json.loads(path.read_text())["wandb_id"]
        if self.args.track:
            names = {"project": args["wandb_project_name"], "entity": args["wandb_entity"], "name": self.folder.name}
            names["id"] = facts["wandb_id"]  # its files go to ./wandb: in the run's folder it would read its own links
            try:
                import wandb

                self.tracker = wandb.init(**names, resume="allow", config=args, sync_tensorboard=True)
            except Exception as error:  # not installed, not logged in, not reached
                raise BadInput(f"--track: {one_line(error)}: run wandb login, or set WANDB_MODE=offline") from None
        with contextlib.suppress(ValueError):  # of a thread that is not the main one
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self.old_handlers[number] = signal.signal(number, self.on_signal)
        if path.exists() and not resumed:  # it was killed before its first checkpoint
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        save(path, json.dumps(args | facts, indent=2))
        for name in ("evals", "speed") if resumed else ():
            self.append(name)
        self.writer = SummaryWriter(str(self.folder), purge_step=max(self.gradient_steps, self.env_steps) + 1)
        table = "".join(f"|{name}|{value}|\n" for name, value in args.items())
        self.writer.add_text("arguments", f"|argument|value|\n|-|-|\n{table}", self.gradient_steps)
        data = f"{self.data['size']:,} transitions from {self.data['source']}"
        how = f"{args['offline_steps']:,} + {args['online_steps']:,} steps on {args['device']} ({facts['device_name']})"
        how += ", compiled" * args["compile"]
        print(f"{PROGRAM}: {self.folder}: {data}; {how}; curves: tensorboard --logdir {self.folder.parent}", flush=True)

    def on_signal(self, number: int, frame) -> None:
        """The first Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 asks for a checkpoint and the end, a second one won't wait."""
        if self.signal and number != signal.SIGHUP:  # of which a shell and its terminal send one each
            raise SystemExit(128 + number)
        self.signal = number
        try:
            os.write(2, b"\nstopping after this step or evaluation, with a checkpoint; once more: at once, without\n")
        except OSError:  # SIGHUP: the terminal is gone, and whatever is printed from here on would end the run
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def loop(self, phase: str, total: int, env: int = 0, gradient: int = 0, scores: str = "often") -> Iterator[int]:
        """Yield what is left of a phase's `total` steps, each of `env` environment and `gradient` gradient steps.
        It has a seed of its own, to be the same after any other. Between two steps are logs, evaluation (`scores`:
        "often", every eval_freq steps and at the end; "end"; "never"), checkpoints, and the stop on a signal."""
        args, every = self.args, max(gradient, 1)
        if PHASES.index(self.phase) < PHASES.index(phase):
            self.phase, self.step, self.phase_seconds, self.metrics = phase, 0, 0.0, {}
            torch.manual_seed(args.seed + 10_000 * PHASES.index(phase))
            if len(self.evals) == 1 or (scores == "end" and not total):
                self.add_evaluation()
        if self.phase != phase or self.step == total:
            return
        name, off = f"{PHASES.index(phase)}/{len(PHASES) - 2} {phase}", not args.progress or None
        bar = tqdm(None, name, total, initial=self.step, unit="step", mininterval=0.5, disable=off)
        bar.set_postfix(score=self.score)
        started = time.perf_counter()
        while self.step < total:
            yield self.step
            self.step += 1
            self.env_steps += env
            self.gradient_steps += gradient
            bar.update()
            last, counted = self.step == total, self.env_steps if env else self.step
            often = scores == "often" and args.eval_freq
            score = (often and counted % often == 0) or (last and scores != "never")
            keep = args.checkpoint_freq and (last or self.step % max(1, args.checkpoint_freq // every) == 0)
            if not (score or keep or last or self.signal or self.step % max(1, self.LOG_FREQ // every) == 0):
                continue
            elapsed = time.perf_counter() - started
            self.phase_seconds, self.seconds = self.phase_seconds + elapsed, self.seconds + elapsed
            steps_per_second = self.step / max(self.phase_seconds, 1e-9)
            if gradient:  # else the curve stands still
                self.metrics["steps_per_second"] = steps_per_second
            self.log_metrics()
            if last:
                rate = f"{total * gradient / max(self.phase_seconds, 1e-9):.2f}"
                self.append("speed", (phase, total * gradient, total * env, f"{self.phase_seconds:.3f}", rate))
            if score:
                self.add_evaluation()
                bar.set_postfix(score=self.score)
                if bar.disable and not self.signal:  # asked for, or not a terminal
                    left = f"{steps_per_second:.0f} steps/s, {(total - self.step) / steps_per_second / 60:.0f} min left"
                    print(f"{phase} {self.step:,}/{total:,}: score {self.score:.1f}, {left}", flush=True)
            if keep:
                self.save_checkpoint()
            if self.signal and not last:
                break
            started = time.perf_counter()
        bar.close()
        if self.signal:
            self.save_checkpoint()
            what = f"{PROGRAM}: stopped, with a checkpoint; go on with the same command and --resume\n"
            with contextlib.suppress(OSError):  # Ctrl-C has ended what it is piped to
                os.write(2, what.encode())
            raise SystemExit(128 + self.signal)

    def log_metrics(self) -> None:
        """The newest metrics to TensorBoard; exit 1 where one is not finite."""
        for name, value in self.metrics.items():
            if not math.isfinite(value := float(value)):
                where = f"phase {self.phase}, gradient step {self.gradient_steps}"
                raise FloatingPointError(f"{name} is {value} in {where}; {CHECKPOINT_KEPT}")
            self.writer.add_scalar(f"train/{name}", value, self.gradient_steps)
        if returns := self.env.get_wrapper_attr("return_queue"):  # of training episodes since, the newest
            self.writer.add_scalar("online/episode_return", returns[-1], self.env_steps)
            returns.clear()

    def add_evaluation(self) -> None:
        """Evaluate: a row of evals.csv, a point of the curves, with --snapshots a model."""
        args, started = self.args, time.perf_counter()
        with torch.random.fork_rng(devices=()):  # a policy that draws is evaluated with the same numbers each time
            torch.default_generator.manual_seed(args.seed)
            result = evaluate(self.policy, self.evaluation_env, args.env_id, args.eval_episodes, args.seed)
        self.seconds += time.perf_counter() - started
        self.score = result["return_mean" if math.isnan(result["normalized_score"]) else "normalized_score"]
        counters = (self.phase, self.env_steps, self.gradient_steps)
        self.append("evals", (*counters, *result.values(), round(self.seconds, 2)))
        for key, value in (result | {"env_steps": self.env_steps}).items():
            if value != "" and math.isfinite(value):
                self.writer.add_scalar(f"eval/{key}", value, self.gradient_steps)
                if self.env_steps:  # an axis that runs with other gradient steps share
                    self.writer.add_scalar(f"online/{key}", value, self.env_steps)
        self.writer.flush()
        if args.snapshots:
            save(self.folder / "snapshots" / ("-".join(map(str, counters)) + ".pt"), self.model())

    def append(self, name: str, *rows: tuple) -> None:
        """Add rows to evals.csv or speed.csv."""
        table = getattr(self, name)
        table += [list(map(str, row)) for row in rows]
        save(self.folder / f"{name}.csv", "".join(",".join(row) + "\n" for row in table))

    def model(self) -> dict:
        """All networks of the agent, and what it takes to use them."""
        networks = {name: part for name, part in self.agent.parts().items() if isinstance(part, nn.Module)}
        facts = {"kind": "model.pt", "script": PROGRAM, "args": dataclasses.asdict(self.args), **self.data}
        return facts | {name: network.state_dict() for name, network in networks.items()}

    def save_state(self, kind: str, parts: dict, **more) -> None:
        """Write checkpoint.pt or offline.pt: the counters and the state of `parts`."""
        state = {name: getattr(self, name) for name in self.SAVED} | {"kind": kind, "data": self.data}
        state["products"] = self.products
        states = {name: part.state_dict() for name, part in parts.items()}
        save(self.folder / kind, state | {"args": dataclasses.asdict(self.args), "parts": states} | more)

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt: all that a resumed run needs to go on bit for bit."""
        cuda = {"cuda_rng": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {}
        self.save_state("checkpoint.pt", self.parts, rng=torch.get_rng_state(), **cuda)

    def save_offline(self) -> None:
        """Where the offline phase has just ended, write offline.pt, from which other runs can start."""
        if self.phase == "offline":
            self.save_state("offline.pt", self.agent.offline_parts, speed=[self.SPEED])

    def finish(self) -> Result:
        """Write model.pt and the video, mark the run complete."""
        model = self.folder / "model.pt"
        if self.phase == "done":
            print(f"{self.folder} is complete: score {self.score:.1f}")
            return Result(self.score, self.folder, model if model.exists() else None)
        if self.args.save_model:
            save(model, self.model() | {"states": self.buffer.some_states()})  # for report.py tsne
            self.parts = {}  # what is in model.pt need not be in the checkpoint as well
        if self.args.capture_video:
            video = {"video_folder": str(self.folder / "video"), "name_prefix": "evaluation", "disable_logger": True}
            env = gym.wrappers.RecordVideo(self.seen(self.video_env), **video)
            evaluate(self.policy, env, self.args.env_id, episodes=1, seed=self.args.seed)
            env.close()
        self.phase, self.step = "done", 0
        self.save_checkpoint()
        print(f"{self.folder}: score {self.score:.1f}, after {self.seconds / 60:.0f} min")
        return Result(self.score, self.folder, model if self.args.save_model else None)

    def close(self) -> None:
        """Give back what the run took over, however it ended."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        with self.lock, contextlib.ExitStack() as stack:  # the last first, and each, also if another fails
            if self.tracker:  # a stopped run would else be a finished one to W&B
                stack.callback(self.tracker.finish, int(self.phase != "done"))
            if self.writer:
                stack.callback(self.writer.close)


def save(path: Path, content: dict | str) -> None:
    """Write a file under a temporary name, then rename it: whatever happens, it is the old one or the whole new one."""
    data = io.BytesIO()
    torch.save(content, data) if isinstance(content, dict) else data.write(content.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, kind: str, args: Args, names: Iterable[str], advice: str, other: str) -> dict:
    """Read what a run wrote; BadInput if it is missing, damaged, or of other arguments `names` than these."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises half a dozen kinds for a truncated file
        raise BadInput(f"{path} is damaged or missing ({one_line(error)}): {advice}") from None
    whole = isinstance(state, dict) and state.get("kind") == kind and state.keys() >= {*Run.SAVED, "parts", "data"}
    whole = whole and state["args"].keys() >= set(names)  # another script's has others
    require(whole, f"{path} is no {kind} of this version of {PROGRAM}: {advice}")
    pairs = {name: (state["args"][name], getattr(args, name)) for name in names}
    flags = [f"--{name.replace('_', '-')} {old} (now {new})" for name, (old, new) in pairs.items() if old != new]
    require(not flags, f"{path} was made with {', '.join(flags)}: write the same, or {other}")
    return state


# Speed ================================================================================================================


def tune(run: Run) -> None:
    """Settings for the speed of small networks; results stay in float32."""
    if run.device.type == "cuda":
        torch.set_num_threads(1)  # on the CPU it acts, one observation at a time
        run.products = ""
        return
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay into denormals, which are slow
    with contextlib.suppress(OSError):  # glibc maps a 256 KB activation anew at every operation: keep freed memory
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 24)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD
    # "ieee" leaves matrix products to MKL, "bf16" hands them to oneDNN, which computes in float32 too, but for AMX.
    settings, seconds = torch.backends.mkldnn.matmul, {}
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    for setting, handicap in (("bf16", 1.0), ("ieee", 1.2)) * 4:  # so that chance does not choose between equals
        settings.fp32_precision, started = setting, time.perf_counter()
        for _ in range(10):
            product = a @ b, a.mT @ b
        taken = handicap * (time.perf_counter() - started)
        if (product[0] - (a.double() @ b.double())).abs().max() < 1e-3:
            seconds[setting] = min(seconds.get(setting, math.inf), taken)
    run.products = run.products if run.products in seconds else min(seconds, key=seconds.get)
    settings.fp32_precision = run.products


COMPILER = {"compile_threads": 1, "cpp_wrapper": not torch.cuda.is_available()}  # no other process; all in C++


def accelerate(compiled: bool) -> Callable[[Callable[..., dict]], Callable[..., dict]]:
    """Decorates a gradient step: `compiled` or as it is; on CUDA replayed as a CUDA graph, one for each argument."""

    def decorate(update: Callable[..., dict]) -> Callable[..., dict]:
        def detached(*flags: bool) -> dict:
            return {name: value.detach() for name, value in update(*flags).items()}

        if compiled:
            torch._dynamo.config.trace_autograd_ops = True
            detached.__code__ = detached.__code__.replace()  # its own: at most 8 versions of a code are compiled
            options = COMPILER | {"fallback_random": True}  # eager code's random numbers
            options["loop_ordering_after_fusion"] = False  # fails on CUDA in PyTorch 2.11
            # Of some 700 conditions checked before each step, keep those on values that Python code may change.
            options["guard_filter_fn"] = lambda guards: [
                isinstance(g.value, int | float | str | list | tuple | None) or g.guard_type == "SHAPE_ENV"
                for g in guards
            ]
            detached = torch.compile(detached, fullgraph=True, options=options)
        eager_steps, graphs = {}, {}

        def step(*flags: bool) -> dict:
            if eager_steps.get(flags, 0) < 3:  # a few before a capture; on no side stream: they leave no graph alive
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS if compiled and flags not in eager_steps else ())
                try:  # the first of a kind starts a compiler, which Ctrl-C must not end
                    metrics = detached(*flags)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                eager_steps[flags] = eager_steps.get(flags, 0) + next(iter(metrics.values())).is_cuda
                return metrics
            if flags not in graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    graphs[flags] = graph, detached(*flags)
            graphs[flags][0].replay()
            return graphs[flags][1]

        return step

    return decorate


if __name__ == "__main__":
    try:
        train(parse_args())
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, FloatingPointError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except OSError as error:  # a full disk: what was written before is whole
        sys.exit(f"{PROGRAM}: {error}: the run stopped; mend that, and go on from its last checkpoint with --resume")
