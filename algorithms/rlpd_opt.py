"""RLPD+OPT: Online Pre-Training for offline-to-online reinforcement learning (OPT, ICML 2025) on RLPD.

usage: python algorithms/rlpd_opt.py --env-id walker2d-random-v2                              SAC offline, then OPT
       python algorithms/rlpd_opt.py --env-id walker2d-random-v2 --no-opt                     off-to-on: offline, online
       python algorithms/rlpd_opt.py --env-id walker2d-random-v2 --no-opt --offline-steps 0   vanilla RLPD

Equation, table and section numbers are those of the OPT paper. The backbone is RLPD (Ball et al. 2023) and its code:
SAC (Haarnoja et al. 2018) with ten layer-normalised critics, 20 critic steps per environment step, and batches of which
half is offline data; balanced replay is that of Off2On (Lee et al. 2022) and its code. A line marked [choice] decides
something on which the paper is silent.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import ctypes
import difflib
import errno
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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

# ======================================================================================================================
# Arguments
# ======================================================================================================================


@dataclass
class Args:
    """RLPD+OPT. Defaults are the paper's protocol; None stands for the paper's value for this task."""

    # The task
    env_id: str = "walker2d-random-v2"
    """a D4RL task, or any Gymnasium id with Box observations and actions together with --dataset"""
    dataset: str | None = None
    """a D4RL-style .hdf5 file or a Minari id; None: D4RL's own data for the task"""
    seed: int = 0
    """seed of networks, sampling and environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes CUDA where there is one"""

    # The three phases (Algorithm 1)
    opt: bool = True
    """OPT; --no-opt is the backbone: offline training (none with --offline-steps 0), then its online update, no Q_on;
    n_tau, n_pretrain, q_on_init, meta_* and init_online_fraction then count for nothing"""
    offline_steps: int = 1_000_000
    """gradient steps of offline pre-training, counted on the critics [choice]"""
    online_steps: int = 300_000
    """environment steps of the online phase, the first n_tau included"""
    n_tau: int = 25_000
    """environment steps collected with the offline policy before online pre-training (N_tau, Section 4.1)"""
    n_pretrain: int = 50_000
    """gradient steps of online pre-training (N_pretrain, Section 4.1)"""
    utd: int = 20
    """critic steps per environment step of online fine-tuning; a policy and a temperature step follow, offline too"""
    random_steps: int | None = None
    """environment steps of random actions before the first update of the online phase, with --no-opt;
    None: 5,000 where there is no offline phase (vanilla), else 0"""

    # OPT
    kappa_init: float | None = None
    """weight of Q_on in the policy's objective at the first online step; None: Table 15"""
    kappa_end: float | None = None
    """weight of Q_on from kappa_decay online steps on; None: Table 15"""
    kappa_decay: int | None = None
    """environment steps over which kappa runs from kappa_init to kappa_end (T_decay); None: Table 15"""
    q_on_init: Literal["meta", "random", "online", "joint"] = "meta"
    """how Q_on starts (Fig. 5): meta Eq. 3, random none, online on B_on only, joint Eq. 10"""
    q_on: bool = True
    """--no-q-on has no new value function (Fig. 7): phase 2 trains Q_off, and the policy follows Q_off alone"""
    meta_lr: float = 3e-4
    """step size of the inner step of Eq. 3 (alpha; OEMA's code)"""
    meta_second_order: bool = False
    """differentiate through the inner step: Eq. 3 to the letter; the default is OEMA's first-order form"""
    replay: Literal["balanced", "online", "symmetric", "uniform"] | None = None
    """what fine-tuning samples; None: symmetric (RLPD), half of every batch from each buffer"""
    init_online_fraction: float = 0.5
    """share of online samples at the start of balanced replay [choice: Off2On leaves it per task]"""

    # RLPD
    batch_size: int = 256
    """transitions per batch; from each buffer in online pre-training"""
    learning_rate: float = 3e-4
    """of every Adam optimiser"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """step of the target critics"""
    ensemble_size: int = 10
    """critics of an ensemble"""
    subset_size: int | None = None
    """target critics, drawn anew for every step, whose minimum is the target; None: 2, on AntMaze 1 (RLPD's README)"""
    backup_entropy: bool | None = None
    """whether the target counts the policy's entropy; None: yes, on AntMaze and Adroit no (RLPD's README)"""
    hidden_layers: int | None = None
    """hidden layers of 256 in policy and critics; None: 2, on AntMaze and Adroit 3 (RLPD's README)"""
    normalize_states: bool = False
    """normalise states by the dataset's mean and std, offline and online (RLPD's code does not)"""

    # The run
    eval_freq: int | None = None
    """steps between evaluations: gradient steps offline, environment steps online; 0: only where a phase ends;
    None: 5,000, on AntMaze 50,000 (CORL)"""
    eval_episodes: int | None = None
    """episodes of an evaluation; None: 10, on AntMaze 100 (CORL)"""
    exp_name: str | None = None
    """name of the variant in the run's folder; None: rlpd_opt, rlpd (off-to-on), or rlpd_vanilla"""
    run_dir: str | None = None
    """the run's folder; None: runs/<env_id>__<exp_name>__<seed>"""
    offline_from: str | None = None
    """start at phase 2 from the offline.pt of another run (its folder or the file) of the same task and seed"""
    checkpoint_freq: int = 50_000
    """gradient steps (while collecting, environment steps) between checkpoints; 0: only on Ctrl-C or SIGTERM"""
    resume: bool = False
    """go on from the run folder's checkpoint; from the beginning where there is none yet"""
    save_model: bool = True
    """write model.pt at the end"""
    capture_video: bool = False
    """write an mp4 of one evaluation episode at the end"""
    reference_model: str | None = None
    """model.pt of a near-optimal agent: log the estimation bias against its values to bias.csv (Figs. 9, 10)"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "opt"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    progress: bool = True
    """show progress bars"""


ALGORITHM = "rlpd"
PHASES = ("start", "offline", "collect", "online_pretrain", "online_finetune", "done")
BOUNDS = {
    "a whole number from 0 to 4294967295": ("seed", lambda x: 0 <= x < 2**32),
    "0 or more": (
        "offline_steps online_steps n_tau n_pretrain kappa_decay eval_freq checkpoint_freq random_steps",
        lambda x: x >= 0,
    ),
    "1 or more": ("utd batch_size eval_episodes ensemble_size subset_size hidden_layers", lambda x: x >= 1),
    "a number from 0 to 1": ("kappa_init kappa_end gamma tau", lambda x: 0 <= x <= 1),
    "a number between 0 and 1": ("init_online_fraction", lambda x: 0 < x < 1),
    "a positive number": ("learning_rate meta_lr", lambda x: 0 < x < math.inf),
}
OFFLINE_ARGS = (  # what offline.pt depends on
    "env_id", "seed", "offline_steps", "batch_size", "learning_rate", "gamma", "tau", "utd", "ensemble_size",
    "subset_size", "backup_entropy", "hidden_layers", "normalize_states",
)  # fmt: skip


def paper_values(args: Args) -> dict:
    """The paper's values for this task of the arguments that are None. Exit 2 for RLPD's that do not go together."""
    antmaze, adroit = args.env_id in ANTMAZE_TASKS, args.env_id in ADROIT_TASKS
    vanilla = not (args.opt or args.offline_steps)
    values = {
        "replay": "symmetric",
        "random_steps": 5_000 if vanilla and args.online_steps > 0 else 0,
        "subset_size": 1 if antmaze else 2,
        "backup_entropy": not (antmaze or adroit),
        "hidden_layers": 3 if antmaze or adroit else 2,
    } | ({"exp_name": "rlpd_vanilla"} if vanilla else {})
    random_steps = values["random_steps"] if args.random_steps is None else args.random_steps
    subset_size = args.subset_size or values["subset_size"]
    if args.opt and random_steps:
        raise bad_input("--random-steps belongs to --no-opt, and OPT collects with its policy: leave it out")
    if random_steps and random_steps >= args.online_steps:
        raise bad_input(f"--random-steps is {random_steps}: write less than --online-steps ({args.online_steps})")
    if 1 <= args.ensemble_size < subset_size:
        raise bad_input(f"--subset-size is {subset_size}: write at most --ensemble-size ({args.ensemble_size})")
    return values


def reward_transform(env_id: str, dataset: Dataset) -> tuple[float, float]:
    """Scale and shift of the rewards that the agent trains on, offline and online; scores count the task's own."""
    return 1.0, -1.0 if env_id in ANTMAZE_TASKS else 0.0  # AntMaze: -1 a step until the goal is reached


# Table 15: (kappa_init, T_decay in environment steps, kappa_end). The random sets keep kappa at 1.
KAPPA_SCHEDULES = {
    "random": (1.0, 0, 1.0),
    "medium": (0.3, 150_000, 0.9),
    "medium-replay": (0.1, 150_000, 0.9),
    "antmaze": (0.1, 100_000, 0.9),
    "antmaze-large-diverse": (0.1, 200_000, 0.9),
    "adroit": (0.1, 250_000, 0.9),
}


def kappa_schedule(env_id: str, online_steps: int) -> tuple[float, int, float]:
    """Table 15's (kappa_init, T_decay, kappa_end); for any other task 0.1 to 0.9 over half of online_steps [choice]."""
    task = env_id.rsplit("-v", 1)[0]
    domain, _, kind = task.partition("-")
    if domain in MUJOCO_ENVS and kind in ("random", "medium", "medium-replay"):
        return KAPPA_SCHEDULES[kind]
    if env_id in ANTMAZE_TASKS:
        return KAPPA_SCHEDULES.get(task, KAPPA_SCHEDULES["antmaze"])
    if env_id in ADROIT_TASKS:
        return KAPPA_SCHEDULES["adroit"]
    return 0.1, online_steps // 2, 0.9


def resolve(args: Args) -> Args:
    """Replace every None by the paper's value for the task and refuse what cannot work (exit 2)."""
    args = copy.copy(args)
    check_env_id(args.env_id, args.dataset)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with_q_on = args.opt and args.q_on
    if not with_q_on and any(value is not None for value in (args.kappa_init, args.kappa_decay, args.kappa_end)):
        raise bad_input("--kappa-* weight Q_on, which --no-opt and --no-q-on do without: leave them out")
    kappa = kappa_schedule(args.env_id, args.online_steps) if with_q_on else (0.0, 0, 0.0)
    values = dict(zip(("kappa_init", "kappa_decay", "kappa_end"), kappa, strict=True))
    if values["kappa_decay"] == 0 and (args.kappa_init, args.kappa_end) != (None, None):
        values["kappa_decay"] = args.online_steps // 2  # the random sets' constant kappa has no T_decay [choice]
    antmaze = args.env_id in ANTMAZE_TASKS
    values |= {"eval_freq": 50_000 if antmaze else 5_000, "eval_episodes": 100 if antmaze else 10}
    values |= {"exp_name": f"{ALGORITHM}_opt" if args.opt else ALGORITHM} | paper_values(args)
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.run_dir = args.run_dir or f"runs/{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"

    for allowed, (names, holds) in BOUNDS.items():
        for name in names.split():
            if not holds(getattr(args, name)):
                raise bad_input(f"--{name.replace('_', '-')} is {getattr(args, name)}: write {allowed}")
    if args.opt and not 0 < args.n_tau < args.online_steps:
        raise bad_input(f"--n-tau is {args.n_tau}: write 1 or more, and less than --online-steps ({args.online_steps})")
    if args.replay == "balanced" and not args.opt:
        raise bad_input("--replay balanced starts from what only OPT collects: write --replay uniform with --no-opt")
    if args.replay == "symmetric" and args.batch_size % 2:
        raise bad_input("--replay symmetric takes half a batch from each buffer: write an even --batch-size")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise bad_input("--device cuda, but torch finds no CUDA device: write --device cpu, or install a CUDA build")
    return args


# ======================================================================================================================
# Networks
# ======================================================================================================================


class Actor(nn.Module):
    """A Gaussian squashed by tanh: observations [B, observation_dim] to actions [B, action_dim] in [-1, 1]."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_layers: int = 2):
        super().__init__()
        widths = [observation_dim] + [256] * hidden_layers
        self.hidden = nn.ModuleList([nn.Linear(*pair) for pair in itertools.pairwise(widths)])
        self.mean, self.log_std = nn.Linear(256, action_dim), nn.Linear(256, action_dim)
        xavier_uniform(self)

    def gaussian(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the standard deviation before the tanh, both [B, action_dim]."""
        x = observations
        for layer in self.hidden:
            x = layer(x).relu_()
        return self.mean(x), self.log_std(x).clamp(-20, 2)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """The deterministic action, tanh of the mean."""
        return self.gaussian(observations)[0].tanh()

    def sample(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions a ~ pi(.|s) [B, action_dim], through which gradients flow, and log pi(a|s) [B]."""
        mean, log_std = self.gaussian(observations)
        noise = torch.randn_like(mean)
        before_tanh = mean + log_std.exp() * noise
        return before_tanh.tanh(), tanh_gaussian_log_prob(noise, log_std, before_tanh)


def tanh_gaussian_log_prob(noise: torch.Tensor, log_std: torch.Tensor, before_tanh: torch.Tensor) -> torch.Tensor:
    """log pi(a) [B] of a = tanh(u), u = mean + std noise, all [B, action_dim].

    The change of variables subtracts log(da/du) = log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which is finite
    where the action has rounded to 1 or -1. `noise` is not recovered from u, which would cancel for a small std.
    """
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - before_tanh - F.softplus(-2 * before_tanh))).sum(1)


class Temperature(nn.Module):
    """alpha, the weight of the entropy: learned by its logarithm, from 1."""

    def __init__(self):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self) -> torch.Tensor:
        return self.log_alpha.exp()


class EnsembleLinear(nn.Module):
    """`members` linear layers in one batched call, [members, B, inputs] to [members, B, outputs]; nn.Linear's init.

    [B, inputs] to [B, outputs] is the first member alone.
    """

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if x.dim() == 2:  # where it is the only one, the backward pass of [0] would fill and copy a gradient in vain
            weight, bias = (p.squeeze(0) if len(p) == 1 else p[0] for p in (weight, bias))
        if weight.shape[-1] == 1:  # a dot product a row: several times faster than a product with a one-column matrix
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        if x.dim() == 2:  # a batched product uses one thread a member
            return torch.addmm(bias, x, weight)
        return torch.baddbmm(bias, x, weight)


class EnsembleLayerNorm(nn.Module):
    """`members` layer norms over the last axis of [members, B, width], each with a scale and a shift of its own."""

    def __init__(self, members: int, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # Flax's epsilon
        return (x * self.scale).add_(self.shift)


class LayerNormCritic(nn.Module):
    """RLPD's ensemble of Q(s,a), LayerNorm between each hidden linear layer and its ReLU.

    Observations [B, observation_dim], actions [B, action_dim] to values [members, B].
    """

    def __init__(self, observation_dim: int, action_dim: int, members: int = 10, hidden_layers: int = 2):
        super().__init__()
        widths = [observation_dim + action_dim] + [256] * hidden_layers
        self.hidden = nn.ModuleList([EnsembleLinear(members, *pair) for pair in itertools.pairwise(widths)])
        self.norms = nn.ModuleList([EnsembleLayerNorm(members, 256) for _ in self.hidden])
        self.out = EnsembleLinear(members, 256, 1)
        xavier_uniform(self)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([observations, actions], 1).expand(len(self.out.weight), -1, -1)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = norm(layer(x)).relu_()
        return self.out(x).squeeze(2)


@torch.no_grad()
def xavier_uniform(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer, as in RLPD's code."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            bound = math.sqrt(6 / sum(layer.weight.shape[-2:]))
            layer.weight.uniform_(-bound, bound)
            layer.bias.zero_()


def make_adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    parameters = list(network.parameters())
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True, capturable=parameters[0].is_cuda)


def minimize(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` down `loss`; only its own parameters get gradients."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# ======================================================================================================================
# RLPD and OPT: the equations
# ======================================================================================================================


def kappa_at(step: int, kappa_init: float, kappa_end: float, kappa_decay: int) -> float:
    """Weight of Q_on at an environment step of the online phase: linear over kappa_decay, then constant (Table 15)."""
    return kappa_init + (kappa_end - kappa_init) * min(1.0, step / kappa_decay if kappa_decay else 1.0)


def random_subset(members: int, size: int, device: torch.device) -> torch.Tensor:
    """`size` different ones of the numbers below `members`, [size], drawn on the device."""
    return torch.rand(members, device=device).topk(size).indices


@torch.no_grad()
def sac_target(
    q_target: nn.Module,
    subset: torch.Tensor,
    batch: Dataset,
    next_actions: torch.Tensor,
    next_bonus: torch.Tensor | float,
    gamma: float,
) -> torch.Tensor:
    """The bracket of Eq. 2 in RLPD: r + gamma (1 - terminal) (min_{i in subset} Q'_i(s', a') + bonus of a'), [B]."""
    members = {name: parameter.index_select(0, subset) for name, parameter in q_target.named_parameters()}
    next_values = functional_call(q_target, members, (batch.next_observations, next_actions)).amin(0)
    return batch.rewards + gamma * (1 - batch.terminals) * (next_values + next_bonus)


def td_loss(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. 2 on values [members, B] and target [B]: mean squared error, summed over the ensemble."""
    return (values - target).square().mean(1).sum()


def meta_adaptation_loss(
    critic: nn.Module,
    offline: Dataset,
    offline_target: torch.Tensor,
    online: Dataset,
    online_target: torch.Tensor,
    meta_lr: float,
    second_order: bool = False,
    loss: Callable = td_loss,
) -> torch.Tensor:
    """Eq. 3: L_off(psi) + L_on(psi - alpha grad L_off(psi)), where L is loss(critic's values, target).

    First order (OEMA's code): the inner gradient is a constant. Second order: Eq. 3 to the letter. The targets [B] are
    the target critic's; the adapted parameters are used for L_on's prediction alone.
    """
    parameters = dict(critic.named_parameters())
    offline_loss = loss(critic(offline.observations, offline.actions), offline_target)
    gradients = torch.autograd.grad(
        offline_loss, list(parameters.values()), retain_graph=True, create_graph=second_order
    )
    adapted = {name: p - meta_lr * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    online_loss = loss(functional_call(critic, adapted, (online.observations, online.actions)), online_target)
    return offline_loss + online_loss


def value(critic: nn.Module, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The value that Eq. 4 takes from an ensemble: its mean, [B]."""
    return critic(observations, actions).mean(0)


def policy_loss(q_off: torch.Tensor | None, q_on: torch.Tensor | None, kappa: torch.Tensor | float) -> torch.Tensor:
    """Eq. 4 on values [B] of pi(s): -mean[(1 - kappa) Q_off + kappa Q_on]; a Q that never counts may be None."""
    if q_on is None:
        return -q_off.mean()
    if q_off is None:
        return -q_on.mean()
    return -((1 - kappa) * q_off + kappa * q_on).mean()


def temperature_loss(temperature: torch.Tensor, log_probs: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """alpha (entropy - target entropy) with entropy = -mean log pi [B]: alpha grows where the entropy is too small."""
    return temperature * (-log_probs.detach().mean() - target_entropy)


# ======================================================================================================================
# Balanced replay
# ======================================================================================================================


class SumTree:
    """Draws leaves proportionally to their priorities: two levels, a node the sum of 128 leaves, in float64."""

    WIDTH = 128

    def __init__(self, capacity: int, device: torch.device):
        nodes = math.ceil(capacity / self.WIDTH)
        self.leaves = torch.zeros(nodes, self.WIDTH, dtype=torch.float64, device=device)
        self.nodes = torch.zeros(nodes, dtype=torch.float64, device=device)

    def fill(self, priorities: torch.Tensor) -> None:
        """Give the first leaves their priorities [n]."""
        self.leaves.view(-1)[: len(priorities)] = priorities
        self.nodes.copy_(self.leaves.sum(1))

    def set(self, leaves: torch.Tensor, priorities: torch.Tensor) -> None:
        """Give leaves [n] new priorities [n]. Sums are taken anew, not adjusted, so that no rounding piles up."""
        self.leaves.view(-1)[leaves] = priorities.double()
        nodes = leaves // self.WIDTH
        self.nodes[nodes] = self.leaves.index_select(0, nodes).sum(1)

    def sample(self, n: int) -> torch.Tensor:
        """n leaves [n], independently, each with probability priority / total."""
        # Two draws each, of a node and of a leaf in it; 1e-12: rounding must not lead past the last positive one
        draws = torch.rand(2, n, dtype=torch.float64, device=self.nodes.device).mul_(1 - 1e-12)
        ends = self.nodes.cumsum(0)
        node = torch.searchsorted(ends, draws[0] * ends[-1], right=True)
        ends = self.leaves.index_select(0, node).cumsum(1)
        leaf = torch.searchsorted(ends, (draws[1] * ends[:, -1]).unsqueeze(1), right=True).squeeze(1)
        return node * self.WIDTH + leaf

    def state_dict(self) -> dict:
        return {"leaves": self.leaves, "nodes": self.nodes}

    def load_state_dict(self, state: dict) -> None:
        self.leaves.copy_(state["leaves"])
        self.nodes.copy_(state["nodes"])


def density_ratio_loss(offline_ratio: torch.Tensor, online_ratio: torch.Tensor) -> torch.Tensor:
    """Negative Jensen-Shannon bound, least where w is the density ratio online / offline (Lee et al. 2022)."""
    return (
        -torch.log(2 / (offline_ratio + 1) + 1e-10) - torch.log(2 * online_ratio / (online_ratio + 1) + 1e-10)
    ).mean()


class BalancedReplay:
    """One prioritised buffer over B_off and B_on whose priorities follow the density ratio (Lee et al. 2022)."""

    TEMPERATURE, PRIORITY_MIN, PRIORITY_MAX = 5, 1e-3, 1e3  # Off2On

    def __init__(self, buffer: ReplayBuffer, batch_size: int, device: torch.device):
        self.buffer, self.batch_size = buffer, batch_size
        self.tree = SumTree(len(buffer.rows), device)
        self.ratio = nn.Sequential(
            nn.Linear(sum(buffer.widths[:2]), 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 1),
            nn.ReLU(),
        ).to(device)
        nn.init.ones_(self.ratio[4].bias)
        self.optimizer = make_adam(self.ratio, 3e-4)
        self.largest = torch.ones((), dtype=torch.float64, device=device)

    def start(self, online_fraction: float) -> None:
        """Priority 1 offline; online such that a share `online_fraction` of the first samples is online."""
        online = self.buffer.n_offline * online_fraction / ((1 - online_fraction) * self.buffer.n_online)
        sizes = torch.tensor([self.buffer.n_offline, self.buffer.n_online])
        self.tree.fill(torch.tensor([1.0, online], dtype=torch.float64).repeat_interleave(sizes))
        self.largest.fill_(max(1.0, online))

    def add(self, row: int) -> None:
        """A new online transition enters at the largest priority seen."""
        self.tree.set(torch.tensor([row], device=self.largest.device), self.largest.view(1))

    def density_ratio(self, batch: Dataset) -> torch.Tensor:
        """w(s,a) >= 0, an estimate of the online density over the offline one, [B]."""
        return self.ratio(torch.cat([batch.observations, batch.actions], 1)).squeeze(1)

    def update(self, rows: torch.Tensor, batch: Dataset) -> torch.Tensor:
        """A step of the density ratio on a uniform batch of each buffer, then new priorities for the rows used."""
        n = self.batch_size
        uniform = self.buffer[torch.cat([self.buffer.sample_offline(n), self.buffer.sample_online(n)])]
        offline_ratio, online_ratio = self.density_ratio(uniform).split(n)
        loss = density_ratio_loss(offline_ratio, online_ratio)
        minimize(loss, self.optimizer)
        with torch.no_grad():
            scale = offline_ratio.pow(1 / self.TEMPERATURE).mean() + 1e-10
            priorities = self.density_ratio(batch).pow(1 / self.TEMPERATURE) / scale
            priorities = priorities.clamp(self.PRIORITY_MIN, self.PRIORITY_MAX).double()
            self.tree.set(rows, priorities)
            torch.maximum(self.largest, priorities.max(), out=self.largest)
        return loss.detach()

    def state_dict(self) -> dict:
        return {
            "tree": self.tree.state_dict(),
            "ratio": self.ratio.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "largest": self.largest,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("tree", "ratio", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.largest.copy_(state["largest"])


# ======================================================================================================================
# The agent and the three phases (Algorithm 1)
# ======================================================================================================================


class Agent:
    """Networks, targets and optimisers. Q_on has a seed of its own, so that every variant shares one offline phase."""

    def __init__(self, args: Args, observation_dim: int, action_dim: int, device: torch.device):
        dimensions, members = (observation_dim, action_dim), args.ensemble_size
        torch.manual_seed(args.seed)
        self.actor = Actor(*dimensions, args.hidden_layers).to(device)
        self.q_off = LayerNormCritic(*dimensions, members, args.hidden_layers).to(device)
        self.temperature = Temperature().to(device)
        self.q_off_target = copy.deepcopy(self.q_off)
        self.actor_optimizer = make_adam(self.actor, args.learning_rate)
        self.q_off_optimizer = make_adam(self.q_off, args.learning_rate)
        self.temperature_optimizer = make_adam(self.temperature, args.learning_rate)
        self.offline_parts = dict(vars(self))  # what offline.pt holds
        if args.opt and args.q_on:
            torch.manual_seed(args.seed + 1_000)
            self.q_on = LayerNormCritic(*dimensions, members, args.hidden_layers).to(device)
            self.q_on_target = copy.deepcopy(self.q_on)
            self.q_on_optimizer = make_adam(self.q_on, args.learning_rate)

    def parts(self) -> dict:
        """Every network and optimiser by name."""
        return {name: part for name, part in vars(self).items() if name != "offline_parts"}

    def critic(self, name: str) -> tuple[nn.Module, nn.Module, torch.optim.Adam]:
        """An ensemble ("q_off" or "q_on"), its target and its optimiser."""
        return getattr(self, name), getattr(self, f"{name}_target"), getattr(self, f"{name}_optimizer")


@torch.no_grad()
def next_samples(args: Args, agent: Agent, batch: Dataset) -> tuple[torch.Tensor, torch.Tensor | float]:
    """a' ~ pi(.|s') [B, action_dim], and what its entropy adds to the value of s', -alpha log pi(a'|s') [B], or 0."""
    actions, log_probs = agent.actor.sample(batch.next_observations)
    return actions, -agent.temperature() * log_probs if args.backup_entropy else 0.0


def critic_step(args: Args, agent: Agent, batch: Dataset, names: list[str]) -> dict:
    """A step of Eq. 2 for each of the ensembles called `names`, each with a target and a subset of its own."""
    metrics = {}
    next_actions, next_bonus = next_samples(args, agent, batch)
    for name in names:
        critic, critic_target, optimizer = agent.critic(name)
        subset = random_subset(args.ensemble_size, args.subset_size, batch.rewards.device)
        target = sac_target(critic_target, subset, batch, next_actions, next_bonus, args.gamma)
        values = critic(batch.observations, batch.actions)
        critic_loss = td_loss(values, target)  # Eq. 2
        minimize(critic_loss, optimizer)
        soft_update(critic_target, critic, args.tau)
        metrics |= {f"{name}_loss": critic_loss.detach(), f"{name}_data_mean": values.detach().mean()}
    return metrics


def policy_step(agent: Agent, observations: torch.Tensor, names: list[str], kappa: torch.Tensor | float) -> dict:
    """A step of the policy, then of the temperature; each of the ensembles called `names` counts by its mean."""
    actions, log_probs = agent.actor.sample(observations)
    values = {name: value(agent.critic(name)[0], observations, actions) for name in names}
    mix_loss = policy_loss(values.get("q_off"), values.get("q_on"), kappa)  # Eq. 4
    actor_loss = mix_loss + (agent.temperature().detach() * log_probs).mean()
    minimize(actor_loss, agent.actor_optimizer)
    alpha = agent.temperature()
    minimize(temperature_loss(alpha, log_probs, -actions.shape[1] / 2), agent.temperature_optimizer)
    metrics = {"actor_loss": actor_loss.detach(), "q_mix_mean": -mix_loss.detach(), "temperature": alpha.detach()}
    metrics |= {f"{name}_mean": q.detach().mean() for name, q in values.items()}
    return metrics | {"entropy": -log_probs.detach().mean()}


def offline_pretrain(args: Args, run: Run, agent: Agent, buffer: ReplayBuffer) -> None:
    """Phase 1: RLPD's update on B_off alone, one policy and temperature step after every utd critic steps."""

    def update(update_policy: bool) -> dict:
        batch = buffer[buffer.sample_offline(args.batch_size)]
        metrics = critic_step(args, agent, batch, ["q_off"])
        if update_policy:
            metrics |= policy_step(agent, batch.observations, ["q_off"], 0.0)
        return metrics

    if run.begin("offline"):
        run.add_evaluation()
    if run.step < args.offline_steps:
        update = capture(update, agent.offline_parts, buffer.rows.device)
    for step in run.steps(args.offline_steps, gradient=1):
        run.metrics |= update((step + 1) % args.utd == 0)


@torch.no_grad()
def explore(args: Args, policy: Policy, observation: np.ndarray) -> np.ndarray:
    """A sample of the policy, in [-1, 1]; SAC has no other noise."""
    return policy.actor.sample(torch.from_numpy(observation).unsqueeze(0))[0].squeeze(0).numpy()


def act_at_random(args: Args, run: Run, collector: Collector) -> None:
    """The start of vanilla's online phase: random_steps uniformly random actions, no update."""
    if run.begin("collect"):
        collector.reset()
    action_dim = collector.buffer.widths[1]
    for _ in run.steps(args.random_steps, env=1, evaluate="never"):
        collector.step(torch.rand(action_dim).numpy() * 2 - 1)


def collect(args: Args, run: Run, collector: Collector, policy: Policy) -> None:
    """Phase 2, first part: N_tau transitions with pi_off, with the noise of every online action [choice]."""
    if run.begin("collect"):
        collector.reset()
    policy.refresh()
    for _ in run.steps(args.n_tau, env=1, evaluate="never"):
        collector.step(explore(args, policy, collector.observation))


def online_pretrain(args: Args, run: Run, agent: Agent, buffer: ReplayBuffer) -> None:
    """Phase 2, second part: N_pretrain gradient steps on Q_on (with --no-q-on, Q_off) alone; all else is frozen."""
    name = "q_on" if args.q_on else "q_off"
    critic, critic_target, optimizer = agent.critic(name)

    def update(_: bool) -> dict:
        n = args.batch_size
        batch = buffer[torch.cat([buffer.sample_offline(n), buffer.sample_online(n)])]
        # The target is that of every other critic step, with the entropy where the backbone's has it [choice]
        next_actions, next_bonus = next_samples(args, agent, batch)
        subset = random_subset(args.ensemble_size, args.subset_size, batch.rewards.device)
        target = sac_target(critic_target, subset, batch, next_actions, next_bonus, args.gamma)
        offline_target, online_target = target.split(n)
        offline, online = Dataset(*(x[:n] for x in batch)), Dataset(*(x[n:] for x in batch))
        if args.q_on_init == "meta":
            loss = meta_adaptation_loss(
                critic, offline, offline_target, online, online_target, args.meta_lr, args.meta_second_order
            )  # Eq. 3
        else:
            loss = td_loss(critic(online.observations, online.actions), online_target)
            if args.q_on_init == "joint":
                loss = loss + td_loss(critic(offline.observations, offline.actions), offline_target)  # Eq. 10
        minimize(loss, optimizer)
        soft_update(critic_target, critic, args.tau)
        return {f"{name}_pretrain_loss": loss.detach()}

    steps = 0 if args.q_on_init == "random" else args.n_pretrain
    if run.begin("online_pretrain") and not steps:
        run.add_evaluation()
    if run.step < steps:
        parts = {part: getattr(agent, part) for part in (name, f"{name}_target", f"{name}_optimizer")}
        update = capture(update, parts, buffer.rows.device)
    for _ in run.steps(steps, gradient=1, evaluate="end"):
        run.metrics |= update(False)


def online_finetune(
    args: Args,
    run: Run,
    agent: Agent,
    buffer: ReplayBuffer,
    balanced: BalancedReplay | None,
    collector: Collector,
    policy: Policy,
) -> None:
    """Phase 3: act, store, utd steps of Eq. 2 (Q_off, Q_on), then one of Eq. 4 (policy) and one of the temperature."""
    with_q_on = args.opt and args.q_on
    # With kappa = 1 throughout, Q_off never reaches the policy: it is not updated.
    with_q_off = not (with_q_on and args.kappa_init == args.kappa_end == 1)
    names = ["q_off"] * with_q_off + ["q_on"] * with_q_on
    kappa = torch.zeros((), device=buffer.rows.device)
    sample = balanced.tree.sample if balanced else getattr(buffer, f"sample_{args.replay}")

    def update(update_policy: bool) -> dict:
        rows = sample(args.batch_size)
        batch = buffer[rows]
        metrics = {"online_share": (rows >= buffer.n_offline).float().mean()}
        metrics |= critic_step(args, agent, batch, names)
        if update_policy:
            metrics |= policy_step(agent, batch.observations, names, kappa)
        if balanced:
            metrics["density_ratio_loss"] = balanced.update(rows, batch)
        return metrics

    if args.random_steps and run.pending("collect"):
        act_at_random(args, run, collector)
    if run.begin("online_finetune"):
        if balanced:
            balanced.start(args.init_online_fraction)
        if not (args.opt or args.random_steps):
            collector.reset()
    parts = agent.parts() | ({"balanced": balanced, "ratio_optimizer": balanced.optimizer} if balanced else {})
    update = capture(update, parts, buffer.rows.device)
    before = args.n_tau if args.opt else args.random_steps
    for _ in run.steps(args.online_steps - before, env=1, gradient=args.utd):
        policy.refresh()
        row = collector.step(explore(args, policy, collector.observation))
        if balanced:
            balanced.add(row)
        if with_q_on:  # Table 15 counts the environment steps of the online phase: the first n_tau are among them
            run.metrics["kappa"] = kappa_at(run.env_steps, args.kappa_init, args.kappa_end, args.kappa_decay)
            kappa.fill_(run.metrics["kappa"])
        for i in range(args.utd):
            run.metrics |= update(i + 1 == args.utd)


def train(args: Args) -> float:
    """Run all phases; returns the last evaluation's normalised score (mean return where D4RL has no reference)."""
    args = resolve(args)
    env, evaluation_env = make_env(args.env_id), make_env(args.env_id)
    checkpoint = prepare_folder(args)
    run = Run(args)
    if checkpoint and checkpoint["phase"] == "done":
        run.load_checkpoint(checkpoint)
        print(f"{run.folder} is complete: score {run.last_score():.1f}")
        return run.last_score()
    offline = None
    if args.offline_from and not checkpoint:
        path = Path(args.offline_from)
        path = path / "offline.pt" if path.is_dir() else path
        offline = read_saved(path, "offline.pt", "write another --offline-from, a run's folder or its offline.pt")
        refuse_differences(offline["args"], args, OFFLINE_ARGS, path, "leave out --offline-from")
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_cpu()
    dataset = load_dataset(args.env_id, args.dataset, args.progress)
    check_dataset(dataset, env, args)
    scale, shift = reward_transform(args.env_id, dataset)
    dataset = dataset._replace(rewards=scale * dataset.rewards + shift)
    env = gym.wrappers.TransformReward(env, lambda reward: scale * reward + shift)

    mean, std = np.zeros(dataset.observations.shape[1], np.float32), np.ones(dataset.observations.shape[1], np.float32)
    if args.normalize_states:
        mean = dataset.observations.mean(0, dtype=np.float64).astype(np.float32)
        std = dataset.observations.std(0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)

    def normalize(observations: np.ndarray) -> np.ndarray:
        """The same numbers offline and online."""
        return (np.asarray(observations, np.float32) - mean) / std

    if args.capture_video:
        record_video(args.env_id, run.folder, None, normalize, args.seed)
    dataset = dataset._replace(
        observations=normalize(dataset.observations),
        next_observations=normalize(dataset.next_observations),
        actions=scale_actions(dataset.actions, evaluation_env),
    )
    buffer = ReplayBuffer(dataset, args.online_steps, device)
    data = {
        "size": buffer.n_offline,
        "crc32": zlib.crc32(buffer.rows[: buffer.n_offline].cpu().numpy()),
        "observation_mean": torch.from_numpy(mean),
        "observation_std": torch.from_numpy(std),
        "reward_scale": scale,
    }
    del dataset
    for other, what in ((checkpoint, "the checkpoint"), (offline, "--offline-from")):
        if other and not all(
            torch.equal(torch.as_tensor(data[key]), torch.as_tensor(other["data"].get(key, math.nan))) for key in data
        ):
            raise bad_input(f"{what} was made with other data for {args.env_id}: give it the same --dataset")

    agent = Agent(args, buffer.widths[0], buffer.widths[1], device)
    torch.manual_seed(args.seed + 2_000)
    balanced = BalancedReplay(buffer, args.batch_size, device) if args.replay == "balanced" else None
    collector, policy = Collector(env, buffer, normalize, args.seed), Policy(agent.actor)
    run.data = data
    run.parts = (
        agent.parts() | {"buffer": buffer, "collector": collector} | ({"balanced": balanced} if balanced else {})
    )
    run.evaluate = lambda: evaluate(policy, evaluation_env, normalize, args.env_id, args.eval_episodes, args.seed)
    if args.reference_model:
        run.estimation_bias = estimation_bias(args, run, agent, evaluation_env, normalize, device)
    try:
        if checkpoint:
            run.load_checkpoint(checkpoint)
        elif offline:
            for name, part in agent.offline_parts.items():
                part.load_state_dict(offline["parts"][name])
                if isinstance(part, torch.optim.Adam):  # the file may come from another device
                    part.param_groups[0]["capturable"] = device.type == "cuda"
            run.phase, run.step = "offline", args.offline_steps
            for name in ("evals", "gradient_steps", "seconds"):
                setattr(run, name, offline[name])
    except (KeyError, RuntimeError, ValueError) as error:
        what = f"{'the checkpoint' if checkpoint else '--offline-from'} is of another version of {PROGRAM}"
        advice = "take that version (git_commit in its args.json), or start a new run in another --run-dir"
        raise bad_input(f"{what} ({brief(error)}): {advice}") from None
    del checkpoint, offline
    run.open()

    if run.pending("offline"):
        offline_pretrain(args, run, agent, buffer)
        parts = {name: part.state_dict() for name, part in agent.offline_parts.items()}
        state = {"kind": "offline.pt", "args": asdict(args), "data": data, "parts": parts}
        state |= {"evals": run.evals, "gradient_steps": run.gradient_steps, "seconds": run.seconds}
        write_whole(run.folder / "offline.pt", saved(state))
    if args.opt and run.pending("collect"):
        collect(args, run, collector, policy)
    if args.opt and run.pending("online_pretrain"):
        online_pretrain(args, run, agent, buffer)
    if run.pending("online_finetune"):
        online_finetune(args, run, agent, buffer, balanced, collector, policy)

    if args.save_model:
        networks = {name: part.state_dict() for name, part in agent.parts().items() if isinstance(part, nn.Module)}
        model = {"kind": "model.pt", "args": asdict(args), "action_dim": buffer.widths[1], **data, **networks}
        model["states"] = buffer.some_states()  # for report.py tsne
        write_whole(run.folder / "model.pt", saved(model))
    if args.capture_video:
        record_video(args.env_id, run.folder, policy, normalize, args.seed)
    run.finish()
    return run.last_score()


########################################################################################################################
# The same text in every script from here on
########################################################################################################################


class Dataset(NamedTuple):
    """N transitions as float32 arrays. A time limit is not a terminal: only terminals stop the bootstrap of Eq. 2."""

    observations: np.ndarray | torch.Tensor  # [N, observation_dim]
    actions: np.ndarray | torch.Tensor  # [N, action_dim]; in a replay buffer scaled to [-1, 1]
    rewards: np.ndarray | torch.Tensor  # [N]
    next_observations: np.ndarray | torch.Tensor  # [N, observation_dim]
    terminals: np.ndarray | torch.Tensor  # [N], 1 where the episode ended by itself, else 0


class ReplayBuffer:
    """B_off and B_on in one table on the training device, a row a transition: offline ones, a ring of online ones."""

    def __init__(self, dataset: Dataset, online_capacity: int, device: torch.device):
        observation_dim, action_dim = dataset.observations.shape[1], dataset.actions.shape[1]
        self.widths = [observation_dim, action_dim, 1, observation_dim, 1]
        self.n_offline, self.online_capacity, self.n_online, self.added = len(dataset.rewards), online_capacity, 0, 0
        self.rows = torch.zeros(self.n_offline + online_capacity, sum(self.widths), device=device)
        for column, values in zip(self.rows[: self.n_offline].split(self.widths, 1), dataset, strict=True):
            column.copy_(torch.from_numpy(values).view(self.n_offline, -1))
        # On the device, so that a CUDA graph sees it grow
        self.online_size = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, *transition) -> int:
        """Store one online transition (the fields of Dataset) over the oldest; returns its row."""
        row = self.n_offline + self.added % self.online_capacity
        self.rows[row].copy_(torch.from_numpy(np.hstack(transition).astype(np.float32)))
        self.added += 1
        self.n_online = min(self.added, self.online_capacity)
        self.online_size.fill_(self.n_online)
        return row

    def __getitem__(self, rows: torch.Tensor) -> Dataset:
        observations, actions, rewards, next_observations, terminals = self.rows.index_select(0, rows).split(
            self.widths, 1
        )
        return Dataset(observations, actions, rewards.squeeze(1), next_observations, terminals.squeeze(1))

    def sample_offline(self, n: int) -> torch.Tensor:
        """n rows of B_off, uniformly, with replacement."""
        return torch.randint(self.n_offline, (n,), device=self.rows.device)

    def sample_online(self, n: int) -> torch.Tensor:
        """n rows of B_on, uniformly, with replacement."""
        return self.n_offline + (torch.rand(n, dtype=torch.float64, device=self.rows.device) * self.online_size).long()

    def sample_uniform(self, n: int) -> torch.Tensor:
        """n rows of the union of both, uniformly, with replacement."""
        return (
            torch.rand(n, dtype=torch.float64, device=self.rows.device) * (self.n_offline + self.online_size)
        ).long()

    def sample_symmetric(self, n: int) -> torch.Tensor:
        """n/2 rows of B_off and n/2 of B_on (RLPD)."""
        return torch.cat([self.sample_offline(n // 2), self.sample_online(n // 2)])

    def some_states(self) -> dict[str, torch.Tensor]:
        """Some 2,000 observations each of B_off and of the oldest and the newest 10,000 online transitions (Fig. 6)."""
        offline, online = self.rows[:, : self.widths[0]].split([self.n_offline, self.online_capacity])
        online = online[: self.n_online]
        parts = {"offline": offline[:: max(1, self.n_offline // 2_000)], "first": online[:10_000:5]}
        return {name: part.cpu().clone() for name, part in (parts | {"last": online[-10_000::5]}).items()}

    def state_dict(self) -> dict:
        return {"added": self.added, "online_rows": self.rows[self.n_offline : self.n_offline + self.n_online].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.n_online = state["added"], len(state["online_rows"])
        self.rows[self.n_offline : self.n_offline + self.n_online] = state["online_rows"].to(self.rows.device)
        self.online_size.fill_(self.n_online)


class Collector:
    """Steps the training environment into the buffer.

    Every episode is reset from a seed of its own, so that a resumed run gets the environment's state back by repeating
    the actions of the unfinished episode; they are the newest rows of the buffer.
    """

    def __init__(self, env: gym.Env, buffer: ReplayBuffer, normalize: Callable, seed: int):
        self.env, self.buffer, self.normalize, self.seed = env, buffer, normalize, seed
        self.episode, self.episode_steps = -1, 0
        self.observation: np.ndarray | None = None  # normalised

    def reset(self) -> None:
        self.episode, self.episode_steps = self.episode + 1, 0
        seed = int(np.random.SeedSequence([self.seed, self.episode]).generate_state(1)[0])
        self.observation = self.normalize(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> int:
        """Take an action in [-1, 1], store the transition, return its row. Starts the next episode where one ends."""
        next_observation, reward, terminated, truncated, _ = self.env.step(action)
        next_observation = self.normalize(next_observation)
        row = self.buffer.add(self.observation, action, reward, next_observation, terminated)
        self.observation, self.episode_steps = next_observation, self.episode_steps + 1
        if terminated or truncated:
            self.reset()
        return row

    def state_dict(self) -> dict:
        return {"episode": self.episode, "episode_steps": self.episode_steps}

    def load_state_dict(self, state: dict) -> None:
        if state["episode"] < 0:
            return
        self.episode = state["episode"] - 1
        self.reset()
        first = self.buffer.added - state["episode_steps"]
        for i in range(first, self.buffer.added):
            row = self.buffer.rows[self.buffer.n_offline + i % self.buffer.online_capacity]
            self.observation = self.normalize(self.env.step(row.split(self.buffer.widths)[1].cpu().numpy())[0])
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
        """Normalised observation [observation_dim] to action [action_dim]."""
        return self.actor(torch.from_numpy(observation).unsqueeze(0)).squeeze(0).numpy()


# ======================================================================================================================
# Tasks: environments, data, evaluation
# ======================================================================================================================


# Gymnasium's v5 with the dynamics of D4RL's -v2 tasks: Walker2d's own v5 model has another foot friction.
MUJOCO_ENVS = {
    "halfcheetah": ("HalfCheetah-v5", {}),
    "hopper": ("Hopper-v5", {}),
    "walker2d": ("Walker2d-v5", {"xml_file": "walker2d.xml"}),
}
MUJOCO_KINDS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
MUJOCO_TASKS = tuple(f"{env}-{kind}-v2" for env in MUJOCO_ENVS for kind in MUJOCO_KINDS)
# Environment, the ant's start and its goal as (row, column) of the maze's map; one each, as D4RL evaluates.
ANTMAZE_ENVS = {
    "umaze": ("AntMaze_UMaze-v4", (3, 1), (1, 1)),
    "medium": ("AntMaze_Medium-v4", (1, 1), (6, 6)),
    "large": ("AntMaze_Large-v4", (1, 1), (7, 9)),
}
ANTMAZE_KINDS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
ANTMAZE_TASKS = tuple(f"antmaze-{kind}-v2" for kind in ANTMAZE_KINDS)
ANTMAZE_RADIUS = 0.45  # within it the goal is reached; gymnasium-robotics' own
# Environment and time limit
ADROIT_ENVS = {
    "pen": ("AdroitHandPen-v1", 100),  # D4RL's; registered with 200
    "hammer": ("AdroitHandHammer-v1", 200),
    "door": ("AdroitHandDoor-v1", 200),
    "relocate": ("AdroitHandRelocate-v1", 200),
}
ADROIT_TASKS = tuple(f"{env}-cloned-v1" for env in ADROIT_ENVS)
TASKS = MUJOCO_TASKS + ANTMAZE_TASKS + ADROIT_TASKS
# D4RL's reference returns (min, max).
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
RANDOM_STEPS = 1_000_000  # D4RL's size
RANDOM_CHUNK = 25_000  # steps that one process regenerates at a time, from a seed of their own


def normalized_score(env_id: str, episode_return: float) -> float:
    """D4RL's score: 0 for its random policy's return, 100 for its expert's; NaN where D4RL has no reference."""
    env = env_id.split("-")[0]
    if env not in REFERENCE_RETURNS or not env_id[len(env) :].startswith("-"):
        return math.nan
    low, high = REFERENCE_RETURNS[env]
    return 100 * (episode_return - low) / (high - low)


def import_environments(module: str = "gymnasium_robotics") -> None:
    """Import a module that registers environments; Farama's notices of other ones stay unseen. Raises ImportError."""
    with contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(module)


def check_env_id(env_id: str, dataset: str | None) -> None:
    """Exit 2 unless `env_id` is a task whose data is known, or a Gymnasium id with a dataset of its own."""
    if env_id in TASKS:
        return
    module, _, name = env_id.rpartition(":")  # "my_module:MyEnv-v0", as in gym.make
    try:
        import_environments(module or "gymnasium_robotics")
    except Exception as error:  # whatever the user's module raises
        if module:
            raise bad_input(f"--env-id {env_id}: {brief(error)}: write a module that can be imported") from None
    if name not in gym.registry:
        near = difflib.get_close_matches(name, [*TASKS, *gym.registry], n=3, cutoff=0.5) or TASKS[:3]
        raise bad_input(f"unknown --env-id {env_id!r}: did you mean {', '.join(near)}?")
    if dataset is None:
        raise bad_input(f"--env-id {env_id} has no D4RL data: give --dataset, a D4RL-style .hdf5 file or a Minari id")


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment of a task, its actions scaled to [-1, 1]. Exit 2 unless observations and actions are vectors."""
    name, kwargs, kind = env_id, {}, env_id.split("-")
    try:
        if env_id in ANTMAZE_TASKS + ADROIT_TASKS:
            import_environments()
        if env_id in MUJOCO_TASKS:
            name, kwargs = MUJOCO_ENVS[kind[0]]
        elif env_id in ADROIT_TASKS:
            name, kwargs["max_episode_steps"] = ADROIT_ENVS[kind[0]]
        elif env_id in ANTMAZE_TASKS:
            name, start, goal = ANTMAZE_ENVS[kind[1]]
            maze = copy.deepcopy(gym.spec(name).kwargs["maze_map"])
            maze[start[0]][start[1]], maze[goal[0]][goal[1]] = "r", "g"
            kwargs = {"maze_map": maze, "continuing_task": False}
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # AntMaze's data is of -v4
            env = gym.make(name, render_mode=render_mode, **kwargs)
        if env_id in ANTMAZE_TASKS:
            env.unwrapped.position_noise_range = 0  # the noise moves the goal, which the observation does not tell
            env.unwrapped.ant_env.unwrapped._reset_noise_scale = 0.1  # D4RL's; without it all episodes start the same
            env = gym.wrappers.FlattenObservation(
                gym.wrappers.FilterObservation(env, ("achieved_goal", "observation"))  # D4RL's 2 + 27 numbers
            )
    except Exception as error:  # a package that it needs is missing, or a user's own environment fails in its own way
        raise bad_input(
            f"--env-id {env_id} cannot be made ({brief(error)}): install what it needs, or mend the environment"
        ) from None
    for what, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise bad_input(
                f"--env-id {env_id} has {type(space).__name__} {what}: write one whose {what} are a flat Box"
            )
    if not env.action_space.is_bounded():
        raise bad_input(f"--env-id {env_id} has unbounded actions: write one whose action Box has finite bounds")
    if (env.action_space.low == -1).all() and (env.action_space.high == 1).all():
        return env
    return ScaledActions(env, np.float32(-1), np.float32(1))


class ScaledActions(gym.wrappers.RescaleAction):
    """What make_env puts around an environment whose actions are not in [-1, 1]."""


def scale_actions(actions: np.ndarray, env: gym.Env) -> np.ndarray:
    """A dataset's actions [N, action_dim] scaled as make_env scaled those of `env`."""
    space = env.env.action_space if isinstance(env, ScaledActions) else env.action_space
    return (actions - (space.high + space.low) / 2) / ((space.high - space.low) / 2)


def cache_path(name: str) -> Path:
    """Where the scripts keep a flat HDF5 file of a dataset."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "opt-datasets" / f"{name.replace('/', '--')}.hdf5"


def cannot_write(path: Path, error: OSError) -> SystemExit:
    """What to say where the cache cannot be written."""
    return bad_input(f"cannot write {path} ({brief(error)}): set XDG_CACHE_HOME to another folder")


def write_hdf5(path: Path, arrays: dict[str, np.ndarray], **attributes) -> None:
    """Write arrays as a D4RL-style file, under a temporary name first: what has the final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(attributes)
            for key, array in arrays.items():
                file.create_dataset(key, data=array)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_hdf5(path: Path) -> Dataset:
    """Read a D4RL-style file.

    Without next_observations the next row is used, and the last step of a cut episode is dropped. Exit 2 if damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            columns = {key: np.asarray(file[key]) for key in (*Dataset._fields, "timeouts") if key in file}
    except (OSError, TypeError) as error:
        raise bad_input(f"{path} cannot be read as HDF5 ({brief(error)}): give a D4RL-style .hdf5 file") from None
    for key in ("observations", "actions", "rewards", "terminals"):
        if key not in columns:
            needed = "observations, actions, rewards, terminals, and next_observations or timeouts"
            raise bad_input(f"{path} has no '{key}': write a file with {needed}")
    if "next_observations" not in columns and "timeouts" not in columns:
        raise bad_input(
            f"{path} has neither 'next_observations' nor 'timeouts', which tell where episodes are cut: add one"
        )
    for key, column in columns.items():
        if not (np.issubdtype(column.dtype, np.number) or column.dtype == bool):
            raise bad_input(f"{path} has '{key}' of type {column.dtype}: write numbers")
        with np.errstate(over="ignore"):
            columns[key] = column = column.astype(np.float32)
        if not np.isfinite(column).all():
            raise bad_input(f"{path} has NaN or infinity in '{key}': remove those transitions")
        if key in ("rewards", "terminals", "timeouts"):
            columns[key] = column.reshape(-1)
    lengths = {key: column.shape[0] if column.ndim else 0 for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise bad_input(f"{path} has columns of different lengths ({counts}): make them equal")
    timeouts = columns.pop("timeouts", None)
    if "next_observations" not in columns:
        terminal = columns["terminals"] > 0
        keep = terminal | (timeouts == 0)
        keep[-1:] &= terminal[-1:]  # the file's last row has no successor
        columns["next_observations"] = np.roll(columns["observations"], -1, axis=0)  # unused behind a terminal
        columns = {key: column[keep] for key, column in columns.items()}
    return Dataset(**columns)


def random_chunk(env_id: str, seed: int, steps: int) -> dict[str, np.ndarray]:
    """`steps` steps of a uniformly random policy. The chunk's last episode is cut like one at the time limit."""
    env = make_env(env_id)
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, next_observation, terminated, truncated and not terminated))
        observation = env.reset()[0] if terminated or truncated else next_observation
    env.close()
    columns = [np.asarray(column) for column in zip(*rows, strict=True)]
    columns[5][-1] = not columns[4][-1]
    types = (np.float32,) * 4 + (bool,) * 2
    keys = (*Dataset._fields, "timeouts")
    return {key: column.astype(kind) for key, column, kind in zip(keys, columns, types, strict=True)}


def regenerate_random(env_id: str, path: Path, progress: bool = True, seed: int = 0, steps: int = RANDOM_STEPS) -> None:
    """Write a *-random-v2 set by D4RL's recipe: uniform actions, episodes cut at 1000 steps.

    A seed gives the same bytes on any number of cores.
    """
    sizes = [min(RANDOM_CHUNK, steps - start) for start in range(0, steps, RANDOM_CHUNK)]
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(sizes))]
    chunks: list = [None] * len(sizes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process
    with (
        tqdm(total=steps, desc=f"regenerating {env_id}", unit="step", unit_scale=True, disable=not progress) as bar,
        ProcessPoolExecutor(min(cores, len(sizes)), spawn, initializer=signal.signal, initargs=ignore) as pool,
    ):
        jobs = {pool.submit(random_chunk, env_id, *job): i for i, job in enumerate(zip(seeds, sizes, strict=True))}
        try:
            for job in as_completed(jobs):
                chunks[jobs[job]] = job.result()
                bar.update(sizes[jobs[job]])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_hdf5(path, {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}, seed=seed)


def download(url: str, path: Path, progress: bool) -> None:
    """Fetch a file, under a temporary name first. Raises OSError where there is no network or no such file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=20) as response, open(temporary, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            name = f"downloading {path.name}"
            with tqdm(total=total or None, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if total and temporary.stat().st_size != total:
            raise OSError(f"the connection broke after {temporary.stat().st_size} of {total} bytes")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def minari_store() -> Path:
    """Minari's local store."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def minari_id(env_id: str) -> str:
    """The Minari id of an AntMaze or Adroit task; a newer version where only that is in the local store, or was."""
    domain, kind = env_id.rsplit("-v", 1)[0].split("-", 1)
    name, first = (f"D4RL/{domain}/{kind}", 1 if domain == "antmaze" else 2)
    ids = [f"{name}-v{version}" for version in range(first, first + 10)]
    stored = [i for i in ids if (minari_store() / i / "data").is_dir()]
    return next(iter(stored or [i for i in ids if minari_copy(i, env_id).exists()] or ids))


def minari_copy(dataset_id: str, env_id: str) -> Path:
    """Where the flat copy of a Minari dataset is kept; AntMaze's is relabelled, each task's to its own goal."""
    return cache_path(f"minari--{dataset_id}" + (f"--{env_id}" if env_id in ANTMAZE_TASKS else ""))


def antmaze_goal(env_id: str) -> np.ndarray:
    """The x-y of the one goal of a task's evaluation environment, [2]."""
    env = make_env(env_id)
    env.reset()
    goal = env.unwrapped.goal.copy()
    env.close()
    return goal


def relabel_antmaze(positions: np.ndarray, goal: np.ndarray) -> tuple[int, np.ndarray]:
    """D4RL's rewards for the one evaluation goal, from the ant's x-y positions [T + 1, 2].

    Returns how many of the T steps are left (the episode ends at its first success) and their rewards, which are 1 at
    the success, else 0. What Minari stored refers to the goal of each episode, which the observation does not tell.
    """
    reached = np.linalg.norm(positions[1:] - goal, axis=1) <= ANTMAZE_RADIUS
    steps = int(reached.argmax()) + 1 if reached.any() else len(reached)
    return steps, reached[:steps].astype(np.float32)


def read_minari(dataset_id: str, env_id: str, progress: bool) -> Dataset:
    """Read a Minari dataset, downloaded if it is not in the local store; AntMaze's is made D4RL's (see README).

    A flat copy is kept in the cache, because Minari reads a group an episode; it is renewed when the dataset changes.
    """
    root, antmaze = minari_store() / dataset_id, env_id in ANTMAZE_TASKS
    path, stored = minari_copy(dataset_id, env_id), (root / "data").is_dir()
    if not stored and not path.exists():
        try:
            minari.download_dataset(dataset_id)
        except Exception as error:  # whatever the remote's client raises: without network, or for an unknown id
            raise bad_input(
                f"no data for {env_id}: {dataset_id} is no file, not in the local Minari store ({root}), and could not "
                f"be downloaded ({brief(error)}). Three ways to get it: --dataset FILE.hdf5 of this environment; "
                "--dataset and an id that `minari list local` shows; or run once with network, to download it"
            ) from None
    files = sorted(file for file in (root / "data").rglob("*") if file.is_file())
    source = " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    if path.exists():
        try:
            with h5py.File(path, "r") as file:
                fresh = not stored or file.attrs["source"] == source
        except (OSError, KeyError) as error:
            if not stored:
                raise bad_input(f"{path} is damaged ({brief(error)}): delete it") from None
            fresh = False
        if fresh:
            return read_hdf5(path)
    columns: dict[str, list] = {key: [] for key in Dataset._fields}
    goal = antmaze_goal(env_id) if antmaze else None
    try:
        episodes = minari.load_dataset(dataset_id)
        bar = tqdm(episodes, total=len(episodes), desc=f"reading {dataset_id}", unit="episode", disable=not progress)
        for episode in bar:
            observations, rewards, terminals = episode.observations, episode.rewards, episode.terminations
            if antmaze and not (isinstance(observations, dict) and "achieved_goal" in observations):
                raise bad_input(f"--dataset {dataset_id} is no AntMaze dataset: write one for {env_id}")
            lengths = {len(column) for column in (episode.actions, rewards, terminals)}
            observed = observations.values() if isinstance(observations, dict) else [observations]
            if lengths != {len(column) - 1 for column in observed}:
                raise ValueError(f"episode {episode.id} has columns of different lengths")
            if antmaze:
                steps, rewards = relabel_antmaze(observations["achieved_goal"], goal)
                terminals = rewards
                observations = np.hstack([observations["achieved_goal"], observations["observation"]])[: steps + 1]
            if isinstance(observations, dict) or isinstance(episode.actions, dict):
                raise bad_input(
                    f"--dataset {dataset_id} has dict observations or actions: write one whose spaces are Boxes"
                )
            columns["observations"].append(np.asarray(observations[:-1], np.float32))
            columns["next_observations"].append(np.asarray(observations[1:], np.float32))
            columns["actions"].append(np.asarray(episode.actions[: len(rewards)], np.float32))
            columns["rewards"].append(np.asarray(rewards, np.float32))
            columns["terminals"].append(np.asarray(terminals, bool))
    except Exception as error:  # Minari has no error of its own for a dataset that is half written
        raise bad_input(
            f"the Minari dataset {root} cannot be read ({brief(error)}): delete it and get it again"
        ) from None
    if not columns["rewards"]:
        raise bad_input(f"the Minari dataset {root} holds no episodes: delete it and get it again")
    try:
        write_hdf5(path, {key: np.concatenate(parts) for key, parts in columns.items()}, source=source)
    except OSError as error:
        raise cannot_write(path, error) from None
    return read_hdf5(path)


def load_dataset(env_id: str, dataset: str | None = None, progress: bool = True) -> Dataset:
    """The offline data of a task.

    First hit wins: `dataset` (a file or a Minari id), D4RL's cache, the scripts' cache, the local Minari store,
    regeneration of a random set, download. Exit 2 where there is none, and for data that is damaged.
    """
    if dataset is not None:
        path = Path(dataset).expanduser()
        if path.is_file():
            return read_hdf5(path)
        if path.suffix in (".hdf5", ".h5") or path.exists():
            raise bad_input(
                f"--dataset {dataset} is not a file: write the path of a D4RL-style .hdf5 file, or a Minari id"
            )
        return read_minari(dataset, env_id, progress)
    if env_id in ANTMAZE_TASKS:  # D4RL's own files are no help: their mazes have another origin
        return read_minari(minari_id(env_id), env_id, progress)
    name = f"{env_id}.hdf5"
    if env_id in MUJOCO_TASKS:
        name = env_id.removesuffix("-v2").replace("-", "_") + "-v2.hdf5"
    d4rl_cache = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / name
    own_cache = cache_path(env_id)
    for path in (d4rl_cache, own_cache):
        if path.exists():
            return read_hdf5(path)
    if env_id in ADROIT_TASKS:
        return read_minari(minari_id(env_id), env_id, progress)
    try:
        if env_id.endswith("-random-v2"):
            regenerate_random(env_id, own_cache, progress)
        else:
            download(D4RL_URL + name, own_cache, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise cannot_write(own_cache, error) from None
        raise bad_input(
            f"no data for {env_id} ({brief(error)}). Three ways to get it: put D4RL's file at {d4rl_cache}; "
            f"give --dataset FILE.hdf5 or a Minari id; or run once with network, to download {D4RL_URL}{name}"
        ) from None
    return read_hdf5(own_cache)


def check_dataset(dataset: Dataset, env: gym.Env, args: Args) -> None:
    """Exit 2 if the data does not fit the environment or is smaller than a batch."""
    state, action = env.observation_space.shape, env.action_space.shape
    for key, shape in {"observations": state, "next_observations": state, "actions": action}.items():
        found = getattr(dataset, key).shape[1:]
        if found != shape:
            raise bad_input(
                f"the data's {key} have shape {found}, those of {args.env_id} {shape}: give its own --dataset"
            )
    if args.env_id in ANTMAZE_TASKS:
        maze, positions = env.unwrapped.maze, dataset.observations[:: max(1, len(dataset.rewards) // 1_000), :2]
        cells = [tuple(int(i) for i in maze.cell_xy_to_rowcol(position)) for position in positions]
        free = {(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1}
        if np.mean([cell in free for cell in cells]) < 0.9:
            raise bad_input(
                f"the data's ant walks outside the maze of {args.env_id}: give data of this maze, with the origin that "
                "Gymnasium-Robotics gives it (D4RL's own files have another)"
            )
    if len(dataset.rewards) < args.batch_size:
        raise bad_input(
            f"--batch-size {args.batch_size} exceeds the data's {len(dataset.rewards)} transitions: lower it"
        )


def evaluate(policy: Policy, env: gym.Env, normalize: Callable, env_id: str, episodes: int, seed: int) -> dict:
    """Roll out `episodes` episodes without noise, from the same start states each time; the columns of evals.csv."""
    policy.refresh()
    returns, lengths, successes = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + 1_000_000 + episode)
        total, length, done, success = 0.0, 0, False, False
        while not done:
            observation, reward, terminated, truncated, info = env.step(policy(normalize(observation)))
            total, length, done = total + float(reward), length + 1, terminated or truncated
            success |= bool(info.get("success", info.get("is_success", False)))
        returns.append(total)
        lengths.append(length)
        if "success" in info or "is_success" in info:
            successes.append(success)
    return {
        "normalized_score": round(normalized_score(env_id, float(np.mean(returns))), 4),
        "return_mean": round(float(np.mean(returns)), 4),
        "return_std": round(float(np.std(returns)), 4),
        "length_mean": round(float(np.mean(lengths)), 2),
        "success_rate": round(float(np.mean(successes)), 4) if successes else "",
    }


def estimation_bias(
    args: Args, run: Run, agent: Agent, env: gym.Env, normalize: Callable, device: torch.device
) -> Callable[[], list[list[str]]]:
    """Values of 10 fixed (initial state, reference's action) pairs minus the reference's own value (Figs. 9, 10).

    Each call gives the rows [pair, Q_off, Q_on, their mix]; what there is not is empty. Exit 2 where the reference is
    of another environment.
    """
    advice = "write another --reference-model, a run's model.pt"
    model = read_saved(Path(args.reference_model), "model.pt", advice)
    if model["args"]["env_id"].split("-")[0] != args.env_id.split("-")[0]:
        raise bad_input(f"{args.reference_model} is of {model['args']['env_id']}, not of {args.env_id}: {advice}")
    try:
        reference = Agent(Args(**model["args"]), len(model["observation_mean"]), model["action_dim"], device)
        for name, part in reference.parts().items():
            if isinstance(part, nn.Module):
                part.load_state_dict(model[name])
        scale = run.data["reward_scale"] / model["reward_scale"]  # of its values to this run's unit of reward
    except (TypeError, KeyError, RuntimeError) as error:
        raise bad_input(f"{args.reference_model} is no model of {PROGRAM} ({brief(error)}): {advice}") from None
    states = np.stack([env.reset(seed=2_000_000 + pair)[0] for pair in range(10)]).astype(np.float32)
    own = torch.from_numpy(normalize(states)).to(device)
    others = ((torch.from_numpy(states) - model["observation_mean"]) / model["observation_std"]).to(device)
    with torch.no_grad():
        actions = reference.actor(others)
        truth = scale * value(reference.q_on if hasattr(reference, "q_on") else reference.q_off, others, actions)

    @torch.no_grad()
    def rows() -> list[list[str]]:
        q_off, q_on = value(agent.q_off, own, actions) - truth, None
        mix = q_off
        if hasattr(agent, "q_on"):
            q_on = value(agent.q_on, own, actions) - truth
            kappa = kappa_at(run.env_steps, args.kappa_init, args.kappa_end, args.kappa_decay) if run.env_steps else 0
            mix = (1 - kappa) * q_off + kappa * q_on
        columns = [
            [f"{x:.4f}" for x in column.tolist()] if column is not None else [""] * 10 for column in (q_off, q_on, mix)
        ]
        return [[str(pair), *row] for pair, row in enumerate(zip(*columns, strict=True))]

    return rows


def record_video(env_id: str, folder: Path, policy: Policy | None, normalize: Callable, seed: int) -> None:
    """Write an episode as an mp4 to `folder`; without a policy only try whether this machine renders (or exit 2)."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_env(env_id, render_mode="rgb_array")
        env.reset(seed=seed)
        env.render()
        gym.wrappers.RecordVideo(env, str(folder), name_prefix="evaluation", disable_logger=True)
    except Exception as error:  # every graphics stack fails in its own way
        raise bad_input(
            f"--capture-video: this machine cannot render {env_id} ({brief(error)}): "
            "install what is missing (MUJOCO_GL chooses egl or osmesa), or leave it out"
        ) from None
    if policy is not None:
        env = gym.wrappers.RecordVideo(env, str(folder), name_prefix="evaluation", disable_logger=True)
        evaluate(policy, env, normalize, env_id, episodes=1, seed=seed)
    env.close()


# ======================================================================================================================
# The run: arguments, folder, logs, checkpoints
# ======================================================================================================================


PROGRAM = Path(__file__).name


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def bad_input(message: str) -> SystemExit:
    """Exit status 2 for what the user can mend, with one line that says what is wrong and what to write instead."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return SystemExit(2)


class Run:
    """A run's folder and counters. `steps` is the loop of every phase."""

    EVALS = (
        "phase",
        "env_steps",
        "gradient_steps",
        "normalized_score",
        "return_mean",
        "return_std",
        "length_mean",
        "success_rate",
        "seconds",
    )
    BIAS = ("phase", "env_steps", "gradient_steps", "pair", "q_off_bias", "q_on_bias", "q_mix_bias")
    SPEED = ("phase", "gradient_steps", "env_steps", "seconds", "gradient_steps_per_second")
    SAVED = ("phase", "step", "phase_seconds", "env_steps", "gradient_steps", "seconds", "evals", "speed", "bias")
    LOG_FREQ = 1_000  # gradient steps between two points of a TensorBoard curve

    def __init__(self, args: Args):
        self.args, self.folder = args, Path(args.run_dir)
        self.phase, self.step, self.phase_seconds = "start", 0, 0.0  # the phase, its steps so far, the time they took
        self.env_steps, self.gradient_steps, self.seconds = 0, 0, 0.0  # of the whole run; seconds with evaluation
        self.evals: list[list[str]] = []
        self.speed: list[list[str]] = []
        self.bias: list[list[str]] = []
        self.metrics: dict[str, torch.Tensor | float] = {}
        self.parts: dict = {}  # name -> what has state_dict and load_state_dict: all that a checkpoint holds
        self.evaluate: Callable[[], dict] = dict  # set by train()
        self.estimation_bias: Callable[[], list] = list  # likewise, with --reference-model
        self.data: dict = {}  # size and statistics of the dataset, by which a checkpoint knows it again
        self.signal, self.old_handlers = 0, {}  # the signal that asked to stop; what handled signals before
        self.writer: SummaryWriter | None = None

    def open(self) -> None:
        """Write args.json and the rows of a resumed run, open TensorBoard and W&B, and take over Ctrl-C and SIGTERM."""
        packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
        versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
        commit = ""
        if shutil.which("git"):
            folder = Path(__file__).resolve().parent
            commit = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder
            ).stdout.strip()
        facts = {
            "versions": {"python": sys.version.split()[0]} | versions,
            "git_commit": commit or None,
            "device_name": torch.cuda.get_device_name() if self.args.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "wandb_id": secrets.token_hex(4),
        }
        if self.phase != "start" and (self.folder / "args.json").exists():  # W&B goes on with the run it had
            facts["wandb_id"] = json.loads((self.folder / "args.json").read_text())["wandb_id"]
        if self.args.track:
            try:
                import wandb

                wandb.init(
                    project=self.args.wandb_project_name,
                    entity=self.args.wandb_entity,
                    name=self.folder.name,
                    id=facts["wandb_id"],
                    resume="allow",
                    dir=str(self.folder),
                    config=asdict(self.args),
                    sync_tensorboard=True,
                )
            except Exception as error:  # not installed, not logged in, not reached
                raise bad_input(f"--track: {brief(error)}: run wandb login, or set WANDB_MODE=offline") from None
        write_whole(self.folder / "args.json", json.dumps(asdict(self.args) | facts, indent=2).encode())
        files = [("evals.csv", self.EVALS, self.evals), ("speed.csv", self.SPEED, self.speed)]
        files += [("bias.csv", self.BIAS, self.bias)] if self.args.reference_model else []
        for name, header, rows in files:
            text = "".join(",".join(row) + "\n" for row in (header, *rows))
            write_whole(self.folder / name, text.encode())
        self.writer = SummaryWriter(
            str(self.folder), purge_step=self.gradient_steps + 1 if self.phase != "start" else None
        )
        if threading.current_thread() is threading.main_thread():
            self.old_handlers = {
                number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def on_signal(self, number: int, frame) -> None:
        """The first Ctrl-C or SIGTERM asks for a checkpoint and the end, a second one does not wait."""
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def pending(self, phase: str) -> bool:
        """Whether a phase is still to be run, or to be gone on with."""
        return PHASES.index(self.phase) <= PHASES.index(phase)

    def begin(self, phase: str) -> bool:
        """Enter a phase, with a seed of its own so that it is the same after any other; False where it goes on."""
        if self.phase == phase:
            return False
        self.phase, self.step, self.phase_seconds, self.metrics = phase, 0, 0.0, {}
        torch.manual_seed(self.args.seed + 10_000 * PHASES.index(phase))
        return True

    def steps(
        self, total: int, env: int = 0, gradient: int = 0, evaluate: Literal["often", "end", "never"] = "often"
    ) -> Iterator[int]:
        """Yield what is left of a phase's `total` steps, each of `env` environment and `gradient` gradient steps.

        Between two steps it logs, evaluates (every eval_freq steps and at the end), checkpoints, and stops on a signal.
        """
        args, every = self.args, max(gradient, 1)
        if self.step == total:
            return
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=self.phase,
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not args.progress,
        )
        self.show_score(bar)
        started = time.perf_counter()
        while self.step < total:
            yield self.step
            self.step += 1
            self.env_steps += env
            self.gradient_steps += gradient
            bar.update()
            last = self.step == total
            log = last or self.step % max(1, self.LOG_FREQ // every) == 0
            due = (
                evaluate == "often" and args.eval_freq and (self.env_steps if env else self.step) % args.eval_freq == 0
            )
            score = due or (last and evaluate != "never")
            save = args.checkpoint_freq and self.step % max(1, args.checkpoint_freq // every) == 0
            if not (log or score or save or self.signal):
                continue
            self.log_metrics()
            elapsed = time.perf_counter() - started
            self.phase_seconds += elapsed
            self.seconds += elapsed
            if last:
                self.add_speed(total * gradient, total * env)
            if score:
                self.add_evaluation()
                self.show_score(bar)
            if save or (last and args.checkpoint_freq):
                self.save_checkpoint()
            if self.signal and not last:
                break
            started = time.perf_counter()
        bar.close()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """After a signal: checkpoint, and exit with 130 (Ctrl-C) or 143 (SIGTERM)."""
        if self.signal:
            self.save_checkpoint()
            print(f"{PROGRAM}: stopped, with a checkpoint; go on with the same command and --resume", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    def log_metrics(self) -> None:
        """The newest metrics to TensorBoard; exit 1 where one is not finite."""
        for name, value in self.metrics.items():
            value = float(value)
            if not math.isfinite(value):
                last = self.folder / "checkpoint.pt"
                kept = f"the last checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
                print(
                    f"{PROGRAM}: {name} is {value} in phase {self.phase}, gradient step {self.gradient_steps}; {kept}",
                    file=sys.stderr,
                )
                raise SystemExit(1)
            self.writer.add_scalar(f"train/{name}", value, self.gradient_steps)

    def add_evaluation(self) -> None:
        """Evaluate and append the row to evals.csv."""
        started = time.perf_counter()
        result = self.evaluate()
        self.seconds += time.perf_counter() - started
        values = {
            "phase": self.phase,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            **result,
            "seconds": round(self.seconds, 2),
        }
        self.evals.append([str(values[key]) for key in self.EVALS])
        self.append_row("evals.csv", self.evals[-1])
        for pair in self.estimation_bias():
            self.bias.append([self.phase, str(self.env_steps), str(self.gradient_steps), *pair])
            self.append_row("bias.csv", self.bias[-1])
        for key in ("normalized_score", "return_mean", "return_std", "length_mean", "success_rate"):
            if values[key] != "" and math.isfinite(values[key]):
                self.writer.add_scalar(f"eval/{key}", values[key], self.gradient_steps)
        self.writer.add_scalar("eval/env_steps", self.env_steps, self.gradient_steps)
        self.writer.flush()

    def add_speed(self, gradient_steps: int, env_steps: int) -> None:
        """Append the finished phase to speed.csv; evaluation and checkpoints are not counted."""
        rate = gradient_steps / max(self.phase_seconds, 1e-9)
        self.speed.append([self.phase, str(gradient_steps), str(env_steps), f"{self.phase_seconds:.3f}", f"{rate:.2f}"])
        self.append_row("speed.csv", self.speed[-1])

    def append_row(self, name: str, row: list[str]) -> None:
        with open(self.folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)

    def last_score(self) -> float:
        """The newest normalised score; the mean return where D4RL has no reference for the environment."""
        row = dict(zip(self.EVALS, self.evals[-1], strict=True))
        return float(row["return_mean"] if row["normalized_score"] == "nan" else row["normalized_score"])

    def show_score(self, bar: tqdm) -> None:
        if self.evals:
            bar.set_postfix(score=f"{self.last_score():.1f}")

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt: all that a resumed run needs to go on bit for bit."""
        state = {name: getattr(self, name) for name in self.SAVED} | {"kind": "checkpoint.pt"}
        state |= {"args": asdict(self.args), "data": self.data}
        state["rng"] = {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state()} if self.args.device == "cuda" else {}
        )
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        write_whole(self.folder / "checkpoint.pt", saved(state))

    def finish(self) -> None:
        """Mark the run complete and close its files. What is in model.pt need not be in the checkpoint as well."""
        self.begin("done")
        if self.args.save_model:
            self.parts = {}
        self.save_checkpoint()
        self.writer.close()
        if self.args.track:
            import wandb

            wandb.finish()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def load_checkpoint(self, state: dict) -> None:
        for name in self.SAVED:
            setattr(self, name, state[name])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def saved(state: dict) -> bytes:
    """What torch.save writes for `state`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: whatever happens, it is the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path: Path, kind: str, advice: str) -> dict:
    """Load a file that a run wrote; exit 2 if it is missing, damaged, or of another kind."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise bad_input(f"{path} does not exist: {advice}") from None
    except Exception as error:  # torch raises half a dozen kinds for a truncated file
        raise bad_input(f"{path} is damaged ({brief(error)}): {advice}") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise bad_input(f"{path} is no {kind}: {advice}")
    return state


def refuse_differences(saved: dict, args: Args, names: list[str], path: Path, advice: str) -> None:
    """Exit 2 where a saved run's arguments differ from these."""
    different = [
        f"--{name.replace('_', '-')} {saved.get(name)} (now {getattr(args, name)})"
        for name in names
        if saved.get(name) != getattr(args, name)
    ]
    if different:
        raise bad_input(f"{path} was made with {', '.join(different)}: write the same, or {advice}")


def prepare_folder(args: Args) -> dict | None:
    """Make the run's folder; with --resume its checkpoint. Exit 2 if it can't be written or holds another run."""
    folder = Path(args.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", b".")
        (folder / ".writable").unlink()
    except OSError as error:
        raise bad_input(
            f"the run folder {folder} cannot be written ({error.strerror}): write another --run-dir"
        ) from None
    checkpoint = folder / "checkpoint.pt"
    if not args.resume:
        if checkpoint.exists() or (folder / "evals.csv").exists():
            raise bad_input(
                f"{folder} holds a run already: write --resume to go on with it, or another --run-dir or --exp-name"
            )
        return None
    if not checkpoint.exists():
        return None
    state = read_saved(checkpoint, "checkpoint.pt", "delete it, and --resume starts from the beginning")
    free = (
        "resume",
        "run_dir",
        "offline_from",
        "checkpoint_freq",
        "save_model",
        "capture_video",
        "track",
        "wandb_project_name",
        "wandb_entity",
        "progress",
    )
    names = [name for name in asdict(args) if name not in free]
    refuse_differences(state["args"], args, names, checkpoint, "start a new run in another --run-dir")
    return state


# ======================================================================================================================
# Speed
# ======================================================================================================================


def tune_cpu() -> None:
    """Three settings for the speed of small networks on a CPU; results stay in float32."""
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay into denormals, which are slow
    try:  # glibc maps and unmaps a 256 KB activation anew at every operation: keep freed memory instead
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 24)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD
    except OSError:
        pass
    # "bf16" hands matrix products to oneDNN, which has AVX-512 on AMD too and still computes in float32; only with AMX
    # would it round to bfloat16: take it back there.
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if (a @ b - (a.double() @ b.double())).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def capture(update: Callable[[bool], dict], parts: dict, device: torch.device) -> Callable[[bool], dict]:
    """On CUDA two CUDA graphs, of `update(False)` and `update(True)`; `parts` and RNG are left as they are."""
    if device.type != "cuda":
        return update

    def tensors(state) -> list[torch.Tensor]:
        if isinstance(state, torch.Tensor):
            return [state]
        values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
        return [tensor for value in values for tensor in tensors(value)]

    # Adam makes its moments at its first step: let it, without moving, and put its count back
    for part in parts.values():
        if isinstance(part, torch.optim.Adam) and not part.state:
            for parameter in part.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            part.step()
            for state in part.state.values():
                state["step"].zero_()
    live = [tensor for part in parts.values() for tensor in tensors(part.state_dict())]
    values, rng = [tensor.clone() for tensor in live], torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # PyTorch asks for a few runs on a side stream before a capture
        for _ in range(3):
            update(False)
            update(True)
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(live, values, strict=True):
        tensor.copy_(value)
    torch.cuda.set_rng_state(rng)
    graphs = {}
    for flag in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            metrics = update(flag)
        graphs[flag] = (graph, metrics)

    def replay(flag: bool) -> dict:
        graph, metrics = graphs[flag]
        graph.replay()
        return metrics

    return replay


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk: what was written before is whole
        sys.exit(f"{PROGRAM}: {error}: the run stopped; mend that, and go on from its last checkpoint with --resume")
