"""OEMA: its perturbation, the adapted gradient, the newest transitions, updates against plain code, and whole runs."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import oema
import pytest
import scipy.stats
import td3_opt
import torch
from conftest import ROOT, roll_out, write_file
from oema import Actor, Agent, Args, Behaviour, Critic, Perturbation, Transitions
from runs import equal, rows, same_weights, watch_phases
from test_common import definitions, parts
from test_goal_tasks import Walk, collect

CPU = torch.device("cpu")


@pytest.fixture
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_its_networks_are_td3s_but_for_the_perturbation():
    found = [definitions(parts(ROOT / "algorithms" / f"{name}.py")[0]) for name in ("oema", "td3_opt")]
    for name in ("Actor", "Critic", "OFFLINE_ARGS", "reward_transform"):
        assert found[0][name] == found[1][name], name


# ----------------------------------------------------------------------------------------------------------------------
# Exploration
# ----------------------------------------------------------------------------------------------------------------------


def plain_pi(actor: Actor, s):
    """pi(s) by its weights; torch's or numpy's arithmetic."""
    weights = [p if torch.is_tensor(s) else p.detach().numpy() for p in actor.parameters()]
    return plain_mlp(weights, s)


def plain_mlp(weights: list, x):
    """tanh of a network of two hidden layers."""
    maximum, tanh = (torch.clamp_min, torch.tanh) if torch.is_tensor(x) else (np.maximum, np.tanh)
    for i in (0, 2, 4):
        x = x @ weights[i].T + weights[i + 1]
        x = maximum(x, 0) if i < 4 else tanh(x)
    return x


def plain_q(critic: Critic, member: int, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    x = torch.cat([s, a], 1)
    for i, layer in enumerate(critic.layers):
        x = x @ layer.weight[member] + layer.bias[member]
        x = x.clamp(min=0) if i < 2 else x[:, 0]
    return x


def loud(perturbation: Perturbation) -> Perturbation:
    """With outputs over the whole of [-1, 1], where they start near 0."""
    with torch.no_grad():
        perturbation.network[4].weight *= 20
    return perturbation


def test_an_exploring_action_is_the_policys_with_perturbation_and_noise(double):
    actor, xi, s = Actor(3, 2), loud(Perturbation(3, 2)), torch.randn(500, 3)
    behaviour = Behaviour(actor, xi)
    torch.manual_seed(7)
    actions = behaviour.explore(s, 0.3).detach().numpy()
    torch.manual_seed(7)
    noise = 0.3 * torch.randn(500, 2).numpy()
    pi = plain_pi(actor, s.numpy())
    added = plain_mlp([p.detach().numpy() for p in xi.parameters()], np.hstack([s.numpy(), pi]))
    assert 0.9 < np.abs(added).max() <= 1
    np.testing.assert_allclose(actions, np.clip(pi + added + noise, -1, 1), rtol=1e-9, atol=1e-12)
    assert 0.02 < (np.abs(actions) == 1).mean() < 0.5
    np.testing.assert_allclose(behaviour(s).detach(), pi, rtol=1e-9)  # an evaluation's has neither


def test_an_action_for_the_environment():
    torch.manual_seed(0)
    behaviour = Behaviour(Actor(3, 2), loud(Perturbation(3, 2)))
    policy, observation = oema.Policy(behaviour), np.ones(3, np.float32)
    actions = np.array([oema.explore(policy, observation, 0.5) for _ in range(2_000)])
    assert actions.shape == (2_000, 2) and actions.dtype == np.float32 and np.abs(actions).max() == 1
    still = oema.explore(policy, observation, 0.0)
    assert np.abs(still - policy(observation)).max() > 0.01
    for i in range(2):
        unclipped = np.abs(actions[:, i]) < 1
        low, high = (np.array([-1, 1]) - still[i]) / 0.5
        expected = scipy.stats.truncnorm(low, high, still[i], 0.5)
        assert scipy.stats.kstest(actions[unclipped, i], expected.cdf).pvalue > 0.01


@pytest.mark.parametrize("kappa_opt, expected", [(0.0, [2, 2, -4]), (1.0, [3, 5, -4]), (2.0, [4, 8, -4])])
def test_the_optimistic_value_by_hand(kappa_opt, expected):
    """Of the twins (1, 3), (5, -1), (-4, -4): their means at 0, the larger ones at 1."""
    values = torch.tensor([[1.0, 5.0, -4.0], [3.0, -1.0, -4.0]])
    assert oema.optimistic_value(values, kappa_opt).tolist() == expected


@pytest.mark.parametrize("kappa_opt", [0.0, 2.5])
def test_the_perturbations_loss_and_gradient(double, kappa_opt):
    """Against autograd of the formula, written out; the noise is inside, and the policy gets no gradient."""
    actor, xi, q, s = Actor(3, 2), Perturbation(3, 2), Critic(3, 2), torch.randn(64, 3)
    behaviour, weights = Behaviour(actor, xi), list(xi.parameters())

    def ours(noise):
        torch.manual_seed(3)
        loss = -oema.optimistic_value(q(s, behaviour.explore(s, noise)), kappa_opt).mean()
        assert torch.autograd.grad(loss, list(actor.parameters()), allow_unused=True, retain_graph=True) == (None,) * 6
        return loss, torch.autograd.grad(loss, weights)

    loss, gradients = ours(0.4)
    torch.manual_seed(3)
    noise = 0.4 * torch.randn(64, 2)
    pi = plain_pi(actor, s).detach()
    a = torch.clamp(pi + plain_mlp(weights, torch.cat([s, pi], 1)) + noise, -1, 1)
    q_1, q_2 = plain_q(q, 0, s, a), plain_q(q, 1, s, a)
    upper = torch.where(q_1 > q_2, q_1 - q_2, q_2 - q_1) / 2
    expected = -((q_1 + q_2) / 2 + kappa_opt * upper).mean()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(ours(0.0)[1][4], gradients[4], rtol=1e-3)


@pytest.mark.parametrize("kappa_opt, best", [(0.0, 0.2), (1.0, 0.6), (3.0, 0.95)])
def test_where_the_perturbation_climbs_to(double, kappa_opt, best):
    """Twins 1 - (a - 0.6)^2 and 0.9 - (a + 0.2)^2: their mean is best at 0.2, the larger at 0.6; with kappa_opt 3 it is
    twice the first less the second, best at 1.4, behind the bound."""

    def twin(s, a):
        return torch.stack([1 - (a[:, 0] - 0.6) ** 2, 0.9 - (a[:, 0] + 0.2) ** 2])

    behaviour, s = Behaviour(Actor(3, 1), Perturbation(3, 1)), torch.randn(32, 3)
    with torch.no_grad():
        behaviour.actor.network[4].weight.mul_(0)
        behaviour.actor.network[4].bias.fill_(0.3)
    adam = torch.optim.Adam(behaviour.perturbation.parameters(), 3e-3)
    for _ in range(200):
        oema.minimize(-oema.optimistic_value(twin(s, behaviour.explore(s, 0.0)), kappa_opt).mean(), adam)
    actions = behaviour.explore(s, 0.0)
    assert (actions >= best - 0.02).all() and (kappa_opt == 3 or (actions <= best + 0.02).all())


# ----------------------------------------------------------------------------------------------------------------------
# The adapted gradient
# ----------------------------------------------------------------------------------------------------------------------


def gradient(setup: tuple, **arguments) -> tuple:
    actor, q, s, meta = setup
    return oema.adapted_policy_gradient(actor, q, s, meta, Args(**arguments))


@pytest.fixture
def setup(double) -> tuple:
    return Actor(3, 2), Critic(3, 2), torch.randn(16, 3), torch.randn(16, 3) + 0.5


def plain_loss(weights: list, q: Critic, s: torch.Tensor) -> torch.Tensor:
    return -plain_q(q, 0, s, plain_mlp(weights, s)).mean()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_adapted_gradient_is_that_of_the_two_steps(setup, beta):
    """g + c grad L_2 taken at theta - 0.3 g, c and the inner g being numbers."""
    actor, q, s, meta = setup
    gradients, loss, c = gradient(setup, beta=beta, meta_lr=0.3)
    theta = list(actor.parameters())
    first = plain_loss(theta, q, s)
    inner = torch.autograd.grad(first, theta)
    moved = [(p.detach() - 0.3 * g).requires_grad_() for p, g in zip(theta, inner, strict=True)]
    second = plain_loss(moved, q, meta)
    outer = torch.autograd.grad(second, moved)
    share = beta * first.item() / second.item()
    torch.testing.assert_close(loss, first)
    assert c.item() == pytest.approx(share, rel=1e-9) and not c.requires_grad
    for got, g, h in zip(gradients, inner, outer, strict=True):
        torch.testing.assert_close(got, g + share * h, rtol=1e-9, atol=1e-13)

    def other(second_order: bool, constant: bool, at: float) -> list[torch.Tensor]:
        """What it is not: with another order, a c that has gradients, or L_2 at another point."""
        first = plain_loss(theta, q, s)
        g = torch.autograd.grad(first, theta, create_graph=second_order, retain_graph=True)
        second = plain_loss([p - at * x for p, x in zip(theta, g, strict=True)], q, meta)
        c = share if constant else beta * first / second
        return torch.autograd.grad(plain_loss(theta, q, s) + c * second, theta)

    for flags in ((True, True, 0.3), (False, False, 0.3), (False, True, 0.0)):
        assert not torch.allclose(other(*flags)[4], gradients[4], rtol=1e-3), flags
    assert torch.allclose(other(False, True, 0.3)[4], gradients[4], rtol=1e-9)


def test_the_adapted_gradient_by_hand():
    """pi(s) = theta s and Q_1(s, a) = a. L_1 = -theta m_1, its gradient -m_1; theta + alpha m_1 = 2 for theta = 1,
    m_1 = 2, alpha = 0.5. L_2 = -2 m_2 = 6 for m_2 = -3, so c = 0.5 (-2) / 6 = -1/6, and -2 + c 3 = -2.5."""
    actor = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(actor.weight)

    def critic(s, a, first_only):
        assert first_only
        return a.T

    setup = actor, critic, torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [-2.0]])
    (got,), loss, c = gradient(setup, beta=0.5, meta_lr=0.5)
    assert (got.item(), loss.item(), c.item()) == (pytest.approx(-2.5), pytest.approx(-2), pytest.approx(-1 / 6))
    (got,), _, c = gradient((*setup[:3], torch.tensor([[-1.0], [1.0]])), beta=0.5, meta_lr=0.5)
    assert not c.isfinite() and not got.isfinite()  # L_2 = 0: kept, and the run stops


def test_without_the_meta_loss_it_is_td3s_gradient(setup):
    actor, q, s, _ = setup
    gradients, loss, c = gradient(setup, beta=0.0, meta_lr=0.3)
    plain = torch.autograd.grad(-torch.mean(q(s, actor(s))[0]), list(actor.parameters()))
    assert c == 0 and loss.item() == pytest.approx(-q(s, actor(s))[0].mean().item())
    for got, want in zip(gradients, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_of_equal_batches_it_nears_twice_the_gradient(setup):
    actor, q, s, _ = setup
    plain = torch.autograd.grad(plain_loss(list(actor.parameters()), q, s), list(actor.parameters()))
    size = sum(g.square().sum() for g in plain).sqrt()

    def away(meta_lr: float) -> float:
        gradients, _, c = gradient((actor, q, s, s), beta=1.0, meta_lr=meta_lr)
        distance = sum((got - 2 * g).square().sum() for got, g in zip(gradients, plain, strict=True)).sqrt()
        return (distance / size).item() + abs(c.item() - 1)

    far, near, nearest = away(0.3), away(1e-3), away(1e-9)
    assert far > 0.05 and near < 0.05 * far and nearest < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Replay
# ----------------------------------------------------------------------------------------------------------------------


def transitions(seed: int, n: int) -> Transitions:
    rng = np.random.default_rng(seed)
    columns = [rng.standard_normal((n, 3)), rng.uniform(-1, 1, (n, 2)), rng.standard_normal(n)]
    columns += [rng.standard_normal((n, 3)), rng.random(n) < 0.3]
    return Transitions(*(np.asarray(column, np.float32) for column in columns))


@pytest.mark.parametrize(
    "added, capacity, expected",
    [
        (20, 80_000, [(0, 20)]),
        (3_000, 80_000, [(0, 3_000)]),
        (50_000, 80_000, [(0, 50_000)]),
        (70_000, 80_000, [(20_000, 70_000)]),
        (100_000, 80_000, [(50_000, 80_000), (0, 20_000)]),  # the ring has wrapped
        (170_000, 80_000, [(40_000, 80_000), (0, 10_000)]),
        (100_000, 30_000, [(10_000, 30_000), (0, 10_000)]),  # it holds fewer than 50,000
    ],
)
def test_the_newest_50000_online_transitions(added, capacity, expected):
    buffer = oema.ReplayBuffer(transitions(0, 7), capacity, CPU)
    buffer.added, buffer.n_online = added, min(added, capacity)
    buffer.online_size.fill_(buffer.n_online)
    torch.manual_seed(0)
    drawn = oema.sample_newest(buffer, torch.tensor(added), 200_000) - 7
    allowed = np.concatenate([np.arange(*part) for part in expected])
    assert np.isin(drawn, allowed).all()
    place = np.full(capacity, -1)
    place[allowed] = np.arange(len(allowed))
    counts = np.histogram(place[drawn], bins=min(20, len(allowed)), range=(0, len(allowed)))[0]
    assert counts.sum() == 200_000 and scipy.stats.chisquare(counts).pvalue > 0.001
    assert len(np.unique(drawn)) > 0.95 * len(allowed)


def test_the_newest_are_those_last_stored(monkeypatch):
    monkeypatch.setattr(oema, "NEWEST", 4)
    buffer = oema.ReplayBuffer(transitions(0, 7), 6, CPU)
    for i in range(20):
        buffer.add(np.zeros(3), np.zeros(2), i, np.zeros(3), 0)
        drawn = buffer[oema.sample_newest(buffer, torch.tensor(buffer.added), 100)].rewards
        assert set(drawn.tolist()) == {float(j) for j in range(max(0, i - 3), i + 1)}


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------


class Buffer(oema.ReplayBuffer):
    """Remembers the batches."""

    def __init__(self, offline: Transitions, online: Transitions):
        super().__init__(offline, 200, CPU)
        self.batches = []
        for i in range(len(online.rewards)):
            self.add(*(column[i] for column in online))

    def __getitem__(self, rows):
        batch = super().__getitem__(rows)
        self.batches.append((rows, batch, self.added))
        return batch


def seeded(function, seeds: list):
    """The function with random numbers of its own, a seed a call."""

    def call(*given):
        with torch.random.fork_rng():
            seeds.append(100 + len(seeds))
            torch.manual_seed(seeds[-1])
            return function(*given)

    return call


@pytest.mark.parametrize(
    "kappa_opt, beta, utd", [(0.0, 0.0, 1), (3.0, 1.0, 1), (0.5, 0.1, 2)], ids=["TD3's policy step", "OEMA", "UTD 2"]
)
def test_online_updates_are_plain_oema(double, monkeypatch, kappa_opt, beta, utd):
    """Eight updates against losses and optimisers of PyTorch's, in OEMA's order, down to the priorities."""
    args = Args(kappa_opt=kappa_opt, beta=beta, meta_lr=0.05, learning_rate=1e-3, tau=0.1, gamma=0.9, batch_size=16)
    args.utd, args.collect_steps, args.online_steps = utd, 30, 30 + 8 // utd
    agent = Agent(args, 3, 2, CPU)
    with torch.no_grad():
        agent.q_target.layers[0].weight.mul_(1.5)  # not the copies that they are, until they restart as such
        agent.actor_target.network[0].weight.mul_(1.5)
    plain, buffer = copy.deepcopy(agent), Buffer(transitions(1, 60), transitions(2, 30))
    balanced = oema.BalancedReplay(buffer, 16, CPU)
    ratio, leaves = copy.deepcopy(balanced.ratio), np.ones(98)
    smoothing, exploring, updates, stored = [], [], [], []
    monkeypatch.setattr(oema, "NEWEST", 10)
    monkeypatch.setattr(oema, "smoothed_actions", seeded(oema.smoothed_actions, smoothing))
    explore = seeded(Behaviour.explore, exploring)
    monkeypatch.setattr(Behaviour, "explore", lambda *given: explore(*given))

    def loop(name, total, **kwargs):
        for step in range(total):
            yield step
            updates.append({key: float(value) for key, value in run.metrics.items()})

    run = SimpleNamespace(device=CPU, metrics={}, policy=oema.Policy(agent.behaviour), loop=loop)
    more = transitions(9, 1)
    collector = SimpleNamespace(observation=np.zeros(3))

    def step(action):
        stored.append(action)
        return buffer.add(*(column[0] for column in more))

    collector.step = step
    oema.online_finetune(args, run, agent, buffer, balanced, collector)
    assert len(buffer.batches) == 8 + 4 + 8 and len(stored) == 8 // utd

    actor, q, xi, rate = plain.actor, plain.q, plain.perturbation, args.learning_rate
    actor_target, q_target = copy.deepcopy(actor), copy.deepcopy(q)  # the restart
    adam = {network: torch.optim.Adam(network.parameters(), rate) for network in (actor, q, xi)}
    adam[ratio] = torch.optim.Adam(ratio.parameters(), 3e-4)
    smoothing, exploring, batches, largest = iter(smoothing), iter(exploring), iter(buffer.batches), 1.0

    def descend(network, loss):
        adam[network].zero_grad()
        loss.backward()
        adam[network].step()

    def noise(seeds, deviation):
        torch.manual_seed(next(seeds))
        return deviation * torch.randn(16, 2)

    def perturbed(s, noise):
        with torch.no_grad():
            pi = plain_pi(actor, s)
        return torch.clamp(pi + plain_mlp(list(xi.parameters()), torch.cat([s, pi], 1)) + noise, -1, 1)

    for update in range(8):
        if update % utd == 0:
            torch.manual_seed(next(exploring))
            action = perturbed(torch.zeros(1, 3), 0.1 * torch.randn(1, 2))
            np.testing.assert_allclose(stored[update // utd], action[0].detach(), rtol=1e-7)
            leaves[90 + update // utd] = largest
        rows, (s, a, r, following, terminal), added = next(batches)
        assert added == 31 + update // utd  # after the environment step
        with torch.no_grad():
            a2 = plain_pi(actor_target, following) + noise(smoothing, 0.2).clamp(-0.5, 0.5)
            y = r + 0.9 * (1 - terminal) * torch.minimum(*q_target(following, a2.clamp(-1, 1)))
        q_loss = ((q(s, a)[0] - y) ** 2).mean() + ((q(s, a)[1] - y) ** 2).mean()
        descend(q, q_loss)
        expected = {"q_loss": q_loss, "online_share": (rows >= 60).double().mean()}
        if update % 2 == 1:
            drawn, meta, _ = next(batches)
            age = added - 1 - (drawn - 60)
            assert age.min() >= 0 and age.max() <= 9
            actor_loss = -plain_q(q, 0, s, actor(s)).mean()
            if beta == 0:
                descend(actor, actor_loss)
                expected |= {"meta_c": torch.zeros(())}
            else:
                inner = torch.autograd.grad(actor_loss, list(actor.parameters()))
                adapted = copy.deepcopy(actor)
                for p, g in zip(adapted.parameters(), inner, strict=True):
                    p.data -= 0.05 * g
                meta_loss = -plain_q(q, 0, meta.observations, adapted(meta.observations)).mean()
                meta_loss.backward()
                c = beta * actor_loss.item() / meta_loss.item()
                for p, g, other in zip(actor.parameters(), inner, adapted.parameters(), strict=True):
                    p.grad = g + c * other.grad
                adam[actor].step()
                expected |= {"meta_c": torch.tensor(c)}
            expected |= {"actor_loss": actor_loss, "q_mean": -actor_loss}
            for target, source in ((q_target, q), (actor_target, actor)):
                for old, new in zip(target.parameters(), source.parameters(), strict=True):
                    old.data.copy_(0.9 * old.data + 0.1 * new.data)
        explored = perturbed(s, noise(exploring, 0.1))
        q_1, q_2 = plain_q(q, 0, s, explored), plain_q(q, 1, s, explored)
        perturbation_loss = -((q_1 + q_2) / 2 + (kappa_opt * (q_1 - q_2).abs() / 2 if kappa_opt else 0)).mean()
        descend(xi, perturbation_loss)
        uniform, both, _ = next(batches)
        assert (uniform[:16] < 60).all() and (uniform[16:] >= 60).all()
        w = ratio(torch.cat([both.observations, both.actions], 1))[:, 0]
        off, on = w[:16], w[16:]
        bound = torch.log(2 / (off + 1) + 1e-10) + torch.log(2 * on / (on + 1) + 1e-10)
        descend(ratio, -bound.mean())
        with torch.no_grad():
            w = ratio(torch.cat([s, a], 1))[:, 0]
            priorities = (w**0.2 / ((off**0.2).mean() + 1e-10)).clamp(1e-3, 1e3)
        leaves[rows] = priorities.numpy()
        largest = max(largest, priorities.max().item())
        expected |= {"perturbation_loss": perturbation_loss, "density_ratio_loss": -bound.mean()}
        if update % utd == utd - 1:
            for name, value in expected.items():
                got = updates[update // utd][name]
                assert got == pytest.approx(value.item(), rel=1e-5, abs=1e-9), (update, name)
    assert next(batches, None) is None and largest > 1
    np.testing.assert_allclose(balanced.tree.leaves.view(-1)[: len(leaves)][: 90 + 8 // utd], leaves[: 90 + 8 // utd])
    pairs = {"actor": actor, "q": q, "perturbation": xi, "actor_target": actor_target, "q_target": q_target}
    for name, network in pairs.items():
        for got, want in zip(getattr(agent, name).parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=20, online_steps=50, collect_steps=30, batch_size=16)
TINY |= dict(eval_freq=0, eval_episodes=1, learning_rate=1e-3, progress=False)


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process; returns the folder, and copies of all parts at each phase's start and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def train(name: str = "run", script=oema, **arguments) -> tuple:
        states = watch_phases(script, monkeypatch)
        arguments = {"dataset": str(pendulum_file), "run_dir": str(tmp_path / name)} | TINY | arguments
        script.train(script.Args(**{k: value for k, value in arguments.items() if hasattr(script.Args, k)}))
        return tmp_path / name, states

    return train


OFFLINE = {"actor", "q", "actor_target", "q_target", "actor_optimizer", "q_optimizer"}
ALL = OFFLINE | {"perturbation", "perturbation_optimizer", "balanced", "ratio_optimizer"}


@pytest.mark.parametrize("utd", [1, 2])
def test_what_each_phase_changes(train, utd):
    """Offline all but the perturbation and the replay's; the collected steps nothing; online all, and Adam goes on."""
    folder, states = train(utd=utd)
    assert set(states["done"]) == ALL | {"buffer", "collector"}

    def changed(before: str, after: str) -> set[str]:
        return {name for name in ALL if not equal(states[before][name], states[after][name])}

    assert changed("offline", "collect") == OFFLINE
    assert changed("collect", "online_finetune") == set()
    assert states["online_finetune"]["buffer"]["added"] == 30
    assert changed("online_finetune", "done") == ALL
    online = 20 * utd
    counts = {"actor": 10 + online // 2, "q": 20 + online, "perturbation": online, "ratio": online}
    for name, count in counts.items():
        steps = {int(moments["step"]) for moments in states["done"][f"{name}_optimizer"]["state"].values()}
        assert steps == {count}, name
    found = [(row["phase"], int(row["gradient_steps"]), int(row["env_steps"])) for row in rows(folder, "speed.csv")]
    assert found == [("offline", 20, 0), ("collect", 0, 30), ("online_finetune", online, 20)]
    evaluated = [(row["phase"], row["env_steps"], row["return_mean"]) for row in rows(folder)]
    assert [row[:2] for row in evaluated[-3:]] == [("offline", "0"), ("collect", "30"), ("online_finetune", "50")]
    assert evaluated[-3][2] == evaluated[-2][2]  # the same policy


def test_the_first_steps_are_the_policys_own(train):
    """Neither noise nor perturbation until the first update."""
    _, states = train(online_steps=32, exploration_noise=0.3)
    online = states["done"]["buffer"]["online_rows"]
    behaviour = Behaviour(Actor(4, 1), Perturbation(4, 1))
    behaviour.actor.load_state_dict(states["collect"]["actor"])
    with torch.no_grad():
        own = behaviour(online[:, :4])
    torch.testing.assert_close(online[:30, 4:5], own[:30])
    assert (online[30:31, 4:5] - own[30:31]).abs() > 1e-3


def test_how_the_online_phase_starts(train, monkeypatch):
    """Every transition at priority 1, and targets that are copies; what comes in has the largest priority seen."""
    seen, explore, add = [], oema.explore, oema.BalancedReplay.add

    def watch(policy, *given):
        seen.append(copy.deepcopy({name: part.state_dict() for name, part in run[0].parts.items()}))
        return explore(policy, *given)

    def entered(replay, row):
        largest = replay.largest.item()
        add(replay, row)
        assert replay.tree.leaves.view(-1)[row] == largest

    run, start = [], oema.Run.start
    monkeypatch.setattr(oema, "explore", watch)
    monkeypatch.setattr(oema.BalancedReplay, "add", entered)
    monkeypatch.setattr(oema.Run, "start", lambda self, *given, **more: (run.append(self), start(self, *given, **more)))
    _, states = train()
    before = states["online_finetune"]
    assert not equal(before["q"], before["q_target"]) and not equal(before["actor"], before["actor_target"])
    first, last = seen[0], seen[-1]
    assert equal(first["q"], first["q_target"]) and equal(first["actor"], first["actor_target"])
    assert equal(first["q"], before["q"]) and equal(first["actor"], before["actor"])
    priorities = first["balanced"]["tree.leaves"].view(-1)
    torch.testing.assert_close(priorities[:5_030], torch.ones(5_030, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not priorities[5_030:].any() and first["balanced"]["largest"].item() == pytest.approx(1, rel=1e-12)
    assert len(seen) == 20 and last["balanced"]["largest"] > 1
    assert (last["balanced"]["tree.leaves"].view(-1)[:5_049] > 0).all()


def test_the_policy_alone_is_evaluated(train, monkeypatch):
    """Without perturbation or noise; and how often that is done changes nothing else."""
    evaluated, evaluate = [], oema.evaluate

    def watch(policy, env, *given):
        observation = np.linspace(-1, 1, 4, dtype=np.float32)
        own = policy.source.actor(torch.from_numpy(observation)[None])[0].detach().numpy()
        np.testing.assert_array_equal(policy(observation), own)
        explored = oema.explore(policy, observation, 0.0)
        evaluated.append(float(np.abs(explored - own).max()))
        return evaluate(policy, env, *given)

    monkeypatch.setattr(oema, "evaluate", watch)
    often = train("often", eval_freq=7, eval_episodes=2)[0]
    rare = train("rare")[0]
    assert len(rows(often)) > len(rows(rare)) + 3 and len(evaluated) == len(rows(often)) + len(rows(rare))
    assert min(evaluated) > 1e-4 and same_weights(rare, often)


def test_an_offline_phase_of_td3(train):
    """td3_opt.py's without normalised states is its own, bit for bit; optimisers are taken over too. And back."""
    whole, _ = train("whole")
    folder, _ = train("td3", script=td3_opt, opt=False, normalize_states=False)
    shared, states = train("shared", offline_from=str(folder))
    saved = torch.load(folder / "offline.pt", weights_only=True)["parts"]
    for ours, theirs in (("actor", "actor"), ("q", "q_off"), ("q_target", "q_off_target")):
        assert equal(states["collect"][ours], saved[theirs])
        assert theirs == "q_off_target" or equal(states["collect"][f"{ours}_optimizer"], saved[f"{theirs}_optimizer"])
    assert same_weights(shared, whole)
    back, _ = train("back", script=td3_opt, opt=False, normalize_states=False, offline_from=str(whole))
    assert same_weights(back, folder)
    folder, _ = train("normalised", script=td3_opt, opt=False, online_steps=5)
    with pytest.raises(oema.BadInput, match=r"--normalize-states True \(now False\): write the same"):
        train("refused", offline_from=str(folder))
    train("normal", offline_from=str(folder), normalize_states=True)


def test_a_run_whose_c_is_not_finite_stops(train):
    with pytest.raises(FloatingPointError, match=r"(loss|meta_c) is (nan|-?inf) in phase online_finetune"):
        train(online_steps=34, beta=1e300)


MUJOCO = ("halfcheetah", "hopper", "walker2d")
TABLE = {"random": ((5, 1), (5, 1), (8, 1)), "medium": ((5, 1), (5, 1), (1, 1))}
TABLE |= {"medium-replay": ((5, 1), (2, 1), (1, 0.1)), "medium-expert": ((5, 1), (2, 1), (1, 1))}
TABLE["expert"] = ((1, 1), (1, 1), (1, 1))
VALUES = [(f"{env}-{kind}-v2", *pair) for kind in TABLE for env, pair in zip(MUJOCO, TABLE[kind], strict=True)]
VALUES += [(env, 1, 1) for env in ("antmaze-large-play-v2", "relocate-cloned-v1", "InvertedPendulum-v5")]


@pytest.mark.parametrize("env_id, kappa_opt, beta", VALUES)
def test_the_values_of_each_task(env_id, kappa_opt, beta):
    args = oema.resolve(Args(env_id=env_id))
    assert (args.kappa_opt, args.beta, args.exp_name, args.normalize_states) == (kappa_opt, beta, "oema", False)
    assert (args.collect_steps, args.utd, args.batch_size, args.policy_frequency) == (25_000, 1, 256, 2)
    assert (args.learning_rate, args.meta_lr, args.gamma, args.tau) == (3e-4, 3e-4, 0.99, 0.005)
    assert (args.exploration_noise, args.policy_noise, args.noise_clip, args.bc_alpha) == (0.1, 0.2, 0.5, 2.5)
    assert (args.offline_steps, args.online_steps, oema.NEWEST) == (1_000_000, 300_000, 50_000)
    assert oema.reward_transform(env_id, transitions(0, 50)) == (1.0, -1.0 if "antmaze" in env_id else 0.0)
    given = oema.resolve(Args(env_id=env_id, kappa_opt=0.5, beta=0.0, exp_name="mine"))
    assert (given.kappa_opt, given.beta, given.exp_name) == (0.5, 0.0, "mine")


def test_a_run_on_mujoco(train, tmp_path):
    path = write_file(tmp_path / "hopper.hdf5", roll_out(gym.make("Hopper-v5"), 300, 0))
    own = dict(env_id="hopper-random-v2", dataset=str(path), offline_steps=3, online_steps=12, collect_steps=6)
    folder, states = train(**own)
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["args"]["kappa_opt"] == 5 and not model["observation_mean"].any()
    actor = Actor(11, 3)  # what README says of model.pt
    actor.load_state_dict(model["actor"])
    online = states["done"]["buffer"]["online_rows"]
    assert online.shape == (12, 11 + 3 + 1 + 11 + 1) and (online[:, 11:14].abs() <= 1).all()


def test_a_run_on_antmaze(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect("D4RL/antmaze/umaze-v1", Walk(), [None, None])
    own = dict(env_id="antmaze-umaze-v2", dataset=None, offline_steps=2, online_steps=8, collect_steps=4)
    states = train(**own)[1]
    assert (states["done"]["buffer"]["online_rows"][:, 29 + 8] == -1).all()  # a reward of -1 until the goal


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("--collect-steps is 0: write 1 or more, and less than --online-steps (300000)", dict(collect_steps=0)),
        ("--collect-steps is 25000: write 1 or more, and less than --online-steps (25000)", dict(online_steps=25_000)),
        ("--kappa-opt is -1.0: write a number, 0 or more", dict(kappa_opt=-1.0)),
        ("--beta is nan: write a number, 0 or more", dict(beta=math.nan)),
        ("--beta is inf: ", dict(beta=math.inf)),
        ("--meta-lr is 0.0: write a positive number", dict(meta_lr=0.0)),
        ("--policy-frequency is 0: write 1 or more", dict(policy_frequency=0)),
    ],
)
def test_its_own_arguments(words, arguments):
    with pytest.raises(oema.BadInput) as error:
        oema.resolve(Args(**arguments))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
