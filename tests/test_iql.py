"""IQL+OPT: its equations against computations of another kind, and whole runs."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import iql_opt
import numpy as np
import pytest
import scipy.stats
import td3_opt
import torch
from conftest import roll_out, write_file
from iql_opt import Actor, Agent, Args, Critic, Transitions, ValueFunction, Values
from runs import equal, rows, watch_phases


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


# ----------------------------------------------------------------------------------------------------------------------
# Equations
# ----------------------------------------------------------------------------------------------------------------------


def test_expectile_loss_against_its_closed_form(double):
    u = torch.randn(1_000)
    assert iql_opt.expectile_loss(u, 0.5).item() == pytest.approx(0.5 * np.mean(u.numpy() ** 2), rel=1e-12)
    for expectile in (0.1, 0.7, 0.9):
        expected = np.mean(np.abs(expectile - (u.numpy() < 0)) * u.numpy() ** 2)
        assert iql_opt.expectile_loss(u, expectile).item() == pytest.approx(expected, rel=1e-12)
    assert iql_opt.expectile_loss(torch.tensor([2.0]), 0.9).item() == pytest.approx(0.9 * 4)  # Q above V weighs more
    assert iql_opt.expectile_loss(torch.tensor([-2.0]), 0.9).item() == pytest.approx(0.1 * 4)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_minimiser_of_the_expectile_loss_is_the_expectile(expectile, double):
    samples = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.5, 500))
    v = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = iql_opt.expectile_loss(samples - v, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert v.item() == pytest.approx(scipy.stats.expectile(samples.numpy(), alpha=expectile), rel=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_eq_9_weights_the_online_advantage_with_kappa(kappa):
    off, on = torch.tensor([1.0, -0.5, 0.2]), torch.tensor([0.1, 0.6, -2.0])
    expected = [math.exp(3 * ((1 - kappa) * a + kappa * b)) for a, b in zip(off.tolist(), on.tolist(), strict=True)]
    assert iql_opt.advantage_weights(off, on, kappa, 3.0).tolist() == pytest.approx(expected, rel=1e-5)
    alone = {0.0: (off, None), 1.0: (None, on)}.get(kappa)
    if alone:  # at the ends one of the two need not be there
        assert iql_opt.advantage_weights(*alone, kappa, 3.0).tolist() == pytest.approx(expected, rel=1e-5)


def test_advantage_weights_are_clipped_at_100():
    advantages = torch.tensor([-1e4, 0.0, math.log(99) / 10, math.log(101) / 10, 5.0, 1e4])
    for weights in (
        iql_opt.advantage_weights(advantages, None, 0.0, 10.0),
        iql_opt.advantage_weights(advantages, advantages, 0.3, 10.0),
    ):
        assert weights.tolist() == pytest.approx([0, 1, 99, 100, 100, 100], rel=1e-4)


def test_the_policys_standard_deviation_starts_at_1():
    assert not iql_opt.Actor(11, 3).log_std.any()


@pytest.mark.parametrize("log_std, std", [(-1.0, math.exp(-1)), (0.3, math.exp(0.3)), (5.0, math.exp(2))])
def test_log_prob_of_the_tanh_mean_gaussian(double, log_std, std):
    actor, data = Actor(3, 2), batch()
    torch.nn.init.constant_(actor.log_std, log_std)
    x = data.observations.numpy()
    for i, layer in enumerate(actor.layers):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = np.maximum(x, 0) if i < 2 else np.tanh(x)
    np.testing.assert_allclose(actor(data.observations).detach(), x, rtol=1e-10)
    expected = scipy.stats.norm(x, std).logpdf(data.actions.numpy()).sum(1)
    np.testing.assert_allclose(actor.log_prob(data.observations, data.actions).detach(), expected, rtol=1e-9)


def test_log_std_below_its_bound_is_the_bound(double):
    """Density 1 / (sqrt(2 pi) e^-20) in each of two dimensions at the mean itself."""
    actor, observations = Actor(3, 2), torch.randn(4, 3)
    torch.nn.init.constant_(actor.log_std, -30.0)
    got = actor.log_prob(observations, actor(observations))
    assert got.tolist() == pytest.approx([2 * (20 - 0.5 * math.log(2 * math.pi))] * 4)


def test_dropout_in_updates_only():
    """Dropout keeps the expectation of a linear network; the ReLU of all-positive layers is one."""
    actor, observations, actions = Actor(3, 2), torch.rand(1, 3), torch.zeros(1, 2)
    for layer in actor.layers:
        torch.nn.init.uniform_(layer.weight, 0, 0.01)
        torch.nn.init.zeros_(layer.bias)
    means = actor(observations.expand(20_000, -1), 0.1)
    assert means.std(0).min() > 1e-6
    torch.testing.assert_close(means.mean(0, keepdim=True), actor(observations), rtol=0.01, atol=0)
    assert len({actor.log_prob(observations, actions, 0.5).item() for _ in range(5)}) > 1
    assert len({actor.log_prob(observations, actions).item() for _ in range(5)}) == 1


def test_exploration_samples_the_policy_and_clips():
    actor = Actor(3, 2)
    torch.nn.init.constant_(actor.log_std, math.log(0.4))
    torch.nn.init.zeros_(actor.layers[2].weight)
    actor.layers[2].bias.data = torch.tensor([0.0, 1.2])
    policy, observation = iql_opt.Policy(actor), np.zeros(3, np.float32)
    torch.manual_seed(0)
    samples = np.array([iql_opt.explore(Args(dropout=0.0), policy, observation) for _ in range(4_000)])
    assert samples.dtype == np.float32 and samples.shape == (4_000, 2) and np.abs(samples).max() == 1
    clipped = scipy.stats.norm(np.tanh(1.2), 0.4).sf(1)
    assert (samples[:, 1] == 1).mean() == pytest.approx(clipped, abs=0.03)
    inside = samples[:, 0][np.abs(samples[:, 0]) < 1]
    cut = scipy.stats.truncnorm(-2.5, 2.5, scale=0.4)
    assert scipy.stats.kstest(inside, cut.cdf).pvalue > 0.01


def test_exploration_has_the_dropout_of_the_updates_and_evaluation_has_none():
    """CORL's policy is in training mode online. With all units on the mean is tanh 1; with half of them it swings."""
    actor, observation = Actor(3, 1), np.zeros(3, np.float32)
    torch.nn.init.constant_(actor.log_std, -20.0)
    for layer, bias in zip(actor.layers, (1.0, 0.0, 0.0), strict=True):
        torch.nn.init.constant_(layer.weight, 1 / 256)
        torch.nn.init.constant_(layer.bias, bias)
    policy = iql_opt.Policy(actor)
    torch.manual_seed(0)
    for dropout in (0.0, 0.5):
        actions = np.arctanh([iql_opt.explore(Args(dropout=dropout), policy, observation)[0] for _ in range(2_000)])
        # A hidden layer is a mean of 256 numbers that dropout makes 0 or 2: variance 1/256 each
        assert actions.mean() == pytest.approx(1, abs=0.01)
        assert actions.std() == pytest.approx(math.sqrt(2 / 256) if dropout else 0, abs=0.01)
        assert float(np.arctanh(policy(observation)[0])) == pytest.approx(1, abs=1e-5)


def test_the_cosine_of_the_learning_rate():
    """To 0 over the offline steps; then on, as PyTorch's scheduler, which CORL steps online too."""
    at = [iql_opt.policy_learning_rate(step, 1_000, 3e-4) for step in (0, 250, 500, 1_000, 1_500, 2_000)]
    half = 3e-4 / 2
    assert at == pytest.approx([3e-4, half * (1 + math.sqrt(0.5)), half, 0, half, 3e-4], abs=1e-12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(120):
        assert iql_opt.policy_learning_rate(step, 50, 3e-4) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        scheduler.step()
    assert iql_opt.policy_learning_rate(7, 0, 3e-4) == 3e-4  # no offline phase, no decay


def test_value_functions_are_plain_mlps_and_joined_ones_are_each_alone(double):
    pairs, data = [Values(Critic(3, 2), ValueFunction(3)) for _ in range(2)], batch()
    whole = iql_opt.join(pairs)
    for parameter in pairs[1].parameters():  # what an optimiser does to one of them, the whole does too
        parameter.data.mul_(1.1)
    q, v = whole(data.observations, data.actions)
    assert q.shape == (4, 16) and v.shape == (2, 16)
    for i, pair in enumerate(pairs):
        torch.testing.assert_close(q[2 * i : 2 * i + 2], pair.q(data.observations, data.actions))
        x = data.observations.numpy()
        for layer in pair.v.layers:
            x = x @ layer.weight[0].detach().numpy() + layer.bias[0].detach().numpy()
            x = np.maximum(x, 0) if layer is not pair.v.layers[2] else x
        np.testing.assert_allclose(v[i].detach(), x[:, 0], rtol=1e-10)


def plain_targets(q_target: Critic, v: ValueFunction, data: Transitions, gamma: float):
    with torch.no_grad():
        q1, q2 = q_target(data.observations, data.actions)
        return data.rewards + gamma * (1 - data.terminals) * v(data.next_observations)[0], torch.minimum(q1, q2)


def test_targets_of_each_pair(double):
    targets, vs, data = [Critic(3, 2), Critic(3, 2)], [ValueFunction(3), ValueFunction(3)], batch()
    got = iql_opt.value_targets(iql_opt.join(targets), iql_opt.join(vs), data, 0.9)
    for i in range(2):
        for mine, plain in zip(got, plain_targets(targets[i], vs[i], data, 0.9), strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine[i], plain)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("names, kappa", [(("off",), 0.0), (("off", "on"), 0.3), (("on",), 1.0)])
def test_an_update_is_ten_lines_of_plain_iql(double, names, kappa, dropout):
    """Five updates, against a network a module, an optimiser a network and CORL's order: V, Q, target, policy."""
    args = Args(expectile=0.8, beta=2.0, dropout=dropout, learning_rate=1e-3, tau=0.01, gamma=0.9)
    agent = Agent(args, 3, 2, torch.device("cpu"))
    plain = copy.deepcopy({name: part for name, part in agent.parts().items() if isinstance(part, torch.nn.Module)})
    adam = {name: torch.optim.Adam(plain[name].parameters(), 1e-3, fused=False) for name in plain}
    step = iql_opt.iql_step(args, agent, names)

    def descend(name, loss):
        adam[name].zero_grad()
        loss.backward()
        adam[name].step()

    for seed in range(5):
        data = batch()
        torch.manual_seed(seed)  # of the dropout
        step(data, torch.tensor(kappa))
        advantage = 0
        for name, weight in zip(names, (1 - kappa, kappa) if len(names) == 2 else (1,), strict=True):
            q, v, q_target = plain[f"q_{name}"], plain[f"v_{name}"], plain[f"q_{name}_target"]
            y, least = plain_targets(q_target, v, data, 0.9)
            a = least - v(data.observations)[0]
            advantage = advantage + weight * a.detach()
            descend(f"v_{name}", (torch.abs(0.8 - (a < 0).double()) * a**2).mean())
            q1, q2 = q(data.observations, data.actions)
            descend(f"q_{name}", ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())
            for t, p in zip(q_target.parameters(), q.parameters(), strict=True):
                t.data.copy_(0.99 * t.data + 0.01 * p.data)
        torch.manual_seed(seed)
        layers, x = plain["actor"].layers, data.observations
        for layer in layers[:2]:
            x = torch.nn.functional.dropout(torch.relu(layer(x)), dropout)
        policy = torch.distributions.Normal(torch.tanh(layers[2](x)), plain["actor"].log_std.exp())
        weights = torch.clamp(torch.exp(2 * advantage), max=100)
        descend("actor", -(weights * policy.log_prob(data.actions).sum(1)).mean())
    for name, network in plain.items():
        for got, want in zip(agent.parts()[name].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("second_order", [False, True])
def test_eqs_3_and_8_against_torch_func(double, second_order):
    """Q and V are adapted together; each must get what it gets alone."""
    values, offline, online, alpha = Values(Critic(3, 2), ValueFunction(3)), batch(), batch(), 0.3
    targets = [(torch.randn(16), torch.randn(16)) for _ in range(2)]

    def both(values, targets):
        return iql_opt.td_loss(values[0], targets[0]) + iql_opt.expectile_loss(targets[1] - values[1][0], 0.7)

    args = SimpleNamespace(meta_lr=alpha, meta_second_order=second_order)
    loss = iql_opt.meta_adaptation_loss(values, (offline, targets[0]), (online, targets[1]), args, both)
    gradient = dict(zip(dict(values.named_parameters()), torch.autograd.grad(loss, values.parameters()), strict=True))

    def q_loss(parameters, data, target):
        q = torch.func.functional_call(values.q, parameters, (data.observations, data.actions))
        return ((q[0] - target[0]) ** 2).mean() + ((q[1] - target[0]) ** 2).mean()

    def v_loss(parameters, data, target):
        u = target[1] - torch.func.functional_call(values.v, parameters, (data.observations,))[0]
        return torch.where(u > 0, 0.7 * u**2, 0.3 * u**2).mean()

    total = 0
    for name, network, plain in (("q", values.q, q_loss), ("v", values.v, v_loss)):
        psi = {key: p.detach() for key, p in network.named_parameters()}
        held = torch.func.grad(plain)(psi, offline, targets[0])

        def equation(parameters, plain=plain, held=held):
            g = torch.func.grad(plain)(parameters, offline, targets[0]) if second_order else held
            adapted = {key: parameters[key] - alpha * g[key] for key in parameters}
            return plain(parameters, offline, targets[0]) + plain(adapted, online, targets[1])

        expected, value = torch.func.grad_and_value(equation)(psi)
        total += value.item()
        for key, want in expected.items():
            torch.testing.assert_close(gradient[f"{name}.{key}"], want, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-12)


DOMAINS = [
    ("hopper-medium-v2", 0.7, 3.0, 0.0, 0.3),
    ("walker2d-medium-replay-v2", 0.7, 3.0, 0.0, 0.1),
    ("halfcheetah-random-v2", 0.7, 3.0, 0.0, 1.0),
    ("antmaze-large-diverse-v2", 0.9, 10.0, 0.0, 0.1),
    ("relocate-cloned-v1", 0.8, 3.0, 0.1, 0.1),
]


@pytest.mark.parametrize("env_id, expectile, beta, dropout, kappa", DOMAINS)
def test_the_papers_values_of_each_domain(env_id, expectile, beta, dropout, kappa):
    args = iql_opt.resolve(Args(env_id=env_id))
    assert (args.expectile, args.beta, args.dropout, args.kappa_init) == (expectile, beta, dropout, kappa)
    assert (args.utd, args.replay, args.exp_name) == (1, "balanced", "iql_opt")
    assert (args.learning_rate, args.gamma, args.tau, args.batch_size) == (3e-4, 0.99, 0.005, 256)
    vanilla = iql_opt.resolve(Args(env_id=env_id, opt=False, expectile=0.6, beta=1.0, dropout=0.3))
    assert (vanilla.expectile, vanilla.beta, vanilla.dropout) == (0.6, 1.0, 0.3)  # what is given stays
    assert (vanilla.replay, vanilla.exp_name) == ("uniform", "iql")


def test_mujoco_rewards_are_rescaled_by_the_spread_of_the_datas_returns():
    # Three episodes: 0 1 2, which ends in a terminal where the next starts; 2 3, cut; 7 8 9 10, the end.
    observations = np.array([0, 1, 2, 2, 3, 7, 8, 9, 10], np.float32)[:, None]
    following = np.array([1, 2, 2, 3, 4, 8, 9, 10, 11], np.float32)[:, None]
    terminals = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0], np.float32)
    rewards = np.array([1, 2, 3, 0.5, 1.5, 1, 3, 3, 3], np.float32)  # returns 6, 2 and 10
    data = Transitions(observations, np.zeros((9, 1), np.float32), rewards, following, terminals)
    for env_id in ("hopper-medium-v2", "walker2d-random-v2", "halfcheetah-medium-replay-v2"):
        assert iql_opt.reward_transform(env_id, data) == (125.0, 0.0)  # 1000 / (10 - 2)
    assert iql_opt.reward_transform("antmaze-umaze-v2", data) == (1.0, -1.0)
    for env_id in ("pen-cloned-v1", "InvertedPendulum-v5"):
        assert iql_opt.reward_transform(env_id, data) == (1.0, 0.0)
    flat = data._replace(rewards=np.array([1, 1, 1, 1, 2, 0.75, 0.75, 0.75, 0.75], np.float32))  # 3, 3 and 3
    assert iql_opt.reward_transform("hopper-medium-v2", flat) == (1.0, 0.0)
    assert td3_opt.reward_transform("hopper-medium-v2", data) == (1.0, 0.0)


def test_rescaled_rewards_are_stored_offline_and_online_and_scores_are_not_of_them(monkeypatch, tmp_path):
    columns = roll_out(gym.make("Hopper-v5"), 400, 0)
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1
    returns = [part.sum() for part in np.split(columns["rewards"].astype(float), ends) if len(part)]
    scale = 1000 / (max(returns) - min(returns))
    buffers, online, create = [], [], iql_opt.ReplayBuffer.__init__

    def watch(self, data, *rest):
        buffers.append(self)
        create(self, data, *rest)

    monkeypatch.setattr(iql_opt.ReplayBuffer, "__init__", watch)
    make = iql_opt.make_env

    class Recorded(gym.Wrapper):
        def step(self, action):
            result = self.env.step(action)
            online.append(result[1])
            return result

    environments = iter((Recorded, lambda env: env))  # the training environment is made first
    monkeypatch.setattr(iql_opt, "make_env", lambda *given: next(environments)(make(*given)))
    arguments = TINY | dict(env_id="hopper-medium-v2", offline_steps=2, online_steps=12, opt=False)
    data = write_file(tmp_path / "data.hdf5", columns)
    iql_opt.train(Args(**arguments, dataset=str(data), run_dir=str(tmp_path / "run")))
    observations = columns["observations"]
    normalised = (observations - observations.mean(0)) / (observations.std(0) + 1e-3)
    np.testing.assert_allclose(buffers[0][torch.arange(400)].observations, normalised, rtol=1e-3, atol=1e-4)
    stored = buffers[0][torch.arange(400 + 12)].rewards.numpy()
    np.testing.assert_allclose(stored[:400], scale * columns["rewards"], rtol=1e-5)
    np.testing.assert_allclose(stored[400:], scale * np.array(online), rtol=1e-5)
    last = rows(tmp_path / "run")[-1]
    assert 0 < float(last["return_mean"]) < 4 * float(last["length_mean"])  # some 1 a step, not some hundreds
    assert scale > 5


# ----------------------------------------------------------------------------------------------------------------------
# Phases, in this process
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=20, online_steps=50, n_tau=20, n_pretrain=12, batch_size=16)
TINY |= dict(eval_freq=0, eval_episodes=1, learning_rate=1e-3, progress=False)


@pytest.fixture
def watched(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process, with a copy of all parts at the start of every phase and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def watched(**arguments) -> dict[str, dict]:
        states = watch_phases(iql_opt, monkeypatch)
        iql_opt.train(Args(**(TINY | arguments), dataset=str(pendulum_file), run_dir=str(tmp_path / "run")))
        return states

    return watched


OFF, ON = ({f"q_{name}", f"v_{name}", f"q_{name}_target", f"{name}_optimizer"} for name in ("off", "on"))
POLICY = {"actor", "actor_optimizer"}
VARIANTS = [  # arguments, what online pre-training changes, what fine-tuning changes
    ({}, ON, OFF | ON | POLICY),
    ({"meta_second_order": True}, ON, OFF | ON | POLICY),
    ({"q_on_init": "random"}, set(), OFF | ON | POLICY),
    ({"q_on_init": "online"}, ON, OFF | ON | POLICY),
    ({"q_on_init": "joint"}, ON, OFF | ON | POLICY),
    ({"q_on": False}, OFF, OFF | POLICY),
    ({"q_on": False, "q_on_init": "joint", "replay": "online"}, OFF, OFF | POLICY),
    ({"kappa_init": 1.0, "kappa_end": 1.0, "replay": "symmetric"}, ON, ON | POLICY),
    ({"kappa_init": 0.0, "kappa_end": 0.0, "replay": "uniform"}, ON, OFF | ON | POLICY),
    ({"opt": False}, set(), OFF | POLICY),
    ({"opt": False, "replay": "online", "utd": 2, "dropout": 0.1}, set(), OFF | POLICY),
]


@pytest.mark.parametrize("arguments, pretrained, fine_tuned", VARIANTS, ids=lambda x: str(x) if x is dict else None)
def test_what_each_phase_changes(watched, arguments, pretrained, fine_tuned):
    states = watched(**arguments)
    agent = set(states["done"]) - {"buffer", "collector", "balanced", "ratio_optimizer"}
    opt, with_q_on = arguments.get("opt", True), arguments.get("q_on", True) and arguments.get("opt", True)
    assert agent == OFF | POLICY | (ON if with_q_on else set())

    def learned(phase: str, name: str) -> dict:  # the policy's learning rate is set for a phase before it begins
        return states[phase][name]["state"] if name == "actor_optimizer" else states[phase][name]

    def changed(before: str, after: str) -> set[str]:
        return {name for name in agent if not equal(learned(before, name), learned(after, name))}

    if opt:
        assert changed("offline", "collect") == OFF | POLICY
        assert changed("collect", "online_pretrain") == set()
        assert changed("online_pretrain", "online_finetune") == pretrained
    assert changed("online_finetune", "done") == fine_tuned
    assert ("balanced" in states["done"]) == (opt and arguments.get("replay", "balanced") == "balanced")
    # as many updates as the protocol says: Adam counts them
    online = (30 if opt else 50) * arguments.get("utd", 1)
    for name in ("actor", "off", "on"):
        part = f"{name}_optimizer"
        if part in agent:
            count = 20 * (name != "on") + 12 * (part in pretrained) + online * (part in fine_tuned)
            assert {int(s["step"]) for s in states["done"][part]["state"].values()} == {count}


PRETRAINING = [{}, {"meta_second_order": True}, {"q_on_init": "online"}, {"q_on_init": "joint"}, {"q_on": False}]


@pytest.mark.parametrize("arguments", PRETRAINING, ids=str)
def test_one_step_of_online_pretraining_is_the_loss_it_is_said_to_be(watched, arguments, monkeypatch):
    """Recompute the first step's gradient by plain autograd on the very batch, from the saved networks."""
    batches, gradients = [], []
    value_targets, minimize = iql_opt.value_targets, iql_opt.minimize

    def watch_targets(q_target, v, data, gamma):
        batches.append(data)
        return value_targets(q_target, v, data, gamma)

    def watch_minimize(loss, optimizer):
        minimize(loss, optimizer)
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(iql_opt, "value_targets", watch_targets)
    monkeypatch.setattr(iql_opt, "minimize", watch_minimize)
    own = dict(offline_steps=0, n_pretrain=1, meta_lr=0.02, gamma=0.9, expectile=0.8)
    states = watched(**own, **arguments)["online_pretrain"]
    name = "on" if arguments.get("q_on", True) else "off"
    q, q_target, v = Critic(4, 1), Critic(4, 1), ValueFunction(4)
    for network, part in ((q, f"q_{name}"), (q_target, f"q_{name}_target"), (v, f"v_{name}")):
        network.load_state_dict(states[part])
    online_rows = states["buffer"]["online_rows"]
    data = batches[0]
    halves = [Transitions(*(column[part] for column in data)) for part in (slice(0, 16), slice(16, 32))]
    assert all((online_rows[:, :4] == o).all(1).any() for o in halves[1].observations)
    assert not all((online_rows[:, :4] == o).all(1).any() for o in halves[0].observations)
    targets = [plain_targets(q_target, v, half, 0.9) for half in halves]
    networks = {"q": q, "v": v}
    parameters = {f"{n}.{k}": p for n, network in networks.items() for k, p in network.named_parameters()}

    def loss(i, weights):
        part, (y, least) = halves[i], targets[i]
        split = {n: {k[2:]: w for k, w in weights.items() if k[0] == n} for n in networks}
        values = torch.func.functional_call(q, split["q"], (part.observations, part.actions))
        u = least - torch.func.functional_call(v, split["v"], (part.observations,))[0]
        return ((values - y) ** 2).mean(1).sum() + (torch.abs(0.8 - (u < 0).float()) * u**2).mean()

    kind, order = arguments.get("q_on_init", "meta"), arguments.get("meta_second_order", False)
    if kind == "online":
        total = loss(1, parameters)
    elif kind == "joint":
        total = loss(0, parameters) + loss(1, parameters)
    else:
        inner = torch.autograd.grad(loss(0, parameters), list(parameters.values()), create_graph=order)
        adapted = {key: p - 0.02 * g for (key, p), g in zip(parameters.items(), inner, strict=True)}
        total = loss(0, parameters) + loss(1, adapted)
    expected = torch.autograd.grad(total, list(parameters.values()))
    for a, b in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_online_pretraining_bootstraps_from_the_target_critic(watched, monkeypatch):
    """Before each step the target is 0.7 of what it was and 0.3 of the critic; V's is V as it is."""
    targets, critics = [], []
    value_targets, minimize = iql_opt.value_targets, iql_opt.minimize

    def watch_targets(q_target, v, data, gamma):
        targets.append(copy.deepcopy((q_target.state_dict(), v.state_dict())))
        return value_targets(q_target, v, data, gamma)

    def watch_minimize(loss, optimizer):
        minimize(loss, optimizer)
        critics.append([parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(iql_opt, "value_targets", watch_targets)
    monkeypatch.setattr(iql_opt, "minimize", watch_minimize)
    states = watched(offline_steps=0, n_pretrain=4, online_steps=21, tau=0.3)
    expected = list(states["online_pretrain"]["q_on_target"].values())
    for step in range(4):
        q_target, v = (list(state.values()) for state in targets[step])
        torch.testing.assert_close(q_target, expected)
        if step:
            torch.testing.assert_close(v, critics[step - 1][len(expected) :])
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, critics[step], strict=False)]
    torch.testing.assert_close(list(states["online_finetune"]["q_on_target"].values()), expected)


def test_kappa_and_the_learning_rate_of_every_update(watched, monkeypatch):
    """Fine-tuning begins at environment step 20 of 50, and at the learning rate with which the offline phase ended."""
    rates, kappas = [], []
    iql_step = iql_opt.iql_step

    def watch(args, agent, names):
        step = iql_step(args, agent, names)

        def watched_step(data, kappa=0.0):
            rates.append(float(agent.actor_optimizer.param_groups[0]["lr"]))
            kappas.append(float(kappa))
            return step(data, kappa)

        return watched_step

    monkeypatch.setattr(iql_opt, "iql_step", watch)
    watched(kappa_init=0.1, kappa_end=0.9, kappa_decay=40, utd=2)
    steps = np.arange(20 + 60)
    assert rates == pytest.approx(list(1e-3 * (1 + np.cos(np.pi * steps / 20)) / 2), abs=1e-9)
    assert kappas[:20] == [0] * 20
    assert kappas[20:] == pytest.approx(list(0.1 + 0.8 * np.minimum(np.arange(20, 50).repeat(2) / 40, 1)), abs=1e-6)


def balancing(observation: np.ndarray) -> np.ndarray:
    """A noisy controller that keeps the pole up for some 200 of 1000 steps."""
    x, angle, velocity, spin = observation
    return np.clip(np.random.normal([6 * angle + 0.6 * spin + 0.3 * x + 0.4 * velocity], 0.7), -3, 3).astype(np.float32)


def test_offline_iql_is_better_than_its_data(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", str(home))
    np.random.seed(0)
    env = gym.make("InvertedPendulum-v5")
    parts = [roll_out(env, 2_000, 0), roll_out(env, 3_000, 0, balancing)]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    returns = columns["rewards"].sum() / (columns["terminals"] | columns["timeouts"]).sum()
    arguments = TINY | dict(offline_steps=1_500, online_steps=10, opt=False, batch_size=64, eval_episodes=5)
    data = write_file(tmp_path / "data.hdf5", columns)
    iql_opt.train(Args(**arguments, dataset=str(data), run_dir=str(tmp_path / "run")))
    before, after = (float(row["return_mean"]) for row in rows(tmp_path / "run")[:2])
    assert before < 100 and after > max(300, 5 * returns)


def test_what_a_run_leaves(watched, tmp_path):
    """Evaluations offline, after pre-training and online; a curve for each of the networks; model.pt."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched(eval_freq=15)
    steps = [(row["phase"], int(row["env_steps"]), int(row["gradient_steps"])) for row in rows(tmp_path / "run")]
    assert steps[:4] == [("offline", 0, 0), ("offline", 0, 15), ("offline", 0, 20), ("online_pretrain", 20, 32)]
    assert steps[4:] == [("online_finetune", 30, 42), ("online_finetune", 45, 57), ("online_finetune", 50, 62)]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    curves = {f"{kind}_{name}_{what}" for kind in "qv" for name in ("off", "on") for what in ("loss", "mean")}
    curves |= {"actor_loss", "advantage_weight_mean", "kappa", "online_share", "density_ratio_loss"}
    assert {f"train/{curve}" for curve in curves | {"q_on_pretrain_loss"}} <= set(events.Tags()["scalars"])
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert model.keys() >= {"actor", "q_off", "v_off", "q_off_target", "q_on", "v_on", "q_on_target"}
    Actor(4, model["action_dim"]).load_state_dict(model["actor"])


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("--expectile is 0.0: write a number between 0 and 1", dict(expectile=0.0)),
        ("--expectile is 1.0: ", dict(expectile=1.0)),
        ("--expectile is nan: ", dict(expectile=math.nan)),
        ("--beta is -1.0: write a number, 0 or more", dict(beta=-1.0)),
        ("--beta is inf: ", dict(beta=math.inf)),
        ("--dropout is 1.0: write 0 or more, and less than 1", dict(dropout=1.0)),
        ("--dropout is -0.1: ", dict(dropout=-0.1)),
    ],
)
def test_its_own_arguments(words, arguments):
    with pytest.raises(iql_opt.BadInput) as error:
        iql_opt.resolve(Args(**arguments))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
