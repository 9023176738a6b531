"""BOORL: its agents as one network, their masks, the choice of one, updates against plain agents apart, whole runs."""

import copy
from types import SimpleNamespace

import boorl
import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import td3_opt
import torch
import torch.nn as nn
from boorl import Actor, Agent, Args, Critic, Ensemble, Transitions
from conftest import roll_out, write_file
from runs import equal, rows, same_weights, watch_phases

CPU = torch.device("cpu")


@pytest.fixture
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(layers: nn.ModuleList, member: int) -> nn.Sequential:
    """A member of a stack as layers of PyTorch's."""
    linears = [nn.Linear(*layer.weight.shape[1:]) for layer in layers]
    for linear, layer in zip(linears, layers, strict=True):
        linear.weight.data, linear.bias.data = layer.weight[member].data.T.clone(), layer.bias[member, 0].data.clone()
    return nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])


class Apart:
    """One of the agents, alone: three networks and their targets."""

    def __init__(self, agent: Agent, i: int):
        n = len(agent.actor.layers[0].weight)
        self.actor, self.actor_target = (mlp(part.layers, i).append(nn.Tanh()) for part in pair(agent, "actor"))
        self.critics, self.q_targets = ([mlp(part.layers, k) for k in (i, n + i)] for part in pair(agent, "q"))

    def networks(self) -> dict[str, list[nn.Sequential]]:
        pairs = {"actor": [self.actor], "actor_target": [self.actor_target]}
        return pairs | {"q": self.critics, "q_target": self.q_targets}


def pair(agent: Agent, name: str) -> tuple[nn.Module, nn.Module]:
    return getattr(agent, name), getattr(agent, f"{name}_target")


def q_of(critic: nn.Sequential, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return critic(torch.cat([s, a], 1))[:, 0]


def members(network: nn.Module, member: int, values: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """A member's part of a stack's parameters, or of `values` for each of them, as mlp() has them."""
    values = list(network.parameters()) if values is None else values
    return [value[member].T if value.shape[1] > 1 else value[member, 0] for value in values]


def transitions(seed: int, n: int) -> Transitions:
    rng = np.random.default_rng(seed)
    columns = [rng.standard_normal((n, 3)), rng.uniform(-1, 1, (n, 2)), rng.standard_normal(n)]
    columns += [rng.standard_normal((n, 3)), rng.random(n) < 0.3]
    return Transitions(*(np.asarray(column, np.float32) for column in columns))


# ----------------------------------------------------------------------------------------------------------------------
# Five agents as one network
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_the_agents_together_are_the_agents_apart(double, n):
    """Actions, values, losses and gradients: each agent's are those of its own networks on its own batch."""
    agent = Agent(Args(agents=n), 3, 2, CPU)
    s, a = torch.randn(n, 16, 3), torch.rand(n, 16, 2) * 2 - 1
    target = torch.randn(n, 16)
    pi, values = agent.actor(s), agent.q(s, a)
    assert pi.shape == (n, 16, 2) and values.shape == (2, n, 16)
    q_loss = boorl.td_loss(values, target)
    q_gradients = torch.autograd.grad(q_loss, list(agent.q.parameters()))
    of_pi = agent.q.first(s, pi)
    assert of_pi.shape == (n, 16)
    actor_loss = boorl.td3_bc_loss(of_pi, pi, a, 1.7)
    actor_gradients = torch.autograd.grad(actor_loss, list(agent.actor.parameters()))
    losses = []
    for i in range(n):
        one = Apart(agent, i)
        torch.testing.assert_close(pi[i], one.actor(s[i]))
        loss = 0
        for j in (0, 1):
            q = q_of(one.critics[j], s[i], a[i])
            torch.testing.assert_close(values[j, i], q)
            loss = loss + nn.functional.mse_loss(q, target[i])
        for j in (0, 1):
            wanted = torch.autograd.grad(loss, list(one.critics[j].parameters()), retain_graph=True)
            got = members(agent.q, j * n + i, q_gradients)
            torch.testing.assert_close(got, list(wanted), rtol=1e-9, atol=1e-14)
        action = one.actor(s[i])
        q = q_of(one.critics[0], s[i], action)
        torch.testing.assert_close(of_pi[i], q)
        of_actor = nn.functional.mse_loss(action, a[i]) - 1.7 / q.abs().mean().item() * q.mean()
        wanted = torch.autograd.grad(of_actor, list(one.actor.parameters()))
        torch.testing.assert_close(members(agent.actor, i, actor_gradients), list(wanted), rtol=1e-9, atol=1e-14)
        losses.append((loss.item(), of_actor.item()))
    assert (q_loss.item(), actor_loss.item()) == pytest.approx(tuple(np.sum(losses, 0)))


def test_no_agents_loss_has_gradients_in_another(double):
    agent, s, a = Agent(Args(), 3, 2, CPU), torch.randn(5, 8, 3), torch.rand(5, 8, 2) * 2 - 1
    for i in range(5):
        pi = agent.actor(s)
        losses = [(boorl.td_loss(agent.q(s, a)[:, i : i + 1], torch.zeros(1, 8)), agent.q, {i, 5 + i})]
        values = agent.q.first(s, pi)
        losses.append((boorl.td3_bc_loss(values[i : i + 1], pi[i : i + 1], a[i : i + 1], 2.5), agent.actor, {i}))
        losses.append((-values[i].mean(), agent.actor, {i}))
        for loss, network, own in losses:
            for gradient in torch.autograd.grad(loss, list(network.parameters()), retain_graph=True):
                assert {k for k in range(len(gradient)) if gradient[k].any()} == own


def test_td3_bcs_loss_by_hand():
    """Q = 1, -3 for the first: lambda = 2 / 2, so -1 (-1) + (0.25 + 0) / 2 = 1.125. Q = 4, 4: -0.5 4 + 1 = -1."""
    values = torch.tensor([[1.0, -3.0], [4.0, 4.0]])
    pi = torch.tensor([[[0.5], [0.0]], [[1.0], [-1.0]]])
    assert boorl.td3_bc_loss(values[:1], pi[:1], torch.zeros(1, 2, 1), 2.0).item() == pytest.approx(1.125)
    assert boorl.td3_bc_loss(values, pi, torch.zeros(2, 2, 1), 2.0).item() == pytest.approx(1.125 - 1)


def test_the_agents_start_apart_as_pytorchs_layers():
    agent = Agent(Args(), 3, 2, CPU)
    for name, inputs in (("actor", 3), ("q", 5)):
        network, target = pair(agent, name)
        assert equal(network.state_dict(), target.state_dict()) and not set(network.parameters()) & set(
            target.parameters()
        )
        for layer, size in zip(network.layers, (inputs, 256, 256), strict=True):
            assert 0.9 < layer.weight.abs().max() * size**0.5 <= 1
            assert len(set(layer.weight[:, 0, 0].tolist())) == len(layer.weight) == (5 if name == "actor" else 10)
    assert not equal(agent.q.state_dict(), Agent(Args(seed=1), 3, 2, CPU).q.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# The choice of an agent
# ----------------------------------------------------------------------------------------------------------------------


def constant(values: list[list[float]]) -> Ensemble:
    """Agent i acts as i / 10 and (1 - i) / 10 in any state; the twins' values are those given, [agents, 2]."""
    n = len(values)
    ensemble = Ensemble(Actor(n, 3, 2), Critic(n, 3, 2))
    with torch.no_grad():
        for network in (ensemble.actor, ensemble.q):
            network.layers[2].weight.zero_()
        i = torch.arange(n)
        ensemble.actor.layers[2].bias.copy_(torch.stack([i, 1 - i], 1).unsqueeze(1) / 10).atanh_()
        ensemble.q.layers[2].bias.copy_(torch.tensor(values).T.reshape(2 * n, 1, 1))
    return ensemble


def chosen(ensemble: Ensemble, n: int) -> np.ndarray:
    """How often each agent is chosen for n states."""
    actions = ensemble.choose(torch.randn(n, 3)) * 10
    agents = actions[:, 0].round()
    torch.testing.assert_close(actions, torch.stack([agents, 1 - agents], 1), rtol=0, atol=1e-4)
    return np.bincount(agents.long(), minlength=len(ensemble.actor.layers[0].weight))


def test_agents_of_equal_value_are_drawn_evenly():
    torch.manual_seed(0)
    counts = chosen(constant([[2.0, 3.0]] * 5), 20_000)
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_an_agent_is_drawn_in_proportion_to_exp_of_its_lesser_value():
    """Lesser values ln 1, ln 2, ln 4, ln 3, ln 10, the other twin far above."""
    torch.manual_seed(0)
    shares = np.array([1, 2, 4, 3, 10])
    values = [[v, v + 5] if i % 2 else [v + 5, v] for i, v in enumerate(np.log(shares).tolist())]
    counts = chosen(constant(values), 20_000)
    assert scipy.stats.chisquare(counts, shares * 1_000).pvalue > 0.01
    shifted = chosen(constant([[v + 3_000, w + 3_000] for v, w in values]), 20_000)
    assert scipy.stats.chisquare(shifted, shares * 1_000).pvalue > 0.001  # in float32's rounding of 3,000
    assert chosen(constant([[0.0, 0.0], [50.0, 80.0], [0.0, 90.0]]), 1_000).tolist() == [0, 1_000, 0]


def test_the_choice_is_by_each_agents_value_of_its_own_action(double):
    """Against softmax of plain networks, state by state."""
    agent = Agent(Args(), 3, 2, CPU)
    with torch.no_grad():
        agent.q.layers[2].weight.mul_(5)
        agent.actor.layers[2].weight.mul_(5)
    s = 2 * torch.randn(4, 3)
    apart = [Apart(agent, i) for i in range(5)]
    values = torch.stack(
        [torch.stack([q_of(q, s, one.actor(s)) for q in one.critics]).min(0).values for one in apart], 1
    )
    shares = torch.softmax(values, 1).detach().numpy()
    assert shares.min() > 1e-3 and np.ptp(shares, axis=1).min() > 0.1
    pi = torch.stack([one.actor(s) for one in apart], 1)
    drawn = agent.ensemble.choose(s.repeat_interleave(5_000, 0)).view(4, 5_000, 1, 2)
    same = (drawn - pi.unsqueeze(1)).abs().amax(3) < 1e-9
    assert same.sum(2).eq(1).all()
    for counts, expected in zip(same.sum(1).numpy(), shares, strict=True):
        assert scipy.stats.chisquare(counts, expected / expected.sum() * 5_000).pvalue > 0.001


def test_an_action_for_the_environment():
    """An agent's, with noise, clipped; another agent's in the next step."""
    torch.manual_seed(0)
    policy, observation = boorl.Policy(constant([[1.0, 1.0]] * 5)), np.ones(3, np.float32)
    still = np.array([boorl.explore(policy, observation, 0.0) for _ in range(300)])
    assert still.shape == (300, 2) and still.dtype == np.float32
    assert set((still[:, 0] * 10).round().astype(int)) == set(range(5))
    assert (np.diff(still[:, 0]) != 0).mean() > 0.6
    policy = boorl.Policy(constant([[90.0, 90.0]] + [[1.0, 1.0]] * 4))  # always the first, 0 and 0.1
    noisy = np.array([boorl.explore(policy, observation, 0.5) for _ in range(2_000)])
    assert np.abs(noisy).max() == 1
    for i, mean in enumerate((0.0, 0.1)):
        unclipped = noisy[:, i][np.abs(noisy[:, i]) < 1]
        expected = scipy.stats.truncnorm((-1 - mean) / 0.5, (1 - mean) / 0.5, mean, 0.5)
        assert scipy.stats.kstest(unclipped, expected.cdf).pvalue > 0.01


def test_an_evaluations_action_is_the_mean_of_the_agents(double):
    agent, s = Agent(Args(), 3, 2, CPU), torch.randn(7, 3)
    apart = np.mean([Apart(agent, i).actor(s).detach().numpy() for i in range(5)], 0)
    np.testing.assert_allclose(agent.ensemble(s).detach(), apart, rtol=1e-9)
    policy = boorl.Policy(agent.ensemble)
    np.testing.assert_allclose(policy(s[0].numpy()), apart[0], rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------------------------------


def test_the_masks_are_bernoulli_and_apart():
    n = 40_000
    rows_of, sizes = boorl.draw_masks(5, n, 3, CPU)
    assert rows_of.shape == (5, n) and sizes.shape == (5, 1)
    masks = np.zeros((5, n), bool)
    for mask, row, size in zip(masks, rows_of.numpy(), sizes[:, 0].tolist(), strict=True):
        assert np.array_equal(np.sort(row), np.arange(n))
        mask[row[:size]] = True
        assert scipy.stats.binomtest(size, n, 0.9).pvalue > 0.001
    correlation = np.corrcoef(masks)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 4 / n**0.5
    runs = (masks[:, 1:] != masks[:, :-1]).sum(1)  # of neighbours 18 in 100 differ
    assert (np.abs(runs - 0.18 * n) < 5 * (0.18 * n) ** 0.5).all()


def test_the_masks_are_the_seeds():
    state = torch.get_rng_state()
    first, again, other = (boorl.draw_masks(2, 1_000, seed, CPU) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------


class Buffer(boorl.ReplayBuffer):
    """Remembers the batches of `agents` agents, and how many transitions there were."""

    def __init__(self, agents: int, offline: Transitions, online: Transitions):
        super().__init__(offline, 400, CPU)
        self.agents, self.batches = agents, []
        for i in range(len(online.rewards)):
            self.add(*(column[i] for column in online))

    def __getitem__(self, rows):
        batch = super().__getitem__(rows)
        split = [column.view(self.agents, -1, *column.shape[1:]) for column in batch]
        self.batches.append((rows.view(self.agents, -1), Transitions(*split), self.n_online))
        return batch


def recorded(buffer: Buffer, agent: Agent) -> tuple:
    """A run in whose place a phase can be taken, its collector, and the metrics after each of its steps."""
    metrics, more = [], transitions(9, 1)

    def loop(name, total, **kwargs):
        for step in range(total):
            yield step
            metrics.append({key: float(value) for key, value in run.metrics.items()})

    def step(action):
        return buffer.add(*(column[0] for column in more))

    run = SimpleNamespace(device=CPU, metrics={}, policy=boorl.Policy(agent.ensemble), loop=loop)
    return run, SimpleNamespace(observation=torch.zeros(3).numpy(), step=step), metrics


@pytest.fixture
def smoothing(monkeypatch) -> list[torch.Tensor]:
    """The noise of target policy smoothing of each call, in the order of calls."""
    seen, smoothed_actions = [], boorl.smoothed_actions

    def watch(actor_target, observations, args):
        with torch.random.fork_rng():
            torch.manual_seed(100 + len(seen))
            seen.append(torch.randn(*observations.shape[:2], 2))
            torch.manual_seed(100 + len(seen) - 1)
            return smoothed_actions(actor_target, observations, args)

    monkeypatch.setattr(boorl, "smoothed_actions", watch)
    return seen


def move(target: nn.Module, source: nn.Module) -> None:
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data.copy_(0.9 * old.data + 0.1 * new.data)


class Plain:
    """An agent apart, with optimisers of PyTorch's: TD3's and TD3+BC's steps in plain code."""

    def __init__(self, agent: Agent, i: int, rate: float):
        self.own = Apart(agent, i)
        self.q_adam = torch.optim.Adam([p for q in self.own.critics for p in q.parameters()], rate)
        self.actor_adam = torch.optim.Adam(self.own.actor.parameters(), rate)

    def critic_step(self, batch: Transitions, noise: torch.Tensor) -> float:
        own, (s, a, r, following, terminal) = self.own, batch
        with torch.no_grad():
            a2 = (own.actor_target(following) + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
            y = r + 0.9 * (1 - terminal) * torch.minimum(*(q_of(q, following, a2) for q in own.q_targets))
        loss = sum(((q_of(q, s, a) - y) ** 2).mean() for q in own.critics)
        self.descend(self.q_adam, loss)
        return loss.item()

    def actor_step(self, batch: Transitions, bc: bool) -> float:
        action = self.own.actor(batch.observations)
        q = q_of(self.own.critics[0], batch.observations, action)
        loss = -q.mean()
        if bc:
            loss = 2.5 / q.abs().mean().item() * loss + ((action - batch.actions) ** 2).mean()
        self.descend(self.actor_adam, loss)
        return loss.item()

    def descend(self, adam: torch.optim.Adam, loss: torch.Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    def follow(self, *names: str) -> None:
        for name in names:
            for target, source in zip(self.own.networks()[f"{name}_target"], self.own.networks()[name], strict=True):
                move(target, source)


def assert_same(agent: Agent, plain: list[Plain]) -> None:
    for i, one in enumerate(plain):
        for name, networks in one.own.networks().items():
            for j, network in enumerate(networks):
                got = members(getattr(agent, name), j * len(plain) + i)
                torch.testing.assert_close(got, list(network.parameters()), rtol=1e-6, atol=1e-9)


def settings(agents: int, **more) -> Args:
    return Args(agents=agents, learning_rate=1e-3, tau=0.1, gamma=0.9, batch_size=16, **more)


@pytest.mark.parametrize("n", [1, 3])
def test_offline_updates_are_td3_bc_of_each_agent(double, smoothing, n):
    """Each on batches of its own, from its own part of the data."""
    args = settings(n, offline_steps=40, seed=2)
    agent, data = Agent(args, 3, 2, CPU), transitions(1, 60)
    plain, buffer = [Plain(agent, i, 1e-3) for i in range(n)], Buffer(n, data, transitions(2, 30))
    run, _, metrics = recorded(buffer, agent)
    boorl.offline_pretrain(args, run, agent, buffer)
    assert len(buffer.batches) == len(smoothing) == 40
    drawn = [set() for _ in range(n)]
    for step, ((taken, batch, _), noise) in enumerate(zip(buffer.batches, smoothing, strict=True)):
        q_losses, actor_losses = [], []
        for i, one in enumerate(plain):
            drawn[i] |= set(taken[i].tolist())
            own = Transitions(*(column[i] for column in batch))
            np.testing.assert_array_equal(own.observations, data.observations[taken[i]])
            q_losses.append(one.critic_step(own, noise[i]))
            if step % 2 == 1:
                actor_losses.append(one.actor_step(own, bc=True))
                one.follow("q", "actor")
        assert metrics[step]["q_loss"] == pytest.approx(sum(q_losses), rel=1e-6)
        assert not actor_losses or metrics[step]["actor_loss"] == pytest.approx(sum(actor_losses), rel=1e-6)
        assert n == 1 or not torch.equal(taken[0], taken[1])
    assert_same(agent, plain)
    own_rows, sizes = boorl.draw_masks(n, 60, 1_002, CPU)
    for i in range(n):
        assert drawn[i] == set(own_rows[i, : sizes[i]].tolist()) and 40 < len(drawn[i]) < 60


def test_offline_batches_are_uniform_over_an_agents_own_part(monkeypatch):
    args = Args(agents=2, batch_size=64, offline_steps=60)
    agent, buffer = Agent(args, 3, 2, CPU), Buffer(2, transitions(1, 50), transitions(2, 0))
    boorl.offline_pretrain(args, recorded(buffer, agent)[0], agent, buffer)
    own_rows, sizes = boorl.draw_masks(2, 50, 1_000, CPU)
    drawn = torch.cat([taken for taken, *_ in buffer.batches], 1).numpy()
    for i in range(2):
        counts = np.bincount(drawn[i], minlength=50)[own_rows[i, : sizes[i]]]
        assert counts.sum() == 60 * 64 and scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("n, utd", [(1, 5), (3, 5), (3, 1)])
def test_online_updates_are_td3_of_each_agent_on_one_batch(double, smoothing, n, utd):
    """utd critic steps, the critic's target after each; then a step of the policy on the last batch, and its target."""
    args = settings(n, utd=utd, collect_steps=30, online_steps=30 + 6)
    agent = Agent(args, 3, 2, CPU)
    with torch.no_grad():
        agent.q_target.layers[0].weight.mul_(1.5)  # not the copies that they are, until they restart as such
        agent.actor_target.layers[0].weight.mul_(1.5)
    plain, buffer = [Plain(agent, i, 1e-3) for i in range(n)], Buffer(n, transitions(1, 60), transitions(2, 30))
    for one in plain:
        one.own.actor_target, one.own.q_targets = copy.deepcopy(one.own.actor), copy.deepcopy(one.own.critics)
    run, collector, metrics = recorded(buffer, agent)
    boorl.online_finetune(args, run, agent, buffer, collector)
    assert len(buffer.batches) == len(smoothing) == 6 * utd
    for update, ((taken, batch, n_online), noise) in enumerate(zip(buffer.batches, smoothing, strict=True)):
        assert n_online == 31 + update // utd  # after the environment step
        assert (taken == taken[0]).all() and taken.shape == (n, 16)
        assert (taken[0, :8] < 90).all() and (taken[0, 8:] >= 60).all() and (taken[0] < 60 + n_online).all()
        own = Transitions(*(column[0] for column in batch))
        q_loss = sum(one.critic_step(own, noise[i]) for i, one in enumerate(plain))
        assert n == 1 or not torch.equal(noise[0], noise[1])
        for one in plain:
            one.follow("q")
        if update % utd == utd - 1:
            actor_loss = sum(one.actor_step(own, bc=False) for one in plain)
            for one in plain:
                one.follow("actor")
            assert metrics[update // utd]["q_loss"] == pytest.approx(q_loss, rel=1e-6)
            assert metrics[update // utd]["actor_loss"] == pytest.approx(actor_loss, rel=1e-6)
            assert metrics[update // utd]["q_mean"] == pytest.approx(-actor_loss / n, rel=1e-6)
    assert_same(agent, plain)


def test_the_collected_transitions_are_offline_data_too():
    """Half of a batch is uniform over the dataset and the first 30 online transitions, half over all online ones."""
    args = Args(agents=1, batch_size=64, utd=60, collect_steps=30, online_steps=31)
    agent, buffer = Agent(args, 3, 2, CPU), Buffer(1, transitions(1, 20), transitions(2, 50))
    run, collector, _ = recorded(buffer, agent)
    boorl.online_finetune(args, run, agent, buffer, collector)
    drawn = torch.cat([taken for taken, *_ in buffer.batches]).numpy()
    for part, first, size in ((drawn[:, :32], 0, 50), (drawn[:, 32:], 20, 51)):
        counts = np.bincount(part.ravel(), minlength=71)
        assert counts.sum() == 60 * 32 == counts[first : first + size].sum()
        assert scipy.stats.chisquare(counts[first : first + size]).pvalue > 0.001


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=20, online_steps=50, collect_steps=30, batch_size=16)
TINY |= dict(eval_freq=0, eval_episodes=1, learning_rate=1e-3, progress=False)


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process; returns the folder, and copies of all parts at each phase's start and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def train(name: str = "run", script=boorl, **arguments) -> tuple:
        states = watch_phases(script, monkeypatch)
        arguments = {"dataset": str(pendulum_file), "run_dir": str(tmp_path / name)} | TINY | arguments
        script.train(script.Args(**{k: value for k, value in arguments.items() if hasattr(script.Args, k)}))
        return tmp_path / name, states

    return train


ALL = {"actor", "q", "actor_target", "q_target", "actor_optimizer", "q_optimizer"}


def test_what_each_phase_changes(train):
    """The collected steps nothing, the other phases all; Adam goes on, with a policy step an environment step."""
    folder, states = train()
    assert set(states["done"]) == ALL | {"buffer", "collector"}

    def changed(before: str, after: str) -> set[str]:
        return {name for name in ALL if not equal(states[before][name], states[after][name])}

    assert changed("offline", "collect") == changed("online_finetune", "done") == ALL
    assert changed("collect", "online_finetune") == set()
    assert states["online_finetune"]["buffer"]["added"] == 30
    for name, count in {"actor": 10 + 20, "q": 20 + 20 * 5}.items():
        steps = {int(moments["step"]) for moments in states["done"][f"{name}_optimizer"]["state"].values()}
        assert steps == {count}, name
    found = [(row["phase"], int(row["gradient_steps"]), int(row["env_steps"])) for row in rows(folder, "speed.csv")]
    assert found == [("offline", 20, 0), ("collect", 0, 30), ("online_finetune", 100, 20)]
    evaluated = [(row["phase"], row["env_steps"], row["return_mean"]) for row in rows(folder)]
    assert [row[:2] for row in evaluated[-3:]] == [("offline", "0"), ("collect", "30"), ("online_finetune", "50")]
    assert evaluated[-3][2] == evaluated[-2][2]  # the same policy


def test_the_offline_agents_act_first(train):
    """One of them at each step, with noise from the first one on, until the first update."""

    def distances(noise: float) -> torch.Tensor:
        """Of the 32 actions from each offline agent's, [5, 32]."""
        _, states = train(f"noise {noise}", exploration_noise=noise, online_steps=32)
        online, actor = states["done"]["buffer"]["online_rows"], Actor(5, 4, 1)
        actor.load_state_dict(states["collect"]["actor"])
        return (actor(online[:, :4]) - online[:, 4:5]).abs().squeeze(2)

    near = distances(0.0) < 1e-6
    assert near[:, :31].sum(0).eq(1).all() and near[:, :31].any(1).sum() >= 3
    assert not near[:, 31].any()
    assert 0.05 < distances(0.2)[:, :30].amin(0).mean() < 0.2


def test_one_agent_is_td3_with_symmetric_replay(train, monkeypatch):
    """td3_opt.py's online phase from the same weights, with a step of the policy after each of the critic. Without
    noise, for which the scripts draw differently, and with one seed for the phase."""
    own = dict(offline_steps=0, agents=1, utd=1, policy_frequency=1, online_steps=80, collect_steps=0, tau=0.05)
    for script in (boorl, td3_opt):
        monkeypatch.setattr(script, "explore", lambda policy, observation, noise: policy(observation))
    _, states = train("td3", td3_opt, opt=False, normalize_states=False, replay="symmetric", **own)
    monkeypatch.setattr(boorl, "PHASES", td3_opt.PHASES)
    before, after = (as_one_agent(states[phase]) for phase in ("offline", "done"))
    start = Agent.__init__

    def start_the_same(agent, *given):
        start(agent, *given)
        for name, state in before.items():
            getattr(agent, name).load_state_dict(state)

    monkeypatch.setattr(Agent, "__init__", start_the_same)
    _, ours = train("boorl", **own)
    online, expected = (of["done"]["buffer"]["online_rows"] for of in (ours, states))
    torch.testing.assert_close(online, expected, rtol=1e-3, atol=1e-4)
    for name, state in after.items():
        for key, value in state.items():
            moved = (value - before[name][key]).norm()
            assert (ours["done"][name][key] - value).norm() < 0.01 * moved, (name, key)


def as_one_agent(states: dict) -> dict:
    """TD3's networks as those of one agent."""
    found = {"q": states["q_off"], "q_target": states["q_off_target"]}
    for name in ("actor", "actor_target"):
        layers = [(i, kind, states[name][f"network.{2 * i}.{kind}"]) for i in range(3) for kind in ("weight", "bias")]
        found[name] = {
            f"layers.{i}.{kind}": (p.mT if p.dim() == 2 else p).reshape(1, -1, len(p)) for i, kind, p in layers
        }
    return found


def test_how_the_online_phase_starts(train, monkeypatch):
    """Targets are copies of what the offline phase has left."""
    seen, explore, run, start = [], boorl.explore, [], boorl.Run.start

    def watch(policy, *given):
        seen.append(copy.deepcopy({name: part.state_dict() for name, part in run[0].parts.items()}))
        return explore(policy, *given)

    monkeypatch.setattr(boorl, "explore", watch)
    monkeypatch.setattr(
        boorl.Run, "start", lambda self, *given, **more: (run.append(self), start(self, *given, **more))
    )
    _, states = train()
    before, first = states["online_finetune"], seen[30]
    assert len(seen) == 50 and first["buffer"]["added"] == 30
    for name in ("actor", "q"):
        assert not equal(before[name], before[f"{name}_target"])
        assert equal(first[name], first[f"{name}_target"]) and equal(first[name], before[name])


def test_the_agents_mean_is_evaluated(train, monkeypatch):
    """Not one of them; and how often that is done changes nothing else."""
    evaluated, evaluate = [], boorl.evaluate

    def watch(policy, env, *given):
        observation = np.linspace(-1, 1, 4, dtype=np.float32)
        apart = policy.source.actor(torch.from_numpy(observation)[None])[:, 0].detach()
        np.testing.assert_allclose(policy(observation), apart.numpy().mean(0), rtol=1e-5, atol=1e-7)
        evaluated.append(apart.std().item())
        return evaluate(policy, env, *given)

    monkeypatch.setattr(boorl, "evaluate", watch)
    often = train("often", eval_freq=7, eval_episodes=2)[0]
    rare = train("rare")[0]
    assert len(rows(often)) > len(rows(rare)) + 3 and len(evaluated) == len(rows(often)) + len(rows(rare))
    assert min(evaluated) > 1e-3 and same_weights(rare, often)


def test_a_shared_offline_phase(train):
    whole, _ = train("whole")
    shared, states = train("shared", offline_from=str(whole))
    assert "offline" in states and same_weights(shared, whole)
    other, _ = train("other", offline_from=str(whole), utd=2, online_steps=35)
    assert not same_weights(other, whole)
    with pytest.raises(boorl.BadInput, match=r"--agents 5 \(now 4\): write the same"):
        train("refused", offline_from=str(whole), agents=4)


def test_a_run_that_diverges_stops(train):
    with pytest.raises(FloatingPointError, match=r"is (nan|-?inf) in phase online_finetune|environment gave NaN"):
        train(online_steps=34, learning_rate=1e30, offline_steps=0)


def test_a_run_on_mujoco(train, tmp_path):
    path = write_file(tmp_path / "hopper.hdf5", roll_out(gym.make("Hopper-v5"), 300, 0))
    own = dict(env_id="hopper-medium-v2", dataset=str(path), offline_steps=3, online_steps=12, collect_steps=6)
    folder, states = train(**own)
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["args"]["agents"] == 5 and not model["observation_mean"].any()
    actor = Actor(5, 11, 3)
    actor.load_state_dict(model["actor"])
    online = states["done"]["buffer"]["online_rows"]
    assert online.shape == (12, 11 + 3 + 1 + 11 + 1) and (online[:, 11:14].abs() <= 1).all()


@pytest.mark.parametrize("kind", ["random", "medium", "medium-replay"])
@pytest.mark.parametrize("env", ["halfcheetah", "hopper", "walker2d"])
def test_every_task_has_the_same_values(env, kind):
    args = boorl.resolve(Args(env_id=f"{env}-{kind}-v2"))
    assert (args.exp_name, args.agents, args.utd, args.collect_steps) == ("boorl", 5, 5, 25_000)
    assert (args.batch_size, args.learning_rate, args.gamma, args.tau) == (256, 3e-4, 0.99, 0.005)
    assert (args.policy_frequency, args.policy_noise, args.noise_clip, args.exploration_noise) == (2, 0.2, 0.5, 0.1)
    assert (args.bc_alpha, args.normalize_states, boorl.MASK) == (2.5, False, 0.9)
    assert (args.offline_steps, args.online_steps, args.eval_freq, args.eval_episodes) == (
        1_000_000,
        300_000,
        5_000,
        10,
    )
    assert boorl.reward_transform(args.env_id, transitions(0, 50)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("--env-id antmaze-large-play-v2 is none of BOORL's tasks, ", dict(env_id="antmaze-large-play-v2")),
        ("--env-id pen-cloned-v1 is none of BOORL's tasks, ", dict(env_id="pen-cloned-v1", dataset="mine.hdf5")),
        ("--agents is 0: write 1 or more", dict(agents=0)),
        ("--utd is 0: write 1 or more", dict(utd=0)),
        ("--policy-frequency is 0: write 1 or more", dict(policy_frequency=0)),
        ("--bc-alpha is 0.0: write a positive number", dict(bc_alpha=0.0)),
        ("--collect-steps is -1: write 0 or more", dict(collect_steps=-1)),
        ("--collect-steps is 25000: write at most --online-steps (24999)", dict(online_steps=24_999)),
        ("--batch-size is 255: write an even one, half for each buffer", dict(batch_size=255)),
    ],
)
def test_its_own_arguments(words, arguments):
    with pytest.raises(boorl.BadInput) as error:
        boorl.resolve(Args(**arguments))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_an_offline_phase_alone(train):
    folder, states = train(online_steps=0, collect_steps=0)
    assert [row["phase"] for row in rows(folder, "speed.csv")] == ["offline"]
    assert equal(states["done"]["actor"], torch.load(folder / "offline.pt", weights_only=True)["parts"]["actor"])
