"""RLPD+OPT: its equations against other computations, and what its three variants do in their phases."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import rlpd_opt
import scipy.stats
import torch
from rlpd_opt import Actor, Args, LayerNormCritic, Transitions
from runs import equal, rows, watch_phases
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

CPU = torch.device("cpu")


@pytest.fixture
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(n: int = 16, observation_dim: int = 3, action_dim: int = 2) -> Transitions:
    return Transitions(
        torch.randn(n, observation_dim),
        torch.rand(n, action_dim) * 2 - 1,
        torch.randn(n),
        torch.randn(n, observation_dim),
        (torch.rand(n) < 0.3).to(torch.get_default_dtype()),
    )


def random_critic(hidden_layers: int = 2) -> LayerNormCritic:
    """With biases, scales and shifts that are not their initial zeros and ones."""
    critic = LayerNormCritic(3, 2, 10, hidden_layers)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critic


def separate(critic: LayerNormCritic, member: int) -> nn.Sequential:
    """One member as a network of its own: linear, LayerNorm, ReLU, ..., linear."""

    def linear(layer):
        inputs, outputs = layer.weight.shape[1:]
        network = nn.Linear(inputs, outputs)
        network.load_state_dict({"weight": layer.weight[member].T, "bias": layer.bias[member, 0]})
        return network

    parts = []
    for layer, norm in zip(critic.hidden, critic.norms, strict=True):
        parts += [linear(layer), nn.LayerNorm(256, eps=1e-6), nn.ReLU()]
        parts[-2].load_state_dict({"weight": norm.scale[member, 0], "bias": norm.shift[member, 0]})
    return nn.Sequential(*parts, linear(critic.out))


def numpy_q(critic: LayerNormCritic, member: int, observations, actions) -> np.ndarray:
    x = np.hstack([observations, actions])
    for layer, norm in zip(critic.hidden, critic.norms, strict=True):
        x = x @ layer.weight[member].detach().numpy() + layer.bias[member].detach().numpy()
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        x = np.maximum(x * norm.scale[member].detach().numpy() + norm.shift[member].detach().numpy(), 0)
    return (x @ critic.out.weight[member].detach().numpy() + critic.out.bias[member].detach().numpy())[:, 0]


def squashed(mean: torch.Tensor, std: torch.Tensor) -> TransformedDistribution:
    return TransformedDistribution(Normal(mean, std), [TanhTransform(cache_size=1)])


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_layers", [2, 3])
def test_the_batched_ensemble_equals_ten_networks(double_precision, hidden_layers):
    """Values, and the gradients of Eq. 2 in every parameter and in the actions."""
    critic, data, target = random_critic(hidden_layers), batch(), torch.randn(16)
    actions = data.actions.clone().requires_grad_()
    networks = [separate(critic, member) for member in range(10)]
    values = critic(data.observations, actions)
    expected = torch.stack([network(torch.cat([data.observations, actions], 1)).squeeze(1) for network in networks])
    assert values.shape == (10, 16)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    loss = rlpd_opt.td_loss(values, target)
    gradients = torch.autograd.grad(loss, [actions, *critic.parameters()], retain_graph=True)
    gradients = dict(zip(["actions", *dict(critic.named_parameters())], gradients, strict=True))
    other = sum(((value - target) ** 2).mean() for value in expected)
    torch.testing.assert_close(gradients["actions"], torch.autograd.grad(other, actions, retain_graph=True)[0])
    for member, network in enumerate(networks):
        wanted = torch.autograd.grad(other, list(network.parameters()), retain_graph=True)
        got = []
        for i in range(hidden_layers):
            got += [gradients[f"hidden.{i}.weight"][member].T, gradients[f"hidden.{i}.bias"][member, 0]]
            got += [gradients[f"norms.{i}.scale"][member, 0], gradients[f"norms.{i}.shift"][member, 0]]
        got += [gradients["out.weight"][member].T, gradients["out.bias"][member, 0]]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_batched_ensemble_equals_ten_networks_in_single_precision():
    torch.manual_seed(0)
    critic, data = random_critic(), batch(256)
    expected = [separate(critic, i)(torch.cat([data.observations, data.actions], 1)).squeeze(1) for i in range(10)]
    torch.testing.assert_close(critic(data.observations, data.actions), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_layer_norm_stands_between_each_linear_layer_and_its_relu(double_precision):
    """As numpy has it; no other place of the same LayerNorm gives these values."""
    critic, data = random_critic(), batch()
    inputs = torch.cat([data.observations, data.actions], 1)
    values = critic(data.observations, data.actions)[4]
    np.testing.assert_allclose(values.detach(), numpy_q(critic, 4, data.observations, data.actions), rtol=1e-9)
    linear1, norm1, relu, linear2, norm2, _, out = separate(critic, 4)
    for order in (
        (linear1, relu, norm1, linear2, relu, norm2, out),
        (linear1, norm1, relu, linear2, relu, out),
        (linear1, relu, linear2, norm2, relu, out),
    ):
        assert (nn.Sequential(*order)(inputs).squeeze(1) - values).abs().max() > 0.01


def test_initial_weights_are_xavier_uniform_with_zero_biases():
    args = rlpd_opt.resolve(Args(env_id="hopper-medium-v2"))
    agent = rlpd_opt.Agent(args, 11, 3, CPU)
    layers = [(layer.weight, layer.bias) for layer in (*agent.q_off.hidden, agent.q_off.out, *agent.q_on.hidden)]
    layers += [(layer.weight, layer.bias) for layer in (*agent.actor.hidden, agent.actor.mean, agent.actor.log_std)]
    for weight, bias in layers:
        bound = np.sqrt(6 / sum(weight.shape[-2:]))
        assert scipy.stats.kstest(weight.detach().flatten(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
        assert not bias.any()
    assert not torch.equal(agent.q_off.hidden[0].weight[0], agent.q_off.hidden[0].weight[1])
    assert not torch.equal(agent.q_off.hidden[0].weight, agent.q_on.hidden[0].weight)
    for name in ("q_off", "q_on"):
        critic, target, _ = agent.critic(name)
        assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), target.parameters(), strict=True))
    assert agent.temperature() == 1


def test_log_probability_against_torch_distributions(double_precision):
    mean, log_std, noise = torch.randn(1_000, 3), torch.randn(1_000, 3) * 0.7 - 0.5, torch.randn(1_000, 3)
    mean.requires_grad_(), log_std.requires_grad_()
    before_tanh = mean + log_std.exp() * noise
    got = rlpd_opt.tanh_gaussian_log_prob(noise, log_std, before_tanh)
    distribution = squashed(mean, log_std.exp())
    expected = distribution.log_prob(distribution.transforms[0](before_tanh)).sum(1)
    assert got.shape == (1_000,)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(1_000)
    for a, b in zip(
        *(torch.autograd.grad(weights @ x, (mean, log_std), retain_graph=True) for x in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_log_probability_is_finite_and_right_where_the_action_rounds_to_one():
    mean = torch.tensor([[-200.0], [-20.0], [-12.0], [12.0], [20.0], [200.0]], requires_grad=True)
    log_std = torch.full((6, 1), -1.0, requires_grad=True)
    noise = torch.full((6, 1), 0.5)
    before_tanh = mean + log_std.exp() * noise
    assert (before_tanh.tanh().abs() == 1).all()
    got = rlpd_opt.tanh_gaussian_log_prob(noise, log_std, before_tanh)
    u = before_tanh.detach().double().numpy()[:, 0]
    expected = scipy.stats.norm.logpdf(0.5) + 1 + 2 * np.log(np.cosh(u))  # log(1 - tanh(u)^2) = -2 log cosh(u)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-5)
    for gradient in torch.autograd.grad(got.sum(), (mean, log_std)):
        assert gradient.isfinite().all()
    mean_gradient = torch.autograd.grad(rlpd_opt.tanh_gaussian_log_prob(noise, log_std, mean).sum(), mean)[0]
    np.testing.assert_allclose(mean_gradient[:, 0], 2 * mean.detach()[:, 0].tanh(), rtol=1e-5)


def test_the_policy_samples_its_distribution_and_acts_by_its_mode():
    torch.manual_seed(0)
    actor, observation = Actor(3, 2), torch.tensor([[0.3, -0.8, 0.5]])
    x = torch.relu(actor.hidden[1](torch.relu(actor.hidden[0](observation))))
    mean, std = actor.mean(x), actor.log_std(x).exp()
    torch.testing.assert_close(actor(observation), torch.tanh(mean))
    with torch.no_grad():
        actions, log_probs = actor.sample(observation.expand(20_000, -1))
    for i in range(2):
        before = np.arctanh(actions[:, i].double().numpy())
        assert scipy.stats.kstest(before, "norm", (mean[0, i].item(), std[0, i].item())).pvalue > 1e-3
    expected = TransformedDistribution(Normal(mean.double(), std.double()), [TanhTransform()])
    torch.testing.assert_close(
        log_probs.double(), expected.log_prob(actions.double()).sum(1).detach(), rtol=1e-2, atol=1e-2
    )
    with torch.no_grad():
        actor.log_std.bias.fill_(1e3)
        assert (actor.gaussian(observation)[1] == 2).all()
        actor.log_std.bias.fill_(-1e3)
        assert (actor.gaussian(observation)[1] == -20).all()
        actions, log_probs = actor.sample(observation)
        assert actions.isfinite().all() and log_probs.isfinite().all()


def test_exploration_is_a_sample_of_the_policy():
    torch.manual_seed(0)
    actor, observation = Actor(3, 2), np.array([0.3, -0.8, 0.5], np.float32)
    mean, log_std = (x[0].detach().double().numpy() for x in actor.gaussian(torch.from_numpy(observation)[None]))
    actions = np.stack([rlpd_opt.explore(Args(), rlpd_opt.Policy(actor), observation) for _ in range(3_000)])
    assert actions.shape == (3_000, 2) and abs(actions).max() <= 1
    for i in range(2):
        before = np.arctanh(actions[:, i].astype(float))
        assert scipy.stats.kstest(before, "norm", (mean[i], np.exp(log_std[i]))).pvalue > 1e-3


def test_three_hidden_layers():
    actor = Actor(3, 2, hidden_layers=3)
    x = observations = torch.randn(5, 3)
    for layer in actor.hidden:
        x = torch.relu(layer(x))
    assert len(actor.hidden) == 3
    torch.testing.assert_close(actor(observations), torch.tanh(actor.mean(x)))


# ----------------------------------------------------------------------------------------------------------------------
# Equations
# ----------------------------------------------------------------------------------------------------------------------


def make_agent(**arguments) -> tuple[Args, rlpd_opt.Agent]:
    args = rlpd_opt.resolve(Args(**({"env_id": "hopper-medium-v2", "device": "cpu"} | arguments)))
    agent = rlpd_opt.Agent(args, 3, 2, CPU)
    for name in ("q_off", "q_off_target", "q_on", "q_on_target"):
        getattr(agent, name).load_state_dict(random_critic(args.hidden_layers).state_dict())
    return args, agent


@pytest.mark.parametrize("subset", [[3, 7], [9, 0], [5], list(range(10))], ids=str)
def test_the_subset_minimum_target_against_numpy(double_precision, subset):
    critic, data = random_critic(), batch()
    next_actions, bonus = torch.rand(16, 2) * 2 - 1, torch.randn(16)
    target = rlpd_opt.sac_target(critic, torch.tensor(subset), data, next_actions, bonus, gamma=0.9)
    _, _, r, s2, d = (x.numpy() for x in data)
    smallest = np.min([numpy_q(critic, member, s2, next_actions.numpy()) for member in subset], axis=0)
    np.testing.assert_allclose(target, r + 0.9 * (1 - d) * (smallest + bonus.numpy()), rtol=1e-9)
    assert not target.requires_grad and 0 < d.sum() < 16


@pytest.mark.parametrize("backup_entropy", [True, False])
def test_a_critic_step(double_precision, backup_entropy, monkeypatch):
    """The gradient of each ensemble: next actions sampled once, entropy or none, each its own subset and target."""
    args, agent = make_agent(backup_entropy=backup_entropy)
    with torch.no_grad():
        agent.temperature.log_alpha.fill_(0.7)
    data, got = batch(), []
    old = {name: copy.deepcopy(agent.critic(name)) for name in ("q_off", "q_on")}
    subsets = iter([torch.tensor([2, 5]), torch.tensor([8, 1])])
    monkeypatch.setattr(rlpd_opt, "random_subset", lambda members, size, device: next(subsets))
    minimize = rlpd_opt.minimize
    monkeypatch.setattr(rlpd_opt, "minimize", lambda loss, optimizer: (got.append(loss), minimize(loss, optimizer)))
    torch.manual_seed(7)
    rlpd_opt.critic_step(args, agent, data, ["q_off", "q_on"])

    torch.manual_seed(7)
    mean, log_std = agent.actor.gaussian(data.next_observations)
    distribution = squashed(mean, log_std.exp())
    next_actions = distribution.transforms[0](mean + log_std.exp() * torch.randn(16, 2))
    log_probs = distribution.log_prob(next_actions).sum(1).detach().numpy()
    s, a, r, s2, d = (x.numpy() for x in data)
    for loss, name, subset in zip(got, ("q_off", "q_on"), ([2, 5], [8, 1]), strict=True):
        critic, target_critic, _ = old[name]
        following = np.min([numpy_q(target_critic, i, s2, next_actions.detach().numpy()) for i in subset], axis=0)
        following -= np.exp(0.7) * log_probs * backup_entropy
        y = r + 0.99 * (1 - d) * following
        assert loss.item() == pytest.approx(sum(np.mean((numpy_q(critic, i, s, a) - y) ** 2) for i in range(10)))
        # Adam moved the ensemble, and the target followed it by tau
        for new, new_target, before in zip(
            agent.critic(name)[0].parameters(),
            agent.critic(name)[1].parameters(),
            target_critic.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(new_target, 0.995 * before + 0.005 * new)
        assert not torch.equal(agent.critic(name)[0].out.weight, critic.out.weight)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_eq_4_takes_the_means_of_both_ensembles(double_precision, kappa, monkeypatch):
    """The gradient of the policy step by ten networks twice and torch.distributions; then the temperature's."""
    args, agent = make_agent()
    with torch.no_grad():
        agent.temperature.log_alpha.fill_(-0.4)
    observations, gradients = torch.randn(16, 3), []

    def watch(loss, optimizer):
        gradients.append(torch.autograd.grad(loss, optimizer.param_groups[0]["params"], retain_graph=True))

    monkeypatch.setattr(rlpd_opt, "minimize", watch)
    torch.manual_seed(7)
    metrics = rlpd_opt.policy_step(agent, observations, ["q_off", "q_on"], torch.tensor(kappa))

    torch.manual_seed(7)
    mean, log_std = agent.actor.gaussian(observations)
    distribution = squashed(mean, log_std.exp())
    actions = distribution.transforms[0](mean + log_std.exp() * torch.randn(16, 2))
    log_probs = distribution.log_prob(actions).sum(1)
    inputs = torch.cat([observations, actions], 1)
    off, on = (
        torch.stack([separate(critic, i)(inputs)[:, 0] for i in range(10)]).mean(0)
        for critic in (agent.q_off, agent.q_on)
    )
    loss = (np.exp(-0.4) * log_probs - (1 - kappa) * off - kappa * on).mean()
    for a, b in zip(gradients[0], torch.autograd.grad(loss, list(agent.actor.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert metrics["q_mix_mean"].item() == pytest.approx(((1 - kappa) * off + kappa * on).mean().item())
    # d/d log alpha of alpha (entropy - target), target entropy -action_dim / 2
    assert gradients[1][0].item() == pytest.approx(np.exp(-0.4) * (-log_probs.mean().item() + 1.0))


def test_the_temperature_grows_where_the_entropy_is_too_small_and_falls_where_it_is_too_large():
    for log_prob, sign in ((5.0, 1), (-5.0, -1)):  # entropies -5 and 5, target -1.5
        temperature = rlpd_opt.Temperature()
        optimizer = rlpd_opt.make_adam(temperature, 3e-4)
        loss = rlpd_opt.temperature_loss(temperature(), torch.full((4,), log_prob, requires_grad=True), -1.5)
        rlpd_opt.minimize(loss, optimizer)
        assert temperature.log_alpha.item() == pytest.approx(sign * 3e-4, rel=1e-3)


def test_subsets_are_uniform_over_all_pairs():
    torch.manual_seed(0)
    draws = [tuple(sorted(rlpd_opt.random_subset(10, 2, CPU).tolist())) for _ in range(9_000)]
    pairs = list(itertools.combinations(range(10), 2))
    counts = [draws.count(pair) for pair in pairs]
    assert sum(counts) == 9_000 and scipy.stats.chisquare(counts).pvalue > 1e-3
    assert sorted(rlpd_opt.random_subset(10, 10, CPU).tolist()) == list(range(10))


DOMAINS = [
    ("walker2d-random-v2", 2, True, 2),
    ("hopper-medium-replay-v2", 2, True, 2),
    ("antmaze-umaze-v2", 1, False, 3),
    ("antmaze-large-diverse-v2", 1, False, 3),
    ("pen-cloned-v1", 2, False, 3),
]


@pytest.mark.parametrize("env_id, subset_size, backup_entropy, hidden_layers", DOMAINS)
def test_settings_of_each_domain(env_id, subset_size, backup_entropy, hidden_layers):
    args = rlpd_opt.resolve(Args(env_id=env_id))
    assert (args.subset_size, args.backup_entropy, args.hidden_layers) == (subset_size, backup_entropy, hidden_layers)
    assert (args.utd, args.ensemble_size, args.replay, args.random_steps) == (20, 10, "symmetric", 0)
    assert not args.normalize_states
    agent = rlpd_opt.Agent(args, 5, 2, CPU)
    assert len(agent.q_off.hidden) == len(agent.q_on.norms) == len(agent.actor.hidden) == hidden_layers
    own = rlpd_opt.resolve(Args(env_id=env_id, subset_size=4, backup_entropy=not backup_entropy, hidden_layers=1))
    assert (own.subset_size, own.backup_entropy, own.hidden_layers) == (4, not backup_entropy, 1)


def test_settings_of_each_variant():
    off_to_on = rlpd_opt.resolve(Args(opt=False))
    vanilla = rlpd_opt.resolve(Args(opt=False, offline_steps=0))
    assert (off_to_on.random_steps, vanilla.random_steps) == (0, 5_000)
    assert off_to_on.replay == vanilla.replay == "symmetric"
    assert rlpd_opt.resolve(Args(opt=False, random_steps=10)).random_steps == 10
    assert rlpd_opt.resolve(Args(opt=False, offline_steps=0, online_steps=0)).random_steps == 0
    names = [args.exp_name for args in (rlpd_opt.resolve(Args()), off_to_on, vanilla)]
    assert names == ["rlpd_opt", "rlpd", "rlpd_vanilla"]  # Table 13's three columns, in folders of their own
    assert vanilla.run_dir == "runs/walker2d-random-v2__rlpd_vanilla__0"
    assert rlpd_opt.resolve(Args(opt=False, offline_steps=0, exp_name="mine")).exp_name == "mine"


# ----------------------------------------------------------------------------------------------------------------------
# What a run does, phase by phase
# ----------------------------------------------------------------------------------------------------------------------

SHORT = dict(env_id="InvertedPendulum-v5", offline_steps=24, online_steps=36, n_tau=24, n_pretrain=12, utd=4)
SHORT |= dict(offline_utd=4, batch_size=16, eval_freq=10, eval_episodes=1, progress=False)
VANILLA = dict(opt=False, offline_steps=0, random_steps=14)


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process."""
    monkeypatch.setenv("HOME", str(home))

    def train(name: str = "run", **arguments) -> Path:
        folder = tmp_path / name
        rlpd_opt.train(Args(**(SHORT | {"dataset": str(pendulum_file), "run_dir": str(folder)} | arguments)))
        return folder

    return train


@pytest.fixture
def watched(train, monkeypatch):
    """Train in this process, with a copy of all parts at the start of every phase and at the end."""

    def watched(**arguments) -> dict[str, dict]:
        states = watch_phases(rlpd_opt, monkeypatch)
        train(**arguments)
        return states

    return watched


def changed(before: dict, after: dict) -> set[str]:
    agent = before.keys() - {"buffer", "collector", "balanced", "ratio_optimizer"}
    return {name for name in agent if not equal(before[name], after[name])}


def steps_of(optimizer: dict) -> set[int]:
    return {int(state["step"]) for state in optimizer["state"].values()}


Q_OFF, Q_ON = ({name, f"{name}_target", f"{name}_optimizer"} for name in ("q_off", "q_on"))
POLICY = {"actor", "actor_optimizer", "temperature", "temperature_optimizer"}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"replay": "balanced"},
        {"replay": "online"},
        {"replay": "uniform"},
        {"q_on": False},
        {"q_on_init": "random"},
        {"kappa_init": 1.0, "kappa_end": 1.0},
    ],
    ids=str,
)
def test_what_each_phase_of_opt_changes(watched, arguments):
    """Bit for bit; and as many steps as the protocol says: Adam counts them."""
    states = watched(**arguments)
    with_q_on = arguments.get("q_on", True)
    assert ("q_on" in states["done"]) == with_q_on
    assert changed(states["offline"], states["collect"]) == Q_OFF | POLICY
    assert changed(states["collect"], states["online_pretrain"]) == set()
    pretrained = set() if arguments.get("q_on_init") == "random" else Q_ON if with_q_on else Q_OFF
    assert changed(states["online_pretrain"], states["online_finetune"]) == pretrained
    kappa_1 = arguments.get("kappa_init") == 1.0
    fine_tuned = POLICY | (Q_ON if with_q_on else set()) | (set() if kappa_1 else Q_OFF)
    assert changed(states["online_finetune"], states["done"]) == fine_tuned
    done, online = states["done"], 12 * 4
    assert steps_of(done["actor_optimizer"]) == steps_of(done["temperature_optimizer"]) == {24 // 4 + 12}
    assert steps_of(done["q_off_optimizer"]) == {24 + (0 if kappa_1 else online) + (0 if with_q_on else 12)}
    if with_q_on:
        assert steps_of(done["q_on_optimizer"]) == {online + (12 if pretrained else 0)}
    assert len(states["online_pretrain"]["buffer"]["online_rows"]) == 24
    assert len(done["buffer"]["online_rows"]) == 36
    assert ("balanced" in done) == (arguments.get("replay") == "balanced")


def test_off_to_on(watched):
    states = watched(opt=False)
    assert list(states) == ["offline", "online_finetune", "done"] and "q_on" not in states["done"]
    assert changed(states["offline"], states["online_finetune"]) == Q_OFF | POLICY
    assert changed(states["online_finetune"], states["done"]) == Q_OFF | POLICY
    assert steps_of(states["done"]["q_off_optimizer"]) == {24 + 36 * 4}
    assert steps_of(states["done"]["actor_optimizer"]) == {24 // 4 + 36}


def test_vanilla_acts_at_random_before_its_first_update(watched, tmp_path):
    states = watched(**VANILLA | {"random_steps": 400, "online_steps": 410, "env_id": "InvertedPendulum-v5"})
    assert list(states) == ["offline", "collect", "online_finetune", "done"]
    assert changed(states["offline"], states["online_finetune"]) == set()
    actions = states["online_finetune"]["buffer"]["online_rows"][:, 4]
    assert len(actions) == 400 and scipy.stats.kstest(actions, "uniform", (-1, 2)).pvalue > 1e-3
    assert steps_of(states["done"]["q_off_optimizer"]) == {40} and steps_of(states["done"]["actor_optimizer"]) == {10}
    counts = [(row["phase"], row["gradient_steps"], row["env_steps"]) for row in rows(tmp_path / "run", "speed.csv")]
    assert counts == [("collect", "0", "400"), ("online_finetune", "40", "10")]
    last = rows(tmp_path / "run")[-1]
    assert (last["env_steps"], last["gradient_steps"]) == ("410", "40")


@pytest.mark.parametrize("variant", [{}, {"opt": False}, VANILLA], ids=str)
def test_half_of_every_batch_is_from_each_buffer_and_subsets_change(train, variant, monkeypatch):
    phase, shares, subsets = [], {"offline": [], "online_finetune": []}, []
    loop, getitem, random_subset = rlpd_opt.Run.loop, rlpd_opt.ReplayBuffer.__getitem__, rlpd_opt.random_subset

    def watch_rows(self, indices):
        if phase[-1] in shares:
            shares[phase[-1]].append((len(indices), (indices >= self.n_offline).sum().item()))
        return getitem(self, indices)

    def watch_subset(*arguments):
        subsets.append(random_subset(*arguments))
        return subsets[-1]

    monkeypatch.setattr(rlpd_opt.Run, "loop", lambda *a, **kw: (phase.append(a[1]), loop(*a, **kw))[1])
    monkeypatch.setattr(rlpd_opt.ReplayBuffer, "__getitem__", watch_rows)
    monkeypatch.setattr(rlpd_opt, "random_subset", watch_subset)
    train(**variant)
    assert shares["offline"] == [(16, 0)] * variant.get("offline_steps", 24)
    fine_tuning = {True: 12, False: 22 if variant is VANILLA else 36}[variant.get("opt", True)] * 4
    assert shares["online_finetune"] == [(16, 8)] * fine_tuning
    assert all(len(set(subset.tolist())) == 2 for subset in subsets)
    repeated = sum(set(a.tolist()) == set(b.tolist()) for a, b in itertools.pairwise(subsets))
    assert repeated < len(subsets) / 10  # one in 45 by chance


@pytest.mark.parametrize(
    "variant, names, kappas",
    [
        # kappa from 0.1 to 0.9 over 60 environment steps, of which the collection took 24
        ({"kappa_decay": 60}, ("q_off", "q_on"), [0.1 + 0.8 * t / 60 for t in range(24, 36)]),
        ({"kappa_init": 1.0, "kappa_end": 1.0}, ("q_on",), [1.0] * 12),
        ({"q_on": False}, ("q_off",), [0.0] * 12),
        ({"opt": False}, ("q_off",), [0.0] * 36),
        (VANILLA, ("q_off",), [0.0] * 22),
    ],
    ids=str,
)
def test_utd_critic_steps_then_a_policy_step_on_the_last_batch(train, variant, names, kappas, monkeypatch):
    events = []
    critic_step, policy_step = rlpd_opt.critic_step, rlpd_opt.policy_step

    def watch_critic(args, agent, batch, names):
        events.append(("critic", tuple(names), batch.observations.clone()))
        return critic_step(args, agent, batch, names)

    def watch_policy(agent, observations, names, kappa):
        events.append(("policy", tuple(names), observations.clone(), float(kappa)))
        return policy_step(agent, observations, names, kappa)

    monkeypatch.setattr(rlpd_opt, "critic_step", watch_critic)
    monkeypatch.setattr(rlpd_opt, "policy_step", watch_policy)
    train(**variant)
    blocks = [events[i : i + 5] for i in range(0, len(events), 5)]
    offline = variant.get("offline_steps", 24) // 4
    assert len(blocks) == offline + len(kappas)
    for block, kappa in zip(blocks, [0.0] * offline + kappas, strict=True):
        wanted = ("q_off",) if offline else names
        offline = max(0, offline - 1)
        assert [event[:2] for event in block] == [("critic", wanted)] * 4 + [("policy", wanted)]
        assert torch.equal(block[4][2], block[3][2]) and not torch.equal(block[4][2], block[2][2])
        assert block[4][3] == pytest.approx(kappa, rel=1e-6)


@pytest.mark.parametrize("offline_utd, policy_steps", [(1, 24), (4, 6), (20, 1)])
def test_offline_steps_are_critic_steps_and_offline_utd_of_them_share_a_policy_step(train, offline_utd, policy_steps):
    assert Args().offline_utd == 1
    parts = torch.load(train(offline_utd=offline_utd) / "offline.pt", weights_only=True)["parts"]
    steps = {name: part["state"][0]["step"].item() for name, part in parts.items() if name.endswith("_optimizer")}
    assert steps == {"q_off_optimizer": 24, "actor_optimizer": policy_steps, "temperature_optimizer": policy_steps}


def test_opt_collects_and_fine_tunes_with_the_policys_exploration(watched, monkeypatch):
    count = iter(range(100))
    monkeypatch.setattr(rlpd_opt, "explore", lambda *_: np.array([next(count) / 100], np.float32))
    actions = watched()["done"]["buffer"]["online_rows"][:, 4]
    torch.testing.assert_close(actions, torch.arange(36) / 100)


INITS = [{}, {"meta_second_order": True}, {"q_on_init": "joint"}, {"q_on_init": "online"}]


@pytest.mark.parametrize("arguments", INITS, ids=str)
def test_one_step_of_online_pretraining_is_the_loss_it_is_said_to_be(watched, arguments, monkeypatch):
    """Recompute the first step's target and gradient on the very batch by ten networks of their own."""
    seen, gradients, agents = [], [], []
    sac_target, minimize, online_pretrain = rlpd_opt.sac_target, rlpd_opt.minimize, rlpd_opt.online_pretrain

    def watch_target(q_target, subset, data, next_actions, next_bonus, gamma):
        assert q_target is agents[0].q_on_target and gamma == 0.99
        target = sac_target(q_target, subset, data, next_actions, next_bonus, gamma)
        seen.append((subset, data, next_actions, next_bonus, target))
        return target

    def watch(loss, optimizer):
        minimize(loss, optimizer)
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    def watch_pretrain(args, run, agent, buffer):
        agents.append(agent)
        monkeypatch.setattr(rlpd_opt, "sac_target", watch_target)
        monkeypatch.setattr(rlpd_opt, "minimize", watch)
        online_pretrain(args, run, agent, buffer)
        monkeypatch.setattr(rlpd_opt, "sac_target", sac_target)

    monkeypatch.setattr(rlpd_opt, "online_pretrain", watch_pretrain)
    states = watched(offline_steps=0, n_pretrain=1, meta_lr=0.01, **arguments)
    ((subset, data, next_actions, bonus, target),), got = seen, gradients[0]
    critic, target_critic, actor = LayerNormCritic(4, 1), LayerNormCritic(4, 1), Actor(4, 1)
    before = states["online_pretrain"]
    for network, name in ((critic, "q_on"), (target_critic, "q_on_target"), (actor, "actor")):
        network.load_state_dict(before[name])
    with torch.no_grad():
        mean, log_std = actor.gaussian(data.next_observations)
    log_probs = squashed(mean.double(), log_std.exp().double()).log_prob(next_actions.double()).sum(1)
    # The backup has the entropy here as elsewhere; the temperature starts at 1
    np.testing.assert_allclose(bonus, -np.exp(before["temperature"]["log_alpha"].item()) * log_probs, atol=2e-2)
    noise = (torch.atanh(next_actions.double()) - mean) / log_std.exp()  # a sample of the policy, not its mode
    assert scipy.stats.kstest(noise.numpy()[:, 0], "norm").pvalue > 1e-3
    assert len(set(subset.tolist())) == 2 and len(target) == 32
    with torch.no_grad():
        following = [numpy_q(target_critic, i, data.next_observations, next_actions) for i in subset]
    following = np.min(following, axis=0) + bonus.numpy()
    expected = data.rewards.numpy() + 0.99 * (1 - data.terminals.numpy()) * following
    np.testing.assert_allclose(target, expected, rtol=1e-3, atol=1e-3)
    got = dict(zip(dict(critic.named_parameters()), got, strict=True))
    stored = before["buffer"]["online_rows"]
    assert all((stored[:, :4] == o).all(1).any() for o in data.observations[16:])
    inputs = torch.cat([data.observations, data.actions], 1)
    for member in (0, 6, 9):
        network = separate(critic, member)
        parameters = dict(network.named_parameters())

        def loss(part, weights, network=network):
            return ((torch.func.functional_call(network, weights, (inputs[part],))[:, 0] - target[part]) ** 2).mean()

        off, on, order = slice(0, 16), slice(16, 32), arguments.get("meta_second_order", False)
        adapted = parameters
        if "q_on_init" not in arguments:  # Eq. 3, else Eq. 10
            inner = torch.autograd.grad(loss(off, parameters), list(parameters.values()), create_graph=order)
            adapted = {name: p - 0.01 * g for (name, p), g in zip(parameters.items(), inner, strict=True)}
        total = loss(on, adapted)
        if arguments.get("q_on_init") != "online":
            total = total + loss(off, parameters)
        expected = torch.autograd.grad(total, list(parameters.values()))
        names = ["hidden.0.weight", "hidden.0.bias", "norms.0.scale", "norms.0.shift", "hidden.1.weight"]
        names += ["hidden.1.bias", "norms.1.scale", "norms.1.shift", "out.weight", "out.bias"]
        for name, want in zip(names, expected, strict=True):
            a = got[name][member]
            a = a.T if name.endswith("weight") else a[0]
            torch.testing.assert_close(a, want, rtol=1e-2, atol=1e-3 * want.abs().max().item())


OFFLINE = [("offline", 0, n) for n in (0, 10, 20, 24)]
EVALUATIONS = [
    ({}, OFFLINE + [("online_pretrain", 24, 36), ("online_finetune", 30, 60), ("online_finetune", 36, 84)]),
    ({"opt": False}, OFFLINE + [("online_finetune", n, 24 + 4 * n) for n in (10, 20, 30, 36)]),
    (VANILLA, [("offline", 0, 0), ("collect", 14, 0)] + [("online_finetune", n, 4 * (n - 14)) for n in (20, 30, 36)]),
]


@pytest.mark.parametrize("variant, evaluations", EVALUATIONS)
def test_when_it_evaluates_and_what_it_leaves(train, variant, evaluations):
    folder = train(**variant)
    steps = [(row["phase"], int(row["env_steps"]), int(row["gradient_steps"])) for row in rows(folder)]
    assert steps == evaluations
    offline = torch.load(folder / "offline.pt", weights_only=True)["parts"]
    assert set(offline) == Q_OFF | POLICY and (variant is VANILLA) == (offline["temperature"]["log_alpha"] == 0)
    model = torch.load(folder / "model.pt", weights_only=True)
    networks = {"actor", "temperature", "q_off", "q_off_target"} | ({"q_on", "q_on_target"} if not variant else set())
    assert model.keys() >= networks and ("q_on" in model) == (not variant)
    assert model["observation_mean"].tolist() == [0] * 4 and model["observation_std"].tolist() == [1] * 4
    actor = Actor(4, model["action_dim"], model["args"]["hidden_layers"])
    actor.load_state_dict(model["actor"])
    assert actor(torch.randn(7, 4)).shape == (7, 1)


@pytest.mark.parametrize(
    "words, arguments",
    [
        (["--replay symmetric", "even --batch-size"], dict(batch_size=15)),
        (["--replay symmetric", "even --batch-size"], dict(batch_size=15, **VANILLA)),
        (["--replay balanced", "--replay uniform"], dict(opt=False, replay="balanced")),
        (["--random-steps is 36", "less than --online-steps (36)"], VANILLA | {"random_steps": 36}),
        (["--random-steps is 5000", "(36)"], dict(opt=False, offline_steps=0)),
        (["--random-steps is 5", "less than --online-steps (0)"], VANILLA | {"random_steps": 5, "online_steps": 0}),
        (["--random-steps", "--no-opt", "OPT collects with its policy"], dict(random_steps=5)),
        (["--subset-size is 11", "at most --ensemble-size (10)"], dict(subset_size=11)),
        (["--subset-size is 2", "at most --ensemble-size (1)"], dict(ensemble_size=1)),
        (["--subset-size is 0", "1 or more"], dict(subset_size=0)),
        (["--ensemble-size is 0", "1 or more"], dict(ensemble_size=0)),
        (["--hidden-layers is 0", "1 or more"], dict(hidden_layers=0)),
        (["--n-tau is 36", "less than --online-steps (36)"], dict(n_tau=36)),
        (["--kappa-*", "--no-q-on"], dict(q_on=False, kappa_init=0.5)),
        (["--kappa-*", "--no-opt"], dict(opt=False, kappa_end=0.5)),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together(words, arguments):
    with pytest.raises(rlpd_opt.BadInput) as error:
        rlpd_opt.resolve(Args(**(SHORT | arguments)))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
