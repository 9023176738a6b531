"""The equations against computations of another kind: by hand, in numpy, by torch.func, by finite differences."""

import copy
import math

import numpy as np
import pytest
import td3_opt
import torch
from td3_opt import Actor, Args, Critic, Transitions


@pytest.fixture(autouse=True)
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
        (torch.rand(n) < 0.3).double(),
    )


def numpy_mlp(layers, x):
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def critic_layers(critic: Critic, member: int):
    return [(layer.weight[member].detach().numpy(), layer.bias[member].detach().numpy()) for layer in critic.layers]


def actor_layers(actor: Actor):
    return [(actor.network[i].weight.detach().numpy().T, actor.network[i].bias.detach().numpy()) for i in (0, 2, 4)]


def numpy_q(critic: Critic, member: int, observations, actions):
    return numpy_mlp(critic_layers(critic, member), np.hstack([observations, actions]))[:, 0]


@pytest.mark.parametrize("outputs", [4, 1])
@pytest.mark.parametrize("members", [1, 3])
def test_ensemble_linear_is_a_linear_layer_for_each_member(members, outputs):
    """Values and gradients, of all members and, where x has two axes, of the first alone."""
    layer, x = td3_opt.EnsembleLinear(members, 5, outputs), torch.randn(7, 5, requires_grad=True)
    together = [layer(x.expand(members, -1, -1)), layer(x).unsqueeze(0)]
    assert [tuple(values.shape) for values in together] == [(members, 7, outputs), (1, 7, outputs)]
    for values in together:
        plain = torch.stack([x @ layer.weight[i] + layer.bias[i, 0] for i in range(len(values))])
        torch.testing.assert_close(values, plain)
        parameters, loss = [x, layer.weight, layer.bias], torch.randn_like(plain)
        gradients = [torch.autograd.grad((loss * v).sum(), parameters) for v in (values, plain)]
        torch.testing.assert_close(*gradients)


def test_critic_ensemble_and_actor_are_plain_mlps():
    critic, actor, data = Critic(3, 2), Actor(3, 2), batch()
    values = critic(data.observations, data.actions)
    assert values.shape == (2, 16)
    for member in (0, 1):
        np.testing.assert_allclose(
            values[member].detach(), numpy_q(critic, member, data.observations, data.actions), rtol=1e-10
        )
    first = critic(data.observations, data.actions, first_only=True)
    assert first.shape == (1, 16)
    np.testing.assert_allclose(first[0].detach(), values[0].detach(), rtol=1e-10)
    actions = np.tanh(numpy_mlp(actor_layers(actor), data.observations.numpy()))
    np.testing.assert_allclose(actor(data.observations).detach(), actions, rtol=1e-10)


def test_eq_2_with_twin_targets_against_numpy():
    critic, target_critic, actor, data = Critic(3, 2), Critic(3, 2), Actor(3, 2), batch()
    next_actions = td3_opt.smoothed_actions(actor, data.next_observations, Args(policy_noise=0.0))
    target = td3_opt.td_target(target_critic, data, next_actions, gamma=0.9)
    loss = td3_opt.td_loss(critic(data.observations, data.actions), target)

    s, a, r, s2, d = (x.numpy() for x in data)
    a2 = np.tanh(numpy_mlp(actor_layers(actor), s2))
    y = r + 0.9 * (1 - d) * np.minimum(numpy_q(target_critic, 0, s2, a2), numpy_q(target_critic, 1, s2, a2))
    expected = sum(np.mean((numpy_q(critic, i, s, a) - y) ** 2) for i in (0, 1))
    assert not target.requires_grad
    np.testing.assert_allclose(target, y, rtol=1e-10)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_td_target_by_hand():
    """Rewards 1 and 2, the second a terminal; targets' minimum 3: 1 + 0.5 * 3 and 2."""
    zeros = torch.zeros(2, 1)
    data = Transitions(zeros, zeros, torch.tensor([1.0, 2.0]), zeros, torch.tensor([0.0, 1.0]))
    target = td3_opt.td_target(lambda s, a: torch.tensor([[3.0, 9.0], [4.0, 7.0]]), data, torch.zeros(2, 1), 0.5)
    assert target.tolist() == [2.5, 2.0]


def test_target_policy_smoothing_is_clipped_noise_in_the_action_range():
    actor, observations = lambda s: torch.zeros(len(s), 2), torch.zeros(200_000, 3)
    actions = td3_opt.smoothed_actions(actor, observations, Args(policy_noise=0.2, noise_clip=0.5))
    assert actions.abs().max() == 0.5
    # the standard deviation of N(0, 0.2) clipped at 2.5 standard deviations, by its closed form
    c, phi, tail = 2.5, math.exp(-(2.5**2) / 2) / math.sqrt(2 * math.pi), 0.5 * math.erfc(2.5 / math.sqrt(2))
    variance = (1 - 2 * tail - 2 * c * phi) + 2 * c**2 * tail
    assert actions.std().item() == pytest.approx(0.2 * math.sqrt(variance), rel=0.01)
    near_bound = td3_opt.smoothed_actions(lambda s: torch.full((len(s), 2), 0.9), observations, Args())
    assert near_bound.max() == 1.0 and near_bound.min() == pytest.approx(0.4)


class SmallCritic(torch.nn.Module):
    """Few enough parameters for finite differences; smooth, so that they are accurate."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(5, 4)
        self.out = torch.nn.Linear(4, 2)

    def forward(self, observations, actions):
        return self.out(torch.tanh(self.hidden(torch.cat([observations, actions], 1)))).T


def meta_setup():
    critic, offline, online = SmallCritic(), batch(), batch()
    return critic, offline, torch.randn(16), online, torch.randn(16)


def gradient_of_eq_3(second_order: bool, meta_lr: float, setup):
    critic, offline, y_off, online, y_on = setup
    args = Args(meta_lr=meta_lr, meta_second_order=second_order)
    loss = td3_opt.meta_adaptation_loss(critic, (offline, y_off), (online, y_on), args)
    return loss, torch.autograd.grad(loss, list(critic.parameters()))


@pytest.mark.parametrize("second_order", [False, True])
def test_eq_3_against_torch_func(second_order):
    setup = critic, offline, y_off, online, y_on = meta_setup()
    meta_lr = 0.3
    loss, gradient = gradient_of_eq_3(second_order, meta_lr, setup)

    def plain(parameters, data, y):
        values = torch.func.functional_call(critic, parameters, (data.observations, data.actions))
        return ((values[0] - y) ** 2).mean() + ((values[1] - y) ** 2).mean()

    psi = {name: p.detach() for name, p in critic.named_parameters()}
    inner = torch.func.grad(plain)(psi, offline, y_off)

    def eq_3(parameters):
        g = torch.func.grad(plain)(parameters, offline, y_off) if second_order else inner
        adapted = {name: parameters[name] - meta_lr * g[name] for name in parameters}
        return plain(parameters, offline, y_off) + plain(adapted, online, y_on)

    expected, value = torch.func.grad_and_value(eq_3)(psi)
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    for got, want in zip(gradient, expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("second_order", [False, True])
def test_eq_3_against_finite_differences(second_order):
    """The whole of Eq. 3 is differentiated; in first order with the inner gradient held at its value for psi."""
    setup = critic, offline, y_off, online, y_on = meta_setup()
    meta_lr, h = 0.3, 1e-6
    _, gradient = gradient_of_eq_3(second_order, meta_lr, setup)
    gradient = torch.cat([g.flatten() for g in gradient])
    start = torch.nn.utils.parameters_to_vector(critic.parameters()).detach()

    def td(vector, data, y):
        network = copy.deepcopy(critic)
        torch.nn.utils.vector_to_parameters(vector, network.parameters())
        return ((network(data.observations, data.actions) - y) ** 2).mean(1).sum().item()

    def differences(function, at):
        return torch.tensor([(function(at + h * e) - function(at - h * e)) / (2 * h) for e in torch.eye(len(at))])

    held = differences(lambda v: td(v, offline, y_off), start)

    def eq_3(vector):
        inner = differences(lambda v: td(v, offline, y_off), vector) if second_order else held
        return td(vector, offline, y_off) + td(vector - meta_lr * inner, online, y_on)

    h_outer = 1e-4 if second_order else h  # the inner differences are accurate to about 1e-9
    steps = h_outer * torch.eye(len(start))
    expected = torch.tensor([(eq_3(start + step) - eq_3(start - step)) / (2 * h_outer) for step in steps])
    rtol, atol = (1e-3, 1e-4) if second_order else (1e-5, 1e-6)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)


def test_first_and_second_order_differ():
    setup = meta_setup()
    (_, first), (_, second) = (gradient_of_eq_3(order, 0.3, setup) for order in (False, True))
    assert max((a - b).abs().max() for a, b in zip(first, second, strict=True)) > 1e-3


def test_meta_adaptation_works_on_the_critic_itself():
    critic, offline, online = Critic(3, 2), batch(), batch()
    y_off, y_on = torch.randn(16), torch.randn(16)
    loss = td3_opt.meta_adaptation_loss(critic, (offline, y_off), (online, y_on), Args(meta_lr=0.1))
    inner = td3_opt.td_loss(critic(offline.observations, offline.actions), y_off)
    adapted = copy.deepcopy(critic)
    with torch.no_grad():
        for p, g in zip(adapted.parameters(), torch.autograd.grad(inner, list(critic.parameters())), strict=True):
            p -= 0.1 * g
    outer = td3_opt.td_loss(adapted(online.observations, online.actions), y_on)
    assert loss.item() == pytest.approx((inner + outer).item(), rel=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_eq_4_gradient_is_the_weighted_sum_of_both(kappa):
    actor, q_off, q_on, data = Actor(3, 2), Critic(3, 2), Critic(3, 2), batch()
    parameters = list(actor.parameters())

    def first(critic):
        return critic(data.observations, actor(data.observations), first_only=True)[0]

    loss = td3_opt.policy_loss(first(q_off), first(q_on), kappa)
    mixed = torch.autograd.grad(loss, parameters)
    # each critic's own gradient through its actions, by the chain rule
    for critic, weight in ((q_off, 1 - kappa), (q_on, kappa)):
        actions = actor(data.observations)
        leaf = actions.detach().requires_grad_()
        value = critic(data.observations, leaf)[0].mean()
        (dq_da,) = torch.autograd.grad(value, leaf)
        own = torch.autograd.grad(actions, parameters, grad_outputs=dq_da)
        mixed = [m + weight * g for m, g in zip(mixed, own, strict=True)]
    for rest in mixed:
        torch.testing.assert_close(rest, torch.zeros_like(rest), atol=1e-12, rtol=0)


def test_eq_4_without_one_of_the_two():
    values = torch.tensor([1.0, 3.0])
    assert td3_opt.policy_loss(values, None, 0.0) == -2 == td3_opt.policy_loss(None, values, 1.0)


TABLE_15 = [
    *[(f"{env}-random-v2", 1.0, 0, 1.0) for env in ("halfcheetah", "hopper", "walker2d")],
    *[(f"{env}-medium-v2", 0.3, 150_000, 0.9) for env in ("halfcheetah", "hopper", "walker2d")],
    *[(f"{env}-medium-replay-v2", 0.1, 150_000, 0.9) for env in ("halfcheetah", "hopper", "walker2d")],
    *[
        (f"antmaze-{maze}-v2", 0.1, 100_000, 0.9)
        for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play")
    ],
    ("antmaze-large-diverse-v2", 0.1, 200_000, 0.9),
    *[(f"{env}-cloned-v1", 0.1, 250_000, 0.9) for env in ("pen", "hammer", "door", "relocate")],
]


@pytest.mark.parametrize("env_id, init, decay, end", TABLE_15)
def test_kappa_follows_table_15(env_id, init, decay, end):
    schedule = td3_opt.kappa_schedule(env_id, 300_000)
    assert schedule == (init, decay, end)
    at = [td3_opt.kappa_at(step, init, end, decay) for step in (0, decay // 2, decay, decay + 1, 300_000)]
    assert at == pytest.approx([init, (init + end) / 2, end, end, end], abs=1e-12)


def test_kappa_of_any_other_task():
    assert td3_opt.kappa_schedule("InvertedPendulum-v5", 10_000) == (0.1, 5_000, 0.9)
    assert td3_opt.kappa_schedule("hopper-medium-expert-v2", 300_000) == (0.1, 150_000, 0.9)
    assert td3_opt.kappa_at(2_500, 0.1, 0.9, 5_000) == pytest.approx(0.5)


def test_kappa_of_the_users_own_on_the_random_sets():
    """Table 15 gives them no T_decay: a kappa of the user's own must not be at its end from the start."""
    args = td3_opt.resolve(Args(kappa_init=0.5))
    kappas = [td3_opt.kappa_at(t, args.kappa_init, args.kappa_end, args.kappa_decay) for t in (0, 75_000, 150_000)]
    assert kappas == [0.5, 0.75, 1.0]
    args = td3_opt.resolve(Args(kappa_init=0.2, kappa_end=0.6, kappa_decay=10))
    assert (args.kappa_init, args.kappa_decay, args.kappa_end) == (0.2, 10, 0.6)
    args = td3_opt.resolve(Args())
    assert (args.kappa_init, args.kappa_decay, args.kappa_end) == (1, 0, 1)


def test_td3_bc_lambda_is_detached():
    """The gradient in Q is that of -lambda mean Q with lambda a number: scaling Q scales nothing."""
    values, actions, data = torch.randn(8), torch.rand(8, 2), torch.rand(8, 2)
    values.requires_grad_(), actions.requires_grad_()
    loss = td3_opt.td3_bc_loss(values, actions, data, 2.5)
    dq, da = torch.autograd.grad(loss, (values, actions))
    lam = 2.5 / np.abs(values.detach().numpy()).mean()
    np.testing.assert_allclose(dq, np.full(8, -lam / 8), rtol=1e-12)
    np.testing.assert_allclose(da, 2 * (actions - data).detach() / 16, rtol=1e-12)
    assert loss.item() == pytest.approx(-lam * values.mean().item() + ((actions - data) ** 2).mean().item())


REFERENCES = {
    "halfcheetah-random-v2": (-280.178953, 12135.0),
    "hopper-medium-v2": (-20.272305, 3234.3),
    "walker2d-medium-replay-v2": (1.629008, 4592.3),
    "antmaze-umaze-v2": (0.0, 1.0),
    "pen-cloned-v1": (96.262799, 3076.8331017826877),
    "hammer-cloned-v1": (-274.856578, 12794.134825156867),
    "door-cloned-v1": (-56.512833, 2880.5693087298737),
    "relocate-cloned-v1": (-6.425911, 4233.877797728884),
}


@pytest.mark.parametrize("env_id", REFERENCES)
def test_normalized_score(env_id):
    low, high = REFERENCES[env_id]
    assert td3_opt.normalized_score(env_id, low) == 0
    assert td3_opt.normalized_score(env_id, high) == pytest.approx(100)
    assert td3_opt.normalized_score(env_id, (low + high) / 2) == pytest.approx(50)


def test_normalized_score_by_hand_and_without_a_reference():
    assert td3_opt.normalized_score("hopper-random-v2", 1607.0138475) == pytest.approx(50)
    assert math.isnan(td3_opt.normalized_score("Hopper-v5", 1000.0))
    assert math.isnan(td3_opt.normalized_score("hopperish-v1", 1000.0))
    assert math.isnan(td3_opt.normalized_score("hopper-hard-v0", 1000.0))  # a user's own, by D4RL's first word


def test_soft_update():
    source, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    td3_opt.soft_update(target, source, 0.1)
    torch.testing.assert_close(target.weight.detach(), expected)


def test_minimize_moves_only_its_own_parameters():
    actor, critic, data = Actor(3, 2), Critic(3, 2), batch()
    before = copy.deepcopy(critic.state_dict())
    optimizer = td3_opt.make_adam(actor, 3e-4)
    old = copy.deepcopy(actor.state_dict())
    td3_opt.minimize(-critic(data.observations, actor(data.observations)).mean(), optimizer)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
    assert all(p.grad is None for p in critic.parameters())
    # Adam's first step is lr * sign(gradient)
    for name, parameter in actor.named_parameters():
        moved = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(
            (old[name] - parameter.detach())[moved], 3e-4 * parameter.grad.sign()[moved], rtol=0.02, atol=0
        )


@pytest.mark.parametrize("rate", [1e-3, torch.tensor(1e-3), torch.tensor(0.0)], ids=str)
def test_the_formula_of_adam_that_is_compiled_is_pytorchs_adam(rate, monkeypatch):
    """In float64, gradients from 1 to below Adam's eps, and none at all; IQL's rate is a tensor, and 0 at times."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    scales = torch.tensor([1.0, 1e-4, 1e-8, 1e-11, 0.0], dtype=torch.float64)
    ours, theirs = (torch.nn.Linear(5, 1, bias=False, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    optimizer = td3_opt.make_adam(ours, 1.0)
    optimizer.param_groups[0]["lr"] = rate
    plain = torch.optim.Adam(theirs.parameters(), float(rate), foreach=False, fused=False)
    torch.manual_seed(0)
    for _ in range(60):
        gradient = torch.randn(1, 5, dtype=torch.float64) * scales
        td3_opt.adam_step(optimizer, [gradient])
        theirs.weight.grad = gradient
        plain.step()
    assert ours.weight.isfinite().all() and (ours.weight.detach() == before).all() == (float(rate) == 0)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-9)
