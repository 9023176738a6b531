"""Cal-QL: its equations and returns against computations of another kind, and whole runs against plain code."""

import copy
import itertools
import math

import cal_ql
import gymnasium as gym
import iql_opt
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from cal_ql import Actor, Agent, Args, Critic, Transitions
from runs import ALGORITHMS, equal, rows, run_script, same_weights, timeless, watch_phases
from test_goal_tasks import Walk, collect
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

CPU = torch.device("cpu")


@pytest.fixture
def double():
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


def shaken(network: nn.Module, scale: float = 0.2) -> nn.Module:
    """With weights that are not their initial ones, whose last layer is nearly 0."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter) / math.sqrt(parameter.shape[0]))
    return network


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


def plain_critics(critic: Critic) -> list[nn.Sequential]:
    """Each member as a network of its own, with its values."""
    networks = []
    for member in range(2):
        layers = []
        for layer in critic.layers:
            linear = nn.Linear(*layer.weight.shape[1:])
            linear.load_state_dict({"weight": layer.weight[member].T, "bias": layer.bias[member, 0]})
            layers += [linear, nn.ReLU()]
        networks.append(nn.Sequential(*layers[:-1]))
    return networks


def plain_gaussian(actor: Actor, observations: torch.Tensor) -> Normal:
    x = observations
    for layer in actor.layers[:-1]:
        x = torch.relu(layer(x))
    out = actor.layers[-1](x)
    size = out.shape[1] // 2
    log_std = out[:, size:] * actor.log_std_scale + actor.log_std_offset
    return Normal(out[:, :size], torch.clip(log_std, -20, 2).exp())


@pytest.mark.parametrize("hidden_layers", [1, 2, 4])
def test_critics_are_two_plain_networks(double, hidden_layers):
    critic, data = shaken(Critic(3, 2, hidden_layers)), batch()
    values = critic(data.observations, data.actions)
    assert values.shape == (2, 16)
    for mine, network in zip(values, plain_critics(critic), strict=True):
        assert len(network) == 2 * hidden_layers + 1
        torch.testing.assert_close(mine, network(torch.cat([data.observations, data.actions], 1))[:, 0])


@pytest.mark.parametrize("hidden_layers", [2, 3])
def test_orthogonal_initial_weights(hidden_layers):
    """W W^T (or W^T W) is the gain squared times the identity; biases are 0."""
    actor, critic = Actor(11, 3, hidden_layers), Critic(11, 3, hidden_layers)
    for network in (actor, critic):
        assert len(network.layers) == hidden_layers + 1
        for layer in network.layers:
            gain = 0.01 if layer is network.layers[-1] else math.sqrt(2)
            for weight in layer.weight if network is critic else [layer.weight]:
                wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
                product = (wide @ wide.T).detach() / gain**2
                torch.testing.assert_close(product, torch.eye(len(wide)), rtol=0, atol=1e-4)
            assert not layer.bias.any()
    assert not torch.equal(critic.layers[0].weight[0], critic.layers[0].weight[1])
    assert (actor.log_std_scale.item(), actor.log_std_offset.item()) == (1, -1)
    args = cal_ql.resolve(Args(env_id="antmaze-umaze-v2"))
    agent = Agent(args, 11, 3, CPU)
    assert (agent.temperature().item(), agent.multiplier().item()) == pytest.approx((1, math.e))
    assert equal(agent.q.state_dict(), agent.q_target.state_dict())


def test_the_policy_is_the_squashed_gaussian_it_is_said_to_be(double):
    actor, data = shaken(Actor(3, 2, 3)), batch()
    with torch.no_grad():
        actor.log_std_scale.fill_(1.7)
        actor.log_std_offset.fill_(-0.4)
    normal = plain_gaussian(actor, data.observations)
    torch.testing.assert_close(actor(data.observations), torch.tanh(normal.mean))
    torch.manual_seed(3)
    actions, log_probs = actor.sample(data.observations, 5)
    torch.manual_seed(3)
    noise = torch.randn(5, 16, 2)
    squashed = TransformedDistribution(normal, [TanhTransform()])
    torch.testing.assert_close(actions.view(5, 16, 2), torch.tanh(normal.mean + normal.stddev * noise))
    torch.testing.assert_close(log_probs.view(5, 16), squashed.log_prob(actions.view(5, 16, 2)).sum(2))
    loss, other = log_probs.sum() + actions.sum(), squashed.log_prob(actions.view(5, 16, 2)).sum() + actions.sum()
    for mine, plain in zip(
        *(torch.autograd.grad(x, list(actor.parameters()), retain_graph=True) for x in (loss, other)), strict=True
    ):
        torch.testing.assert_close(mine, plain)
    with torch.no_grad():
        for offset, bound in ((50.0, 2.0), (-50.0, -20.0)):
            actor.log_std_offset.fill_(offset)
            assert (actor.gaussian(data.observations)[1] == bound).all()


def test_exploration_is_a_sample_of_the_policy():
    torch.manual_seed(0)
    actor, observation = shaken(Actor(3, 2)), np.array([0.3, -0.8, 0.5], np.float32)
    normal = plain_gaussian(actor, torch.from_numpy(observation)[None])
    actions = np.stack([cal_ql.explore(cal_ql.Policy(actor), observation) for _ in range(2_000)])
    assert actions.shape == (2_000, 2) and actions.dtype == np.float32
    for i in range(2):
        moments = normal.mean[0, i].item(), normal.stddev[0, i].item()
        assert scipy.stats.kstest(np.arctanh(actions[:, i].astype(float)), "norm", moments).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Returns
# ----------------------------------------------------------------------------------------------------------------------


def by_hand(rewards, gamma: float) -> list[float]:
    return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def test_returns_to_go():
    rewards = np.float32([1, -2, 0.5, 3])
    expected = [1 - 0.9 * 2 + 0.81 * 0.5 + 0.729 * 3, -2 + 0.9 * 0.5 + 0.81 * 3, 0.5 + 0.9 * 3, 3]
    for env_id in ("hopper-medium-v2", "pen-cloned-v1", "InvertedPendulum-v5", "antmaze-umaze-v2"):
        got = cal_ql.returns_to_go(Args(env_id=env_id, gamma=0.9), rewards)
        assert got.dtype == np.float32 and got.tolist() == pytest.approx(expected)
    reached = cal_ql.returns_to_go(Args(env_id="antmaze-umaze-v2", gamma=0.9), np.float32([-5, 5, -5]))
    assert reached.tolist() == pytest.approx([-5 + 0.9 * 5 - 0.81 * 5, 5 - 0.9 * 5, -5])  # a failure after the success


@pytest.mark.parametrize("length", [1, 2, 700, 1_000])
def test_an_antmaze_episode_without_success_has_the_return_of_failing_for_ever(length):
    scale, shift = cal_ql.reward_transform("antmaze-medium-play-v2", None)
    failure, success = scale * np.zeros(length, np.float32) + shift, np.float32(scale * 1 + shift)
    assert (failure[0], success) == (-5, 5)
    args = Args(env_id="antmaze-medium-play-v2")
    np.testing.assert_allclose(cal_ql.returns_to_go(args, failure), np.full(length, -500), rtol=1e-6)
    reached = np.append(failure, success)
    closed = [-5 * (1 - 0.99**k) / 0.01 + 5 * 0.99**k for k in range(length, -1, -1)]  # k failures, then the goal
    np.testing.assert_allclose(cal_ql.returns_to_go(args, reached), closed, rtol=1e-5, atol=1e-4)
    dense = cal_ql.returns_to_go(Args(env_id="hopper-medium-v2"), failure)  # no such rule elsewhere
    assert dense[-1] == -5 and dense[0] == pytest.approx(-500 * (1 - 0.99**length), rel=1e-5)


def three_episodes() -> Transitions:
    """0 1 2, whose terminal is where the next starts; 2 3, cut; 7 8 9 10, cut by the file's end."""
    observations = np.array([0, 1, 2, 2, 3, 7, 8, 9, 10], np.float32)[:, None]
    following = np.array([1, 2, 2, 3, 4, 8, 9, 10, 11], np.float32)[:, None]
    terminals = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0], np.float32)
    rewards = np.array([1, 2, 3, 0.5, 1.5, 1, 3, 3, 5], np.float32)
    return Transitions(observations, np.zeros((9, 1), np.float32), rewards, following, terminals)


def test_episodes_of_the_data_start_where_those_of_iql_do():
    data = three_episodes()
    assert cal_ql.episode_starts(data).tolist() == [0, 3, 5]
    returns = np.add.reduceat(data.rewards, cal_ql.episode_starts(data))  # 6, 2 and 12
    assert iql_opt.reward_transform("hopper-medium-v2", data)[0] == 1_000 / (returns.max() - returns.min())


def test_returns_of_the_data_and_of_what_is_added():
    data, args = three_episodes(), Args(env_id="InvertedPendulum-v5", gamma=0.5)
    buffer = cal_ql.ReplayBuffer(data, 7, CPU)
    returns = cal_ql.Returns(args, data, buffer)
    offline = by_hand([1, 2, 3], 0.5) + by_hand([0.5, 1.5], 0.5) + by_hand([1, 3, 3, 5], 0.5)
    assert returns.column.tolist() == pytest.approx(offline + [0] * 7)

    def add(*rewards: float) -> None:
        for reward in rewards:
            buffer.add([0], [0], reward, [0], 0)

    add(4, 6)
    returns.end_episode(2)
    add(8)
    assert returns.column.tolist() == pytest.approx(offline + [7, 6] + [0] * 5)  # the running one's is not known
    add(2, 1)
    returns.end_episode(3)
    expected = offline + [7, 6, 9.25, 2.5, 1, 0, 0]
    assert returns.column.tolist() == pytest.approx(expected)
    assert returns[torch.tensor([0, 11, 2])].tolist() == pytest.approx([expected[0], 9.25, expected[2]])
    other = cal_ql.Returns(args, data, buffer)
    other.load_state_dict(returns.state_dict())
    assert torch.equal(other.column, returns.column)


# ----------------------------------------------------------------------------------------------------------------------
# Equations
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_the_max_backup_target_against_numpy(double, k):
    critic, data = shaken(Critic(3, 2), 1.0), batch()
    actions = torch.rand(k, 16, 2) * 2 - 1
    got = cal_ql.max_backup_target(critic, data, actions.flatten(0, 1), gamma=0.9)
    networks, expected = plain_critics(critic), []
    for i in range(16):
        best = -math.inf
        for action in actions[:, i]:
            inputs = torch.cat([data.next_observations[i], action])
            best = max(best, min(network(inputs).item() for network in networks))
        expected.append(data.rewards[i].item() + 0.9 * (1 - data.terminals[i].item()) * best)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert not got.requires_grad and 0 < data.terminals.sum() < 16


def gaps_and_gradients(values, log_densities, data_values, bound, clip=0.0):
    values, data_values = values.clone().requires_grad_(), data_values.clone().requires_grad_()
    gaps = cal_ql.conservative_gap(values, log_densities, data_values, bound, clip)
    return gaps.detach(), *torch.autograd.grad(gaps.sum(), [values, data_values])


@pytest.fixture
def drawn(double):
    return torch.randn(2, 12, 16), torch.randn(12, 16), torch.randn(2, 16)


def test_without_a_bound_it_is_cql(drawn):
    """CQL(H) with importance sampling, by scipy; its gradient is the softmax of Q - log density, less the data's."""
    values, log_densities, data_values = drawn
    gaps, gradient, data_gradient = gaps_and_gradients(*drawn, torch.full((16,), -math.inf))
    logits = values.numpy() - log_densities.numpy()
    expected = (scipy.special.logsumexp(logits, axis=1) - data_values.numpy()).mean(1)
    np.testing.assert_allclose(gaps, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, scipy.special.softmax(logits, axis=1) / 16, rtol=1e-9)
    np.testing.assert_allclose(data_gradient, np.full((2, 16), -1 / 16))


def test_a_return_above_every_value_leaves_the_uniform_actions_alone_pushed(drawn):
    values, log_densities, _ = drawn
    returns = torch.linspace(10, 11, 16)
    gaps, gradient, data_gradient = gaps_and_gradients(*drawn, returns)
    lifted = np.concatenate([values[:, :4].numpy(), np.broadcast_to(returns.numpy(), (2, 8, 16))], 1)
    share = scipy.special.softmax(lifted - log_densities.numpy(), axis=1)
    np.testing.assert_allclose(gradient[:, :4], share[:, :4] / 16, rtol=1e-9)
    assert not gradient[:, 4:].any() and gradient[:, :4].min() > 0
    np.testing.assert_allclose(data_gradient, np.full((2, 16), -1 / 16))
    low = gaps_and_gradients(*drawn, torch.full((16,), -10.0))
    assert (gaps > low[0]).all() and low[1].min() > 0


def test_the_bound_holds_for_each_action_and_state_alone(drawn):
    values, _, _ = drawn
    returns = torch.randn(16)
    _, gradient, _ = gaps_and_gradients(*drawn, returns)
    below = values[:, 4:] < returns
    assert 0.2 < below.double().mean() < 0.8
    assert torch.equal(gradient[:, 4:] == 0, below) and (gradient[:, :4] > 0).all()


def test_a_row_below_the_clip_counts_as_the_clip_and_pulls_nothing(drawn):
    values, log_densities, data_values = drawn
    data_values = data_values + torch.where(torch.arange(16) < 5, 300.0, 0.0)
    bound = torch.full((16,), -math.inf)
    gaps, gradient, data_gradient = gaps_and_gradients(values, log_densities, data_values, bound, 200.0)
    each = scipy.special.logsumexp(values.numpy() - log_densities.numpy(), axis=1) - data_values.numpy()
    np.testing.assert_allclose(gaps, np.maximum(each, -200).mean(1), rtol=1e-12)
    assert (each[:, :5] < -200).all() and (each[:, 5:] > -200).all()
    assert not gradient[:, :, :5].any() and not data_gradient[:, :5].any() and (data_gradient[:, 5:] != 0).all()


def make_agent(observation_dim: int = 3, action_dim: int = 2, **arguments) -> tuple[Args, Agent]:
    """With weights that are not near 0, and a target of its own."""
    args = cal_ql.resolve(Args(**({"env_id": "hopper-medium-v2", "device": "cpu"} | arguments)))
    agent = Agent(args, observation_dim, action_dim, CPU)
    for network in (agent.actor, agent.q, agent.q_target):
        shaken(network)
    return args, agent


def test_what_the_penalty_takes(double, monkeypatch):
    """n uniform actions, n of pi(s) and n of pi(s'), all valued at s, each with its density in closed form."""
    args, agent = make_agent(cql_actions=300)
    data, calls, given = batch(), [], []
    forward, gap = Critic.forward, cal_ql.conservative_gap
    monkeypatch.setattr(Critic, "forward", lambda *a: calls.append(a) or forward(*a))
    monkeypatch.setattr(cal_ql, "conservative_gap", lambda *a: given.append(a) or gap(*a))
    with torch.no_grad():
        here, following = (plain_gaussian(agent.actor, x) for x in (data.observations, data.next_observations))
    q = plain_critics(agent.q)
    metrics = cal_ql.cal_ql_step(args, agent, data, torch.zeros(16))
    assert all(torch.equal(c[1], data.observations.repeat(len(c[1]) // 16, 1)) for c in calls if c[0] is agent.q)
    pi, of_data = (c[2].detach() for c in calls if c[0] is agent.q and len(c[2]) == 16)
    assert torch.equal(of_data, data.actions)
    with torch.no_grad():  # what is logged: the lesser value of the policy's own actions, and that of the data's
        logged = [torch.stack([net(torch.cat([data.observations, a], 1))[:, 0] for net in q]) for a in (pi, of_data)]
    assert metrics["q_mean"].item() == pytest.approx(logged[0].amin(0).mean().item(), rel=1e-9)
    assert metrics["q_data_mean"].item() == pytest.approx(logged[1].mean().item(), rel=1e-9)
    actions = torch.cat([c[2] for c in calls if c[0] is agent.q and len(c[2]) > 16]).view(900, 16, 2)
    ((values, log_densities, data_values, bound, clip),) = given
    uniform, of_policy = actions[:300], actions[300:]
    for i in range(2):
        assert scipy.stats.kstest(uniform[:, :, i].flatten(), "uniform", (-1, 2)).pvalue > 1e-3
    assert (log_densities[:300] == -2 * math.log(2)).all()  # (1/2)^2
    u = np.arctanh(of_policy.numpy())
    densities = [
        (scipy.stats.norm(n.mean, n.stddev).logpdf(u) - np.log(1 - of_policy.numpy() ** 2)).sum(2)
        for n in (here, following)
    ]
    of_here = np.isclose(log_densities[300:], densities[0], rtol=1e-6, atol=1e-6)
    of_following = np.isclose(log_densities[300:], densities[1], rtol=1e-6, atol=1e-6)
    assert (of_here ^ of_following).all() and (of_here.sum(0) == 300).all()
    for normal, mask in ((here, of_here), (following, of_following)):
        noise = ((u - normal.mean.numpy()) / normal.stddev.numpy())[mask]
        assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    for mine, network in zip(values, q, strict=True):
        inputs = torch.cat([data.observations.expand(900, -1, -1), actions], 2)
        want = network.requires_grad_(False)(inputs)[:, :, 0]
        assert (mine - want).abs().max() < 1e-9
    assert not bound.any() and clip == 0
    assert cal_ql.cal_ql_step(args, agent, data, torch.full((16,), 1e3))["bounded_share"] == 1


def plain_step(nets: dict, adams: dict, data: Transitions, returns: torch.Tensor, args: Args) -> None:
    """A step of Cal-QL as the paper and its code have it: a network a module, an optimiser a network, loops."""
    n, (size, action_dim) = args.cql_actions, data.actions.shape
    actor, critics, targets = nets["actor"], nets["critics"], nets["targets"]

    def draw(observations, k):
        normal = plain_gaussian(actor, observations)
        u = normal.mean + normal.stddev * torch.randn(k, len(observations), action_dim)
        log_prob = normal.log_prob(u) - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), log_prob.sum(2)

    def value(network, observations, actions):
        return network(torch.cat([observations.expand(*actions.shape[:-1], -1), actions], -1)).squeeze(-1)

    pi, log_pi = (x[0] for x in draw(data.observations, 1))
    log_alpha = nets["log_alpha"]
    losses = {"log_alpha": -(log_alpha * (log_pi.detach() + (-action_dim))).mean()}
    q_pi = torch.minimum(*(value(q, data.observations, pi) for q in critics))
    losses["actor"] = (log_alpha.exp().item() * log_pi - q_pi).mean()
    with torch.no_grad():
        following, _ = draw(data.next_observations, n if args.max_backup else 1)
        q_following = torch.minimum(*(value(q, data.next_observations, following) for q in targets)).max(0).values
        y = data.rewards + args.gamma * (1 - data.terminals) * q_following
        policy, policy_log_prob = draw(torch.cat([data.observations, data.next_observations]), n)
        policy, policy_log_prob = policy.view(2 * n, size, action_dim), policy_log_prob.view(2 * n, size)
        uniform = torch.rand(n, size, action_dim) * 2 - 1
    gaps = []
    for i, q in enumerate(critics):
        q_data = value(q, data.observations, data.actions)
        q_policy = value(q, data.observations, policy)
        if args.calibration:
            q_policy = torch.where(q_policy < returns, returns, q_policy)
        weighted = (value(q, data.observations, uniform) - math.log(0.5**action_dim), q_policy - policy_log_prob)
        difference = torch.cat(weighted).exp().sum(0).log() - q_data
        if args.gap_clip:
            difference = torch.clip(difference, -args.gap_clip)
        gap = difference.mean()
        gaps.append(gap.item())
        losses[f"q{i}"] = ((q_data - y) ** 2).mean() + args.cql_weight * gap
        if args.lagrange:
            eta = min(math.exp(nets["log_eta"].item()), 1e6)
            losses[f"q{i}"] = ((q_data - y) ** 2).mean() + args.cql_weight * eta * (gap - args.target_gap)
    if args.lagrange:
        eta = torch.clip(nets["log_eta"].exp(), 0, 1e6)
        losses["log_eta"] = -sum(args.cql_weight * eta * (gap - args.target_gap) for gap in gaps) / 2
    parameters = [list(adams[name].param_groups[0]["params"]) for name in losses]
    gradients = [torch.autograd.grad(*x, retain_graph=True) for x in zip(losses.values(), parameters, strict=True)]
    for name, own, gradient in zip(losses, parameters, gradients, strict=True):
        for parameter, g in zip(own, gradient, strict=True):
            parameter.grad = g
        adams[name].step()
    with torch.no_grad():
        for target, q in zip(targets, critics, strict=True):
            for old, new in zip(target.parameters(), q.parameters(), strict=True):
                old.copy_((1 - args.tau) * old + args.tau * new)


def plain_agent(agent: Agent, args: Args) -> tuple[dict, dict]:
    nets = {"actor": copy.deepcopy(agent.actor)}
    nets |= {"critics": plain_critics(agent.q), "targets": plain_critics(agent.q_target)}
    nets["log_alpha"] = nn.Parameter(agent.temperature.log_alpha.detach().clone())
    groups = {"actor": list(nets["actor"].parameters()), "log_alpha": [nets["log_alpha"]]}
    groups |= {f"q{i}": list(q.parameters()) for i, q in enumerate(nets["critics"])}
    if args.lagrange:
        nets["log_eta"] = nn.Parameter(agent.multiplier.log_eta.detach().clone())
        groups["log_eta"] = [nets["log_eta"]]
    rates = {name: args.critic_learning_rate if name[0] == "q" or name == "log_eta" else args.actor_learning_rate
             for name in groups}  # fmt: skip
    return nets, {name: torch.optim.Adam(group, rates[name], fused=False) for name, group in groups.items()}


def weights_of(nets: dict) -> dict[str, torch.Tensor]:
    found = {f"actor.{name}": p for name, p in nets["actor"].named_parameters()}
    for kind in ("critics", "targets"):
        for member, network in enumerate(nets[kind]):
            for i, layer in enumerate(network[::2]):
                found |= {f"{kind}.{member}.{i}.weight": layer.weight.T, f"{kind}.{member}.{i}.bias": layer.bias}
    return {name: p.detach() for name, p in (found | {k: v for k, v in nets.items() if k[:3] == "log"}).items()}


def weights_of_agent(parts: dict) -> dict[str, torch.Tensor]:
    """The same names, from state_dicts."""
    found = {f"actor.{name}": p for name, p in parts["actor"].items()}
    for kind, part in (("critics", parts["q"]), ("targets", parts["q_target"])):
        for name, p in part.items():
            _, i, what = name.split(".")
            for member in range(2):
                found[f"{kind}.{member}.{i}.{what}"] = p[member] if what == "weight" else p[member, 0]
    found["log_alpha"] = parts["temperature"]["log_alpha"]
    return found | ({"log_eta": parts["multiplier"]["log_eta"]} if "multiplier" in parts else {})


LAGRANGE = dict(lagrange=True, max_backup=True, cql_weight=5.0)
VARIANTS = [
    {},
    LAGRANGE,
    {"max_backup": True, "gap_clip": 2.0, "cql_weight": 1.0},
    {"calibration": False, "gamma": 0.8},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_are_those_of_plain_code(double, variant):
    """Five, from the same random numbers; with policy and critics moving so that an order of updates shows."""
    args, agent = make_agent(cql_actions=3, actor_learning_rate=3e-2, critic_learning_rate=1e-2, tau=0.1, **variant)
    nets, adams = plain_agent(agent, args)
    before = weights_of(copy.deepcopy(nets))
    for seed in range(5):
        data, returns = batch(), torch.randn(16)
        torch.manual_seed(seed)
        cal_ql.cal_ql_step(args, agent, data, returns)
        torch.manual_seed(seed)
        plain_step(nets, adams, data, returns, args)
    mine = weights_of_agent({name: part.state_dict() for name, part in agent.parts().items()})
    plain = weights_of(nets)
    assert mine.keys() == plain.keys() == before.keys() and ("log_eta" in mine) == (variant is LAGRANGE)
    for name, want in plain.items():
        torch.testing.assert_close(mine[name], want, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: name + text)
        assert (want - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("log_eta, gap, slope", [(1.0, 3.0, -1), (1.0, 0.1, 1), (0.3, 0.8, 0), (14.0, 3.0, None)])
def test_the_multiplier_grows_where_the_gap_is_above_its_target(double, monkeypatch, log_eta, gap, slope):
    """dL/dl = -(1/2) sum_j 5 eta (D_j - 0.8), and 0 beyond eta = 1e6; where D = 0.8 it rests."""
    args, agent = make_agent(**LAGRANGE)
    with torch.no_grad():
        agent.multiplier.log_eta.fill_(log_eta)
    monkeypatch.setattr(
        cal_ql, "conservative_gap", lambda values, *rest: torch.tensor([gap, 2 * gap - 0.8]) + 0 * values.sum()
    )
    cal_ql.cal_ql_step(args, agent, batch(), torch.zeros(16))
    expected = -0.5 * 5 * math.exp(log_eta) * ((gap - 0.8) + (2 * gap - 1.6))
    assert agent.multiplier.log_eta.grad.item() == pytest.approx(expected if slope is not None else 0, abs=1e-9)
    assert np.sign(agent.multiplier.log_eta.item() - log_eta) == (0 if slope is None else -slope)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

SHORT = dict(env_id="InvertedPendulum-v5", offline_steps=6, online_steps=40, batch_size=16, cql_actions=3, tau=0.3)
SHORT |= dict(eval_freq=0, eval_episodes=1, actor_layers=2, critic_layers=2, progress=False, device="cpu")
SHORT |= dict(actor_learning_rate=2e-3, critic_learning_rate=1e-3)


class Recorded(gym.Wrapper):
    """The rewards of its episodes, a list each."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **kwargs):
        self.episodes.append([])
        return self.env.reset(**kwargs)

    def step(self, action):
        result = self.env.step(action)
        self.episodes[-1].append(result[1])
        return result


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process, episodes cut after 5 steps: arguments, states at the phases, rewards of the episodes."""
    monkeypatch.setenv("HOME", str(home))
    made, make = [], cal_ql.make_env

    def make_env(*args, **kwargs):
        made.append(Recorded(gym.wrappers.TimeLimit(make(*args, **kwargs), 5)))
        return made[-1]

    def train(folder: str = "run", **arguments) -> tuple:
        made.clear()
        own = SHORT | dict(dataset=str(pendulum_file), run_dir=str(tmp_path / folder))
        args = cal_ql.resolve(Args(**(own | arguments)))
        with monkeypatch.context() as patch:
            states = watch_phases(cal_ql, patch)
            patch.setattr(cal_ql, "make_env", make_env)
            cal_ql.train(args)
        return args, states, [episode for episode in made[0].episodes if episode]

    return train


def test_returns_of_a_whole_run(train, pendulum_columns):
    """Offline and online, against sums by hand; episodes are cut without a terminal, the last one by the run's end."""
    args, states, episodes = train(gamma=0.9)
    column, done = states["done"]["returns"]["column"], states["done"]
    ends = np.flatnonzero(pendulum_columns["terminals"] | pendulum_columns["timeouts"]) + 1
    offline = [g for part in np.split(pendulum_columns["rewards"], ends) for g in by_hand(part, 0.9)]
    np.testing.assert_allclose(column[:5_000], offline, rtol=1e-5)
    online = [g for episode in episodes for g in by_hand(episode, 0.9)]
    np.testing.assert_allclose(column[5_000:], online, rtol=1e-5)
    lengths = [len(episode) for episode in episodes]
    terminals = done["buffer"]["online_rows"][:, -1][np.cumsum(lengths) - 1].tolist()
    assert sum(lengths) == 40 and lengths[-1] < 5 and terminals.count(0) > 3 and terminals.count(1) > 3
    assert not states["online_finetune"]["returns"]["column"][5_000:].any()


def test_returns_of_a_run_on_antmaze(train, tmp_path, monkeypatch):
    """Rewards of -5, and 5 at the goal; without a success, in the data or online, -500 from every step."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/antmaze/umaze-v1", Walk(), [None, {"short": True}])
    antmaze = dict(env_id="antmaze-umaze-v2", dataset=None, critic_layers=2, batch_size=8, online_steps=8)
    _, states, episodes = train(**antmaze)
    column = states["done"]["returns"]["column"].tolist()
    assert column[:12] == pytest.approx([-5 * (1 - 0.99**k) / 0.01 + 5 * 0.99**k for k in range(11, -1, -1)], rel=1e-5)
    assert column[12:] == pytest.approx([-500] * 3 + [-500] * 8) and episodes == [[0] * 5, [0] * 3]


def test_updates_come_after_an_episode_as_many_as_it_had_steps_and_see_none_of_the_next(train, monkeypatch):
    events, loop, getitem, step = [], cal_ql.Run.loop, cal_ql.ReplayBuffer.__getitem__, cal_ql.Collector.step
    ended, open_steps = [0], [0]

    def watch_step(self, action):
        row = step(self, action)
        open_steps[0] += 1
        events.append("act")
        if self.episode_steps == 0:
            ended[0], open_steps[0] = ended[0] + open_steps[0], 0
        return row

    def watch_rows(self, indices):
        if self.n_online:
            assert self.n_online in (ended[0], 40)
            assert (indices >= self.n_offline).tolist() == [False] * 8 + [True] * 8
            assert indices.max() < self.n_offline + self.n_online
            events.append("update")
            seen.update(indices[8:].tolist())
        return getitem(self, indices)

    def watch_loop(run, phase, *args, **kwargs):
        for i in loop(run, phase, *args, **kwargs):
            yield i
            if phase == "online_finetune":  # what a checkpoint would have: the debt is the running episode's length
                steps = run.agent.q_optimizer.state_dict()["state"][0]["step"].item()
                assert steps == 6 + 2 * (i + 1 - (run.parts["collector"].episode_steps if i < 39 else 0))

    seen = set()
    monkeypatch.setattr(cal_ql.Collector, "step", watch_step)
    monkeypatch.setattr(cal_ql.ReplayBuffer, "__getitem__", watch_rows)
    monkeypatch.setattr(cal_ql.Run, "loop", watch_loop)
    args, states, episodes = train(utd=2)
    expected = [["act"] * len(episode) + ["update"] * (2 * len(episode)) for episode in episodes]
    assert events == list(itertools.chain.from_iterable(expected))
    assert seen <= set(range(5_000, 5_040)) and len(seen) > 30 and len(episodes[-1]) < 5
    for name in ("actor", "q", "temperature"):
        assert states["done"][f"{name}_optimizer"]["state"][0]["step"] == 6 + 2 * 40
    last = rows(ALGORITHMS / args.run_dir)[-1]
    assert (last["phase"], last["env_steps"], last["gradient_steps"]) == ("online_finetune", "40", "86")


@pytest.mark.parametrize("variant", [{}, LAGRANGE | {"utd": 2, "tau": 0.05}, {"calibration": False}], ids=str)
def test_a_whole_run_is_plain_code(train, pendulum_columns, variant):
    """Both phases from their seeds on: the rows that are drawn, exploration, returns, updates, when they come."""
    args, states, episodes = train(**variant)
    agent = Agent(args, 4, 1, CPU)
    nets, adams = plain_agent(agent, args)
    before = weights_of(copy.deepcopy(nets))
    table = torch.cat([torch.as_tensor(pendulum_columns[key], dtype=torch.float32).view(5_000, -1) for key in
                       ("observations", "actions", "rewards", "next_observations", "terminals")], 1)  # fmt: skip
    table[:, 4:5] /= 3  # the pendulum's actions go from -3 to 3
    ends = np.flatnonzero(pendulum_columns["terminals"] | pendulum_columns["timeouts"]) + 1
    returns = [g for part in np.split(pendulum_columns["rewards"], ends) for g in by_hand(part, 0.99)]
    returns = torch.tensor(returns + [g for episode in episodes for g in by_hand(episode, 0.99)])
    table = torch.cat([table, states["done"]["buffer"]["online_rows"]])

    def update(chosen):
        s, a, r, following, d = table[chosen].split([4, 1, 1, 4, 1], 1)
        plain_step(nets, adams, Transitions(s, a, r[:, 0], following, d[:, 0]), returns[chosen], args)

    def compare(parts):
        mine, plain = weights_of_agent(parts), weights_of(nets)
        assert mine.keys() == plain.keys()
        for name, want in plain.items():
            assert (mine[name] - want).norm() <= 0.05 * (want - before[name]).norm(), name

    torch.manual_seed(10_000)
    for _ in range(6):
        update(torch.randint(5_000, (16,)))
    compare(states["online_finetune"])
    torch.manual_seed(20_000)
    size = 0
    for episode in episodes:
        for _ in episode:
            with torch.no_grad():
                normal = plain_gaussian(nets["actor"], table[5_000 + size : 5_001 + size, :4])
                action = torch.tanh(normal.mean + normal.stddev * torch.randn(1, 1))
            torch.testing.assert_close(table[5_000 + size, 4:5], action[0], rtol=1e-2, atol=1e-3)
            size += 1
        for _ in range(args.utd * len(episode)):
            offline = torch.randint(5_000, (8,))
            update(torch.cat([offline, 5_000 + (torch.rand(8, dtype=torch.float64) * size).long()]))
    assert size == 40
    compare(states["done"])


KILLED_IN_A_DEBT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import cal_ql
calls, step = [], cal_ql.cal_ql_step
def killed(*given):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)
cal_ql.cal_ql_step = killed
cal_ql.train(cal_ql.parse_args())
"""


def test_a_run_killed_while_it_pays_pays_all_of_it(home, pendulum_file, tmp_path):
    flags = "--env-id InvertedPendulum-v5 --offline-steps 4 --online-steps 40 --batch-size 16 --cql-actions 2".split()
    flags += "--checkpoint-freq 3 --eval-freq 0 --eval-episodes 1 --no-progress --critic-layers 1".split()
    arguments = (*flags, "--dataset", pendulum_file, "--run-dir")
    whole = run_script("cal_ql", home, *arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    code = KILLED_IN_A_DEBT.format(folder=str(ALGORITHMS), call=25)
    killed = run_script("cal_ql", home, *arguments, tmp_path / "run", code=code)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert killed.returncode == -9 and saved["phase"] == "online_finetune", killed.stderr
    taken = saved["parts"]["q_optimizer"]["state"][0]["step"].item()
    assert saved["parts"]["collector"]["episode_steps"] == saved["step"] - (taken - 4) > 0
    resumed = run_script("cal_ql", home, *arguments, tmp_path / "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(tmp_path / "run", tmp_path / "whole") and timeless(tmp_path / "run") == timeless(
        tmp_path / "whole"
    )


def test_phases_what_they_leave_and_a_shared_offline_phase(train, tmp_path):
    args, states, _ = train("whole", lagrange=True)
    assert list(states) == ["offline", "online_finetune", "done"]
    networks = {"actor", "q", "q_target", "temperature", "multiplier"}
    parts = networks | {f"{name}_optimizer" for name in networks - {"q_target"}}
    for before, after in itertools.pairwise(states):  # everything learns in both phases, and nothing starts anew
        assert not any(equal(states[before][name], states[after][name]) for name in parts)
    offline = torch.load(tmp_path / "whole" / "offline.pt", weights_only=True)
    assert offline["parts"].keys() == parts
    assert all(equal(offline["parts"][name], states["online_finetune"][name]) for name in parts)
    assert [(row["phase"], row["env_steps"], row["gradient_steps"]) for row in rows(tmp_path / "whole")] == [
        ("offline", "0", "0"), ("offline", "0", "6"), ("online_finetune", "40", "46")
    ]  # fmt: skip
    train("shared", lagrange=True, offline_from=str(tmp_path / "whole"))
    assert timeless(tmp_path / "shared") == timeless(tmp_path / "whole")
    assert same_weights(tmp_path / "shared", tmp_path / "whole")
    model = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    actor = Actor(4, model["action_dim"], model["args"]["actor_layers"])
    actor.load_state_dict(model["actor"])
    assert networks <= model.keys() and actor(torch.randn(7, 4)).shape == (7, 1)


def test_without_calibration_it_is_another_run(train):
    """Offline; that it goes on online, test_a_whole_run_is_plain_code shows."""
    (_, calibrated, _), (args, plain, _) = train("a"), train("b", calibration=False)
    assert not equal(calibrated["online_finetune"]["q"], plain["online_finetune"]["q"])
    assert args.exp_name == "cql"


DOMAINS = [  # weight, lagrange, max-backup, clip, policy's learning rate, layers of policy and critics
    ("antmaze-medium-play-v2", (5.0, True, True, 0.0, 1e-4, 2, 4), (10.0, -5.0)),
    ("antmaze-umaze-diverse-v2", (5.0, True, True, 0.0, 1e-4, 2, 4), (10.0, -5.0)),
    ("pen-cloned-v1", (1.0, False, True, 200.0, 1e-4, 3, 3), (1.0, 0.0)),
    ("halfcheetah-random-v2", (10.0, False, False, 0.0, 3e-5, 3, 3), (1.0, 0.0)),
    ("InvertedPendulum-v5", (10.0, False, False, 0.0, 3e-5, 3, 3), (1.0, 0.0)),
]
NAMES = "cql_weight lagrange max_backup gap_clip actor_learning_rate actor_layers critic_layers".split()


@pytest.mark.parametrize("env_id, values, transform", DOMAINS)
def test_values_of_each_domain(env_id, values, transform):
    args = cal_ql.resolve(Args(env_id=env_id))
    assert tuple(getattr(args, name) for name in NAMES) == values
    assert (args.batch_size, args.gamma, args.tau, args.critic_learning_rate) == (256, 0.99, 0.005, 3e-4)
    assert (args.cql_actions, args.target_gap, args.utd, args.calibration) == (10, 0.8, 1, True)
    assert (args.offline_steps, args.online_steps, args.normalize_states) == (1_000_000, 300_000, False)
    assert cal_ql.reward_transform(env_id, None) == transform and args.exp_name == "cal_ql"
    assert args.run_dir.endswith("__cal_ql__0")
    given = dict(zip(NAMES, (3.0, not values[1], not values[2], 7.0, 1e-3, 5, 6), strict=True))
    other = cal_ql.resolve(Args(env_id=env_id, calibration=False, **given))  # what is given stays
    assert {name: getattr(other, name) for name in NAMES} == given and other.exp_name == "cql"


@pytest.mark.parametrize(
    "words, arguments",
    [
        (["--batch-size is 15", "even"], dict(batch_size=15)),
        (["--batch-size is 0", "1 or more"], dict(batch_size=0)),
        (["--gamma is 1", "AntMaze", "less"], dict(gamma=1.0, env_id="antmaze-umaze-v2")),
        (["--cql-actions is 0", "1 or more"], dict(cql_actions=0)),
        (["--cql-weight is nan"], dict(cql_weight=math.nan)),
        (["--target-gap is inf"], dict(target_gap=math.inf)),
        (["--gap-clip is -200", "0 or more"], dict(gap_clip=-200.0)),
        (["--critic-layers is 0", "1 or more"], dict(critic_layers=0)),
        (["--actor-layers is 0", "1 or more"], dict(actor_layers=0)),
        (["--actor-learning-rate is 0", "a positive number"], dict(actor_learning_rate=0.0)),
        (["--utd is 0"], dict(utd=0)),
    ],
    ids=str,
)
def test_bad_arguments(words, arguments):
    with pytest.raises(cal_ql.BadInput) as error:
        cal_ql.resolve(Args(**(SHORT | arguments)))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    cal_ql.resolve(Args(**(SHORT | {"gamma": 1.0})))  # elsewhere no return is infinite


def test_another_runs_offline_phase_is_refused(train, tmp_path):
    train("first")
    with pytest.raises(cal_ql.BadInput) as error:
        train("second", calibration=False, cql_weight=2.0, offline_from=str(tmp_path / "first"))
    message = str(error.value)
    assert "--calibration True (now False)" in message and "--cql-weight 10.0 (now 2.0)" in message
