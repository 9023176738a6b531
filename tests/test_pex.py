"""PEX: the composite policy, its updates against plain code in the order of PEX's, and whole runs."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import iql_opt
import numpy as np
import pex
import pytest
import scipy.stats
import torch
from conftest import roll_out, write_file
from pex import Actor, Agent, Args, Composite, Critic, Transitions
from runs import equal, rows, same_weights, watch_phases


@pytest.fixture
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# The policies
# ----------------------------------------------------------------------------------------------------------------------


def test_the_policys_initial_weights():
    torch.manual_seed(0)
    for layer, (inputs, outputs) in zip(Actor(11, 3).layers, ((11, 256), (256, 256), (256, 3)), strict=True):
        assert layer.weight.shape == (outputs, inputs) and not layer.bias.any()
        bound = math.sqrt(6 / (inputs + outputs))  # Xavier's; PyTorch's own would be 1 / sqrt(inputs)
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not Actor(11, 3).log_std.any()


@pytest.mark.parametrize("log_std, std", [(-9.0, math.exp(-5)), (0.3, math.exp(0.3)), (5.0, math.exp(2))])
def test_density_and_samples_of_a_policy(double, log_std, std):
    actor, observations = Actor(3, 2), torch.randn(5, 3)
    torch.nn.init.constant_(actor.log_std, log_std)
    x = observations.numpy()
    for i, layer in enumerate(actor.layers):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = np.maximum(x, 0) if i < 2 else np.tanh(x)
    np.testing.assert_allclose(actor(observations).detach(), x, rtol=1e-10)
    actions = x + std * np.random.default_rng(0).standard_normal(x.shape)
    expected = scipy.stats.norm(x, std).logpdf(actions).sum(1)
    np.testing.assert_allclose(actor.log_prob(observations, torch.from_numpy(actions)).detach(), expected, rtol=1e-9)
    samples = actor.sample(observations[:1].expand(4_000, -1)).detach().numpy()
    for i in range(2):
        assert scipy.stats.kstest(samples[:, i], scipy.stats.norm(x[0, i], std).cdf).pvalue > 0.01


class Constant(torch.nn.Module):
    """A policy with one mean, and samples that are 0.01 to 0.02 above it."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = mean

    def forward(self, observations):
        return torch.full((len(observations), 1), self.mean)

    def sample(self, observations):
        return self(observations) + 0.01 + 0.01 * torch.rand(len(observations), 1)


def composite(q_1: float, q_2: float, zeta: float, means: tuple = (0.3, 0.5)) -> Composite:
    """Of two constant policies whose actions have these values. Of each twin, the other value is 4 or 1 more."""

    def twin(observations, actions):
        first = actions[:, 0] == means[0]
        return torch.stack([torch.where(first, q_1 + 4, q_2), torch.where(first, q_1, q_2 + 1)])

    return Composite(Constant(means[0]), Constant(means[1]), twin, zeta)


N = 40_000


def near(share: torch.Tensor | float, expected: float) -> bool:
    """Whether a share of N draws is within four standard deviations of what is expected."""
    return abs(float(share) - expected) <= 4 * math.sqrt(expected * (1 - expected) / N)


@pytest.mark.parametrize(
    "q_1, q_2, zeta, share",
    [
        (0.0, 0.1, 10.0, 1 / (1 + math.exp(-1))),
        (0.3, 0.0, 10.0, 1 / (1 + math.exp(3))),
        (500.0, 500.6, 2.0, 1 / (1 + math.exp(-1.2))),  # values of the size of MuJoCo's
        (1.0, 1.0, 10.0, 0.5),
        (-3.0, 5.0, 0.0, 0.5),
        (0.0, 0.1, 1e6, 1.0),  # the better one always
        (0.1, 0.0, 1e6, 0.0),
    ],
)
def test_which_of_the_two_proposals_acts_online(q_1, q_2, zeta, share, double):
    actions, second = composite(q_1, q_2, zeta).sample(torch.zeros(N, 3))
    assert actions.shape == second.shape == (N, 1)
    assert near(second.double().mean(), share)
    assert (actions[~second] == 0.3).all()  # pi_1's mean
    assert ((actions[second] > 0.51) & (actions[second] < 0.52)).all()  # a sample of pi_2


@pytest.mark.parametrize("q_1, q_2", [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0)])
def test_which_action_is_evaluated(q_1, q_2, double):
    """pi_2's mean nine times in ten, and the better of the two proposals nine times in ten, independently."""
    actions = composite(q_1, q_2, zeta=5.0)(torch.zeros(N, 3))
    drawn = 1 / (1 + math.exp(5 * (q_1 - q_2)))
    second = 0.9 * (q_2 > q_1) + 0.1 * drawn
    shares = {"pi_1": actions == 0.3, "mean": actions == 0.5, "sample": actions > 0.505}
    expected = {"pi_1": 1 - second, "mean": 0.9 * second, "sample": 0.1 * second}
    for name in expected:
        assert near(shares[name].double().mean(), expected[name]), name
    assert sum(int(share.sum()) for share in shares.values()) == N


def test_an_evaluated_action_is_clipped_and_may_be_of_one_state():
    torch.manual_seed(0)
    pi_1, pi_2 = Actor(3, 2), Actor(3, 2)
    torch.nn.init.constant_(pi_2.log_std, 2.0)
    policy = pex.Policy(Composite(pi_1, pi_2, Critic(3, 2), 10.0))
    actions = np.array([policy(np.zeros(3, np.float32)) for _ in range(300)])
    assert actions.shape == (300, 2) and actions.dtype == np.float32 and np.abs(actions).max() == 1.0


def test_an_online_action_is_clipped_after_it_was_chosen():
    """What the buffer and the environment get; PEX's values and its loss are of the action as it was drawn."""
    torch.manual_seed(0)
    given = []

    def twin(observations, actions):
        given.append(actions)
        return (actions[:, 0] != 0).float().expand(2, -1)

    pi_1, pi_2 = Constant(0.0), Constant(1.5)
    policy = SimpleNamespace(actor=Composite(pi_1, pi_2, twin, 1e6))
    action = pex.explore(policy, np.zeros(3, np.float32))
    assert action.tolist() == [1.0] and action.dtype == np.float32 and given[0][1] > 1.5


def test_equal_policies_without_noise_propose_equal_actions(monkeypatch):
    torch.manual_seed(0)
    pi_1, observations = Actor(3, 2), torch.randn(64, 3)
    pi_2, other, q = copy.deepcopy(pi_1), Actor(3, 2), Critic(3, 2)
    assert not torch.allclose(Composite(pi_1, pi_2, q, 0.0).sample(observations)[0], pi_1(observations))  # the noise
    monkeypatch.setattr(Actor, "LOG_STD_MIN", -40)
    for policy in (pi_2, other):
        torch.nn.init.constant_(policy.log_std, -40.0)
    for zeta in (0.0, 10.0):
        same = Composite(pi_1, pi_2, q, zeta)
        torch.testing.assert_close(same.sample(observations)[0], pi_1(observations))
        torch.testing.assert_close(same(observations), pi_1(observations))
    actions, second = Composite(pi_1, other, q, 0.0).sample(observations)  # of two others each has its own
    assert 10 < second.sum() < 54
    torch.testing.assert_close(actions, torch.where(second, other(observations), pi_1(observations)))


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------


def test_the_policys_loss_by_hand():
    advantages = torch.tensor([0.0, math.log(2) / 10, math.log(99) / 10, 5.0, -100.0])
    assert pex.imitation_weights(advantages, 10.0).tolist() == pytest.approx([1, 2, 99, 100, 0], rel=1e-5)


class Buffer(pex.ReplayBuffer):
    """Remembers the batches and how many online transitions there were at each."""

    def __init__(self, offline: Transitions, online: Transitions):
        super().__init__(offline, 200, torch.device("cpu"))
        self.batches, self.sizes = [], []
        for i in range(len(online.rewards)):
            self.add(*(column[i] for column in online))

    def __getitem__(self, rows):
        batch = super().__getitem__(rows)
        self.batches.append(batch)
        self.sizes.append(self.n_online)
        return batch


def transitions(seed: int, n: int) -> Transitions:
    rng = np.random.default_rng(seed)
    columns = [rng.standard_normal((n, 3)), rng.uniform(-1, 1, (n, 2)), rng.standard_normal(n)]
    columns += [rng.standard_normal((n, 3)), rng.random(n) < 0.3]
    return Transitions(*(np.asarray(column, np.float32) for column in columns))


LOSSES = ("v_loss", "q_loss", "actor_loss")


def phase(which: str, args: Args, agent: Agent, buffer: Buffer) -> list[list[float]]:
    """Run a phase on a buffer, with an environment that stays in its state; returns the losses of each step."""
    losses = []

    def loop(name, total, **kwargs):
        for step in range(total):
            yield step
            losses.append([float(run.metrics[name]) for name in LOSSES if name in run.metrics])

    run = SimpleNamespace(device=torch.device("cpu"), metrics={}, policy=pex.Policy(agent.composite), loop=loop)
    if which == "offline":
        pex.offline_pretrain(args, run, agent, buffer)
    else:
        online = transitions(9, 1)
        collector = SimpleNamespace(observation=np.zeros(3, torch.zeros(()).numpy().dtype))
        collector.step = lambda action: buffer.add(*(column[0] for column in online))
        pex.online_finetune(args, run, agent, buffer, collector)
    return losses


def plain_mlp(layers, x, last=lambda x: x):
    for layer in layers[:2]:
        x = torch.relu(layer(x))
    return last(layers[2](x))


@pytest.mark.parametrize("which, utd", [("offline", 1), ("online", 1), ("online", 3)])
def test_the_updates_are_plain_pex(double, monkeypatch, which, utd):
    """Six updates against a loss, an optimiser and a step for each network, in PEX's order: V, Q, Q', policy."""
    online = which == "online"
    args = Args(expectile=0.8, beta=2.0, learning_rate=1e-3, tau=0.1, gamma=0.9, zeta=3.0, batch_size=16, utd=utd)
    args.offline_steps, args.collect_steps, args.online_steps = 6, 5, 5 + 6 // utd
    agent = Agent(args, 3, 2, torch.device("cpu"))
    agent.q_target.load_state_dict(Critic(3, 2).state_dict())  # not the copy that it starts as
    plain = copy.deepcopy(agent)
    buffer = Buffer(transitions(1, 300), transitions(2, 40))
    sample, draws = Composite.sample, []

    def seeded(self, observations):
        with torch.random.fork_rng():
            torch.manual_seed(100 + len(draws))
            draws.append(len(observations))
            return sample(self, observations)

    monkeypatch.setattr(Composite, "sample", seeded)
    losses = phase(which, args, agent, buffer)
    assert len(buffer.batches) == 6

    q, q_target, v, policy = plain.q, plain.q_target, plain.v, plain.pi_2 if online else plain.pi_1
    adam = {name: torch.optim.Adam(x.parameters(), 1e-3) for name, x in (("q", q), ("v", v), ("policy", policy))}
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam["policy"], 6)
    calls = iter(range(100, 100 + len(draws)))

    def descend(name, loss):
        adam[name].zero_grad()
        loss.backward()
        adam[name].step()
        expected[-1].append(loss.item())

    def gaussian(actor, observations):
        mean = plain_mlp(actor.layers, observations, torch.tanh)
        return torch.distributions.Normal(mean, actor.log_std.clamp(-5, 2).exp())

    expected = []
    for update, data in enumerate(buffer.batches):
        s, a, r, following, terminal = data
        expected.append([])
        if online and update % utd == 0:
            next(calls)  # the action of the environment step
        with torch.no_grad():
            next_v = v(following)
            target_q = torch.minimum(*q_target(s, a))
        advantage = target_q - v(s)
        descend("v", (torch.where(advantage > 0, 0.8, 0.2) * advantage**2).mean())
        target = r + (1 - terminal) * 0.9 * next_v
        q_1, q_2 = q(s, a)
        descend("q", (torch.nn.functional.mse_loss(q_1, target) + torch.nn.functional.mse_loss(q_2, target)) / 2)
        for old, new in zip(q_target.parameters(), q.parameters(), strict=True):
            old.data.copy_(0.9 * old.data + 0.1 * new.data)
        if online:
            with torch.no_grad():
                torch.manual_seed(next(calls))
                a_1 = plain_mlp(plain.pi_1.layers, s, torch.tanh)
                pi_2 = gaussian(policy, s)
                a_2 = pi_2.mean + pi_2.stddev * torch.randn(16, 2)
                values = torch.stack([torch.minimum(*q(s, proposed)) for proposed in (a_1, a_2)])
                second = torch.rand(16, 1)[:, 0] < torch.exp(3 * values[1]) / torch.exp(3 * values).sum(0)
                a = torch.stack([a_2[i] if second[i] else a_1[i] for i in range(16)])
                advantage = torch.minimum(*q_target(s, a)) - v(s)
            assert 0 < second.sum() < 16
        weights = torch.clamp(torch.exp(2 * advantage.detach()), max=100)
        descend("policy", -(weights * gaussian(policy, s).log_prob(a).sum(1)).mean())
        if not online:
            decay.step()
    np.testing.assert_allclose(losses, expected[utd - 1 :: utd], rtol=1e-6)
    for name in ("pi_1", "pi_2", "q", "v", "q_target"):
        for got, want in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_v_is_a_plain_mlp(double):
    v, x = pex.ValueFunction(3), torch.randn(7, 3)
    expected = x.numpy()
    for i, layer in enumerate(v.layers):
        expected = expected @ layer.weight[0].detach().numpy() + layer.bias[0].detach().numpy()
        expected = np.maximum(expected, 0) if i < 2 else expected[:, 0]
    np.testing.assert_allclose(v(x).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("which", ["offline", "online"])
def test_whose_actions_enter_the_policys_loss(which, monkeypatch):
    """With Q and V held still, pi_2 does not see which actions are stored; pi_1 imitates those."""

    def held(args, agent, batch, optimizer):
        return torch.zeros(len(batch.rewards)), {}

    monkeypatch.setattr(pex, "value_step", held)
    args = Args(expectile=0.9, beta=10.0, batch_size=16, offline_steps=4, collect_steps=5, online_steps=9)
    offline, online = transitions(1, 50), transitions(2, 40)
    results = []
    for sign in (1, -1):
        agent = Agent(args, 3, 2, torch.device("cpu"))
        torch.manual_seed(0)
        stored = (data._replace(actions=sign * data.actions) for data in (offline, online))
        losses = phase(which, args, agent, Buffer(*stored))
        results.append((losses, (agent.pi_1 if which == "offline" else agent.pi_2).state_dict()))
    (losses, policy), (other_losses, other_policy) = results
    assert len(losses) == 4
    assert (losses == other_losses) == equal(policy, other_policy) == (which == "online")


def test_what_an_online_step_samples_and_when():
    """Half of each batch is online; an update comes before its environment step is stored, as in PEX's code."""
    args = Args(expectile=0.9, beta=10.0, batch_size=16, collect_steps=5, online_steps=9, utd=2)
    buffer = Buffer(transitions(1, 50), transitions(2, 5))
    online = buffer.rows[50:]
    phase("online", args, Agent(args, 3, 2, torch.device("cpu")), buffer)
    assert buffer.sizes == [5, 5, 6, 6, 7, 7, 8, 8] and buffer.n_online == 9
    for batch in buffer.batches:
        stored = [bool((online[:9, :3] == observation).all(1).any()) for observation in batch.observations]
        assert stored == [False] * 8 + [True] * 8


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=20, online_steps=50, collect_steps=30, batch_size=16)
TINY |= dict(eval_freq=0, eval_episodes=1, learning_rate=1e-3, progress=False)


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process; returns the folder, and copies of all parts at each phase's start and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def train(name: str = "run", script=pex, **arguments) -> tuple:
        states = watch_phases(script, monkeypatch)
        arguments = {"dataset": str(pendulum_file), "run_dir": str(tmp_path / name)} | TINY | arguments
        script.train(script.Args(**{k: value for k, value in arguments.items() if hasattr(script.Args, k)}))
        return tmp_path / name, states

    return train


VALUES = {"q", "v", "q_target"}


@pytest.mark.parametrize("utd", [1, 2])
def test_what_each_phase_changes(train, utd):
    """Offline all but pi_2; the collected steps nothing; online all but pi_1, which is bitwise what it was."""
    _, states = train(utd=utd)
    policies = {"pi_1", "pi_2", "pi_1_optimizer", "pi_2_optimizer"}
    agent = VALUES | policies | {"offline_optimizer", "online_optimizer"}
    assert set(states["done"]) == agent | {"buffer", "collector"}

    def learned(phase: str, name: str) -> dict:  # the learning rate is set for a phase before it begins
        return states[phase][name]["state"] if "optimizer" in name else states[phase][name]

    def changed(before: str, after: str) -> set[str]:
        return {name for name in agent if not equal(learned(before, name), learned(after, name))}

    assert changed("offline", "collect") == VALUES | {"pi_1", "pi_1_optimizer", "offline_optimizer"}
    assert changed("collect", "online_finetune") == set()
    assert states["online_finetune"]["buffer"]["added"] == 30
    assert changed("online_finetune", "done") == VALUES | {"pi_2", "pi_2_optimizer", "online_optimizer"}
    # Adam counts its steps; online's begin at 0
    for name, count in (("offline", 20), ("pi_1", 20), ("online", 20 * utd), ("pi_2", 20 * utd)):
        steps = {int(moments["step"]) for moments in states["done"][f"{name}_optimizer"]["state"].values()}
        assert steps == {count}
    torch.testing.assert_close(states["done"]["pi_2_optimizer"]["param_groups"][0]["lr"], 1e-3)  # no decay


def test_the_new_policy_is_another_one_and_5000_steps_come_before_its_first_update(train):
    agent = Agent(pex.resolve(Args(seed=3)), 4, 1, torch.device("cpu"))
    assert not equal(agent.pi_1.layers.state_dict(), agent.pi_2.layers.state_dict())
    folder, _ = train()
    found = [(row["phase"], int(row["gradient_steps"]), int(row["env_steps"])) for row in rows(folder, "speed.csv")]
    assert found == [("offline", 20, 0), ("collect", 0, 30), ("online_finetune", 20, 20)]


def test_who_is_evaluated(train, monkeypatch):
    """Offline pi_1 by its mean; the composite from the first environment step on, and in what is left to report."""
    evaluated, evaluate = [], pex.evaluate

    def watch(policy, *given):
        evaluated.append(type(policy.source))
        return evaluate(policy, *given)

    monkeypatch.setattr(pex, "evaluate", watch)
    folder, _ = train(eval_freq=10)
    steps = [(row["phase"], int(row["env_steps"]), int(row["gradient_steps"])) for row in rows(folder)]
    assert steps[:3] == [("offline", 0, 0), ("offline", 0, 10), ("offline", 0, 20)]
    assert steps[3:] == [("collect", 30, 20), ("online_finetune", 40, 30), ("online_finetune", 50, 40)]
    assert evaluated == [Actor] * 3 + [Composite] * 3


def test_how_often_is_evaluated_changes_nothing_else(train):
    rare, often = train("rare")[0], train("often", eval_freq=7, eval_episodes=2)[0]
    assert len(rows(often)) > len(rows(rare)) + 3 and same_weights(rare, often)


def test_runs_that_share_an_offline_phase(train):
    whole = train("whole")[0]
    shared, states = train("shared", offline_from=str(whole))
    assert equal(states["offline"]["q"], states["collect"]["q"]) and same_weights(shared, whole)


def test_an_offline_phase_of_iql(train):
    """Where that has PEX's arguments: its networks are taken over, its optimisers are not."""
    own = dict(script=iql_opt, opt=False, online_steps=5)
    like_pex = dict(expectile=0.9, beta=10.0, normalize_states=False)
    folder = train("iql", **own, **like_pex)[0]
    _, states = train("pex", offline_from=str(folder))
    parts = torch.load(folder / "offline.pt", weights_only=True)["parts"]
    for ours, name in (("pi_1", "actor"), ("q", "q_off"), ("v", "v_off"), ("q_target", "q_off_target")):
        assert equal(states["collect"][ours], parts[name]), name
    assert not equal(parts["q_off"], parts["q_off_target"])
    assert not equal(states["done"]["q"], states["collect"]["q"])
    assert not states["collect"]["online_optimizer"]["state"][0]["exp_avg"].any()
    other = train("other", **own)[0]
    with pytest.raises(pex.BadInput) as error:
        train("refused", offline_from=str(other))
    found = "--expectile 0.7 (now 0.9), --beta 3.0 (now 10.0), --normalize-states True (now False)"
    assert found in str(error.value)


@pytest.fixture
def hopper(tmp_path) -> dict:
    path = write_file(tmp_path / "hopper.hdf5", roll_out(gym.make("Hopper-v5"), 300, 0))
    return dict(env_id="hopper-random-v2", dataset=str(path), offline_steps=3, online_steps=12, collect_steps=6)


def test_an_offline_phase_of_iql_on_mujoco_is_of_other_rewards(train, hopper):
    like_pex = dict(expectile=0.9, beta=10.0, normalize_states=False)
    folder = train("iql", script=iql_opt, opt=False, **hopper, **like_pex)[0]
    with pytest.raises(pex.BadInput, match="offline.pt was made with other data"):
        train("pex", offline_from=str(folder), **hopper)


DOMAINS = [("hopper-medium-v2", 0.9, 10.0, 0.0), ("antmaze-large-play-v2", 0.9, 10.0, -1.0)]
DOMAINS += [("relocate-cloned-v1", 0.8, 3.0, 0.0), ("InvertedPendulum-v5", 0.9, 10.0, 0.0)]


@pytest.mark.parametrize("env_id, expectile, beta, shift", DOMAINS)
def test_the_values_of_each_domain(env_id, expectile, beta, shift):
    args = pex.resolve(Args(env_id=env_id))
    assert (args.expectile, args.beta, args.zeta, args.exp_name) == (expectile, beta, 10.0, "pex")
    assert (args.collect_steps, args.utd, args.batch_size, args.normalize_states) == (5_000, 1, 256, False)
    assert (args.learning_rate, args.gamma, args.tau) == (3e-4, 0.99, 0.005)
    assert (args.offline_steps, args.online_steps) == (1_000_000, 300_000)
    assert pex.reward_transform(env_id, transitions(0, 50)) == (1.0, shift)
    given = pex.resolve(Args(env_id=env_id, expectile=0.6, beta=1.0, exp_name="mine"))
    assert (given.expectile, given.beta, given.exp_name) == (0.6, 1.0, "mine")


def test_mujoco_runs_on_its_own_rewards_and_states(train, hopper):
    folder, states = train(**hopper)
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["reward_scale"] == 1 and not model["observation_mean"].any() and (model["observation_std"] == 1).all()
    online = states["done"]["buffer"]["online_rows"]
    env = gym.make("Hopper-v5")
    assert online.shape == (12, 11 + 3 + 1 + 11 + 1) and (online[:, 11:14].abs() <= 1).all()
    assert ((online[:, 14] > -1) & (online[:, 14] < 4)).all() and (online[:, 14] != 0).all()
    own = Composite(Actor(11, 3), Actor(11, 3), Critic(11, 3), 10.0)  # what README says of model.pt
    for name in ("pi_1", "pi_2", "q"):
        getattr(own, name).load_state_dict(model[name])
    assert own(torch.as_tensor(env.reset(seed=0)[0], dtype=torch.float32)[None]).shape == (1, 3)


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("--collect-steps is 0: write 1 or more, and less than --online-steps (300000)", dict(collect_steps=0)),
        ("--collect-steps is 5000: write 1 or more, and less than --online-steps (5000)", dict(online_steps=5_000)),
        ("--batch-size is 15: write an even one, half for each buffer", dict(batch_size=15)),
        ("--zeta is -1.0: write a number, 0 or more", dict(zeta=-1.0)),
        ("--zeta is inf: ", dict(zeta=math.inf)),
        ("--expectile is 1.0: write a number between 0 and 1", dict(expectile=1.0)),
        ("--beta is nan: ", dict(beta=math.nan)),
    ],
)
def test_its_own_arguments(words, arguments):
    with pytest.raises(pex.BadInput) as error:
        pex.resolve(Args(**arguments))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
