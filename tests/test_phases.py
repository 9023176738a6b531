"""What the scripts do in their phases: how they act, what they sample, and their updates in plain code."""

import copy
import dataclasses

import boorl
import cal_ql
import iql_opt
import numpy as np
import oema
import pex
import pytest
import rlpd_opt
import spot_opt
import td3_opt
import torch
from runs import equal, watch_phases

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=6, online_steps=36, n_tau=30, n_pretrain=6, utd=2)
TINY |= dict(batch_size=16, eval_freq=0, eval_episodes=1, tau=0.3, progress=False)
OWN = {
    td3_opt: dict(learning_rate=1e-3),
    spot_opt: dict(
        vae_steps=1, lambda_decay=36, critic_learning_rate=1e-2, actor_learning_rate=1e-2
    ),  # its networks start near 0
    iql_opt: dict(learning_rate=1e-3),
    rlpd_opt: dict(learning_rate=1e-3),
    pex: dict(collect_steps=30, learning_rate=1e-3),
    cal_ql: dict(cql_actions=2, actor_layers=1, critic_layers=1),
    oema: dict(collect_steps=30, learning_rate=1e-3),
    boorl: dict(collect_steps=30, learning_rate=1e-3, agents=2),
}
OPT = [script for script in OWN if hasattr(script.Args, "opt")]
VARIANTS = [(script, {}) for script in OWN] + [(script, {"opt": False}) for script in OPT]
scripts = pytest.mark.parametrize("script", OPT, ids=lambda script: script.__name__)


@pytest.fixture
def train(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process; returns the arguments and copies of all parts at each phase's start and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def train(script, **arguments) -> tuple:
        own = {name: value for name, value in TINY.items() if hasattr(script.Args, name)} | OWN[script]
        own |= dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
        args = script.Args(**(own | arguments))
        with monkeypatch.context() as patch:
            states = watch_phases(script, patch)
            script.train(args)
        return args, states

    return train


@pytest.mark.parametrize("script, arguments", VARIANTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_online_action_is_one_of_exploration(script, arguments, train, monkeypatch):
    explore, taken = script.explore, []
    monkeypatch.setattr(script, "explore", lambda *given: taken.append(explore(*given)) or taken[-1])
    _, states = train(script, **arguments)
    stored = states["done"]["buffer"]["online_rows"]
    assert len(stored) == 36 and len(taken) == (6 if script is oema else 36)  # OEMA explores only once it learns
    np.testing.assert_array_equal(stored[-len(taken) :, 4:5], np.array(taken, np.float32))


@pytest.mark.parametrize("script", [td3_opt, spot_opt], ids=lambda script: script.__name__)
def test_the_noise_of_the_collected_steps(script, train):
    """--collect-noise 0: the offline policy's own actions, and only in the N_tau steps."""
    args, states = train(script, collect_noise=0.0)
    rows = states["done"]["buffer"]["online_rows"]
    actor = script.Actor(4, 1)
    actor.load_state_dict(states["collect"]["actor"])
    with torch.no_grad():
        expected = actor(rows[:30, :4])
        after = actor(rows[30:31, :4])
    torch.testing.assert_close(rows[:30, 4:5], expected)
    assert (rows[30, 4:5] - after).abs() > 1e-3  # the policy has not changed until the first step of fine-tuning
    assert script.resolve(dataclasses.replace(args, collect_noise=None, exploration_noise=0.3)).collect_noise == 0.3


NORMALISED = [(td3_opt, True), (spot_opt, False), (iql_opt, True), (rlpd_opt, False), (pex, False), (cal_ql, False)]
NORMALISED += [(oema, False), (boorl, False)]


@pytest.mark.parametrize("script, normalised", NORMALISED)
def test_whether_states_are_normalised(script, normalised, train, pendulum_columns):
    args, states = train(script)
    model = torch.load(f"{args.run_dir}/model.pt", weights_only=True)
    data = pendulum_columns["observations"].astype(np.float64)
    mean, std = (data.mean(0), data.std(0) + 1e-3) if normalised else (np.zeros(4), np.ones(4))
    np.testing.assert_allclose(model["observation_mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model["observation_std"], std, rtol=1e-4)


@pytest.mark.parametrize("script", OWN, ids=lambda script: script.__name__)
def test_every_action_is_the_newest_policys(script, train, tmp_path, monkeypatch):
    """As on CUDA, where a copy acts."""
    _, shared = train(script)

    def own_copy(self, actor):
        self.source, self.actor = actor, copy.deepcopy(actor)

    monkeypatch.setattr(script.Policy, "__init__", own_copy)
    _, copied = train(script, run_dir=str(tmp_path / "copied"))
    assert equal(copied["done"], shared["done"])


@scripts
@pytest.mark.parametrize("fraction", [0.2, 0.8])
def test_the_share_of_online_samples_at_the_start_of_fine_tuning(script, fraction, train, monkeypatch):
    shares, start = [], script.BalancedReplay.start

    def watch(self, online_fraction):
        start(self, online_fraction)
        rng = torch.get_rng_state()
        shares.append((self.tree.sample(100_000) >= self.buffer.n_offline).double().mean().item())
        torch.set_rng_state(rng)

    monkeypatch.setattr(script.BalancedReplay, "start", watch)
    train(script, replay="balanced", init_online_fraction=fraction)
    assert shares == [pytest.approx(fraction, abs=0.02 * fraction)]


@scripts
def test_each_online_transition_enters_balanced_replay_once(script, train, monkeypatch):
    entered, add = [], script.BalancedReplay.add
    monkeypatch.setattr(script.BalancedReplay, "add", lambda self, row: (entered.append(row), add(self, row))[1])
    _, states = train(script, replay="balanced")
    assert entered == list(range(5_030, 5_036))
    # and the density ratio takes a step in each gradient step
    assert {int(state["step"]) for state in states["done"]["ratio_optimizer"]["state"].values()} == {12}


@scripts
@pytest.mark.parametrize("kappas", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)], ids=str)
def test_q_off_is_left_alone_only_where_kappa_is_1_throughout(script, kappas, train):
    _, states = train(script, kappa_init=kappas[0], kappa_end=kappas[1])
    frozen = equal(states["online_finetune"]["q_off"], states["done"]["q_off"])
    assert frozen == (kappas == (1.0, 1.0))


@scripts
def test_the_target_of_q_on_follows_it_in_online_pretraining(script, train):
    """By tau after a step, in TD3 and SPOT after the second."""
    delayed = script in (td3_opt, spot_opt)
    _, states = train(script, n_pretrain=2 if delayed else 1)
    before, after = states["online_pretrain"], states["online_finetune"]
    for name, target in before["q_on_target"].items():
        torch.testing.assert_close(after["q_on_target"][name], 0.7 * target + 0.3 * after["q_on"][name])


@scripts
@pytest.mark.parametrize("replay", ["balanced", "online", "symmetric", "uniform"])
def test_what_fine_tuning_samples(script, replay, train, monkeypatch):
    """Batches of 16 from 5,000 offline transitions and 30 to 60 online ones."""
    shares, logged, getitem, loop = [], [], script.ReplayBuffer.__getitem__, script.Run.loop

    def watch(self, rows):
        if self.n_online > 30 and len(rows) == 16:  # fine-tuning's own, not the density ratio's 32
            shares.append((rows >= self.n_offline).float().mean().item())
            assert rows.max() < self.n_offline + self.n_online
        return getitem(self, rows)

    def watch_metrics(run, phase, *args, **kwargs):
        for step in loop(run, phase, *args, **kwargs):
            yield step
            if phase == "online_finetune":
                logged.append(float(run.metrics["online_share"]))

    monkeypatch.setattr(script.ReplayBuffer, "__getitem__", watch)
    monkeypatch.setattr(script.Run, "loop", watch_metrics)
    _, states = train(script, replay=replay, online_steps=60, utd=1)
    assert len(shares) == 30 and logged == shares
    if replay == "balanced":
        assert 0.3 < np.mean(shares[:5]) < 0.7
        assert states["done"]["balanced"]["tree.leaves"].view(-1)[5_000:5_060].all()
    elif replay == "uniform":
        assert 0 < np.mean(shares) < 0.04
    else:
        assert set(shares) == {1.0 if replay == "online" else 0.5}


@pytest.mark.parametrize("script", [td3_opt, spot_opt], ids=lambda script: script.__name__)
def test_target_policy_smoothing_has_its_noise_in_every_phase(script, train, monkeypatch):
    given, smoothed_actions = [], script.smoothed_actions

    def watch(actor_target, observations, args):
        given.append((args.policy_noise, args.noise_clip))
        return smoothed_actions(actor_target, observations, args)

    monkeypatch.setattr(script, "smoothed_actions", watch)
    train(script, policy_noise=0.3, noise_clip=0.7)
    assert given == [(0.3, 0.7)] * (6 + 6 + 12)


@pytest.mark.parametrize("script", [td3_opt, spot_opt], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"q_on_init": "joint"}, {"q_on_init": "online", "kappa_init": 1.0}, {"q_on": False}, {"opt": False}],
    ids=str,
)
def test_each_phase_is_some_lines_of_plain_td3(script, arguments, train, monkeypatch):
    """From where a phase began, on the batches that it drew, to where it ended. No smoothing noise."""
    batches, getitem = [], script.ReplayBuffer.__getitem__
    monkeypatch.setattr(
        script.ReplayBuffer, "__getitem__", lambda *given: batches.append(getitem(*given)) or batches[-1]
    )
    spot = script is spot_opt
    if "opt" in arguments:
        arguments = arguments | {"online_steps": 6}
    elif "q_on" not in arguments:
        arguments = {"kappa_init": 0.2, "kappa_end": 1.0, "kappa_decay": 40} | arguments
    own = dict(lambda_init=0.4, lambda_end=0.1, kl_weight=0.7, online_gamma=0.8) if spot else dict(bc_alpha=2.0)
    if spot:  # the same noise of the VAE's latents in every call, here as there
        elbo_loss = script.elbo_loss
        monkeypatch.setattr(script, "elbo_loss", lambda *given: (torch.manual_seed(7), elbo_loss(*given))[1])
    args, states = train(script, replay="uniform", policy_noise=0.0, gamma=0.9, meta_lr=0.1, **own, **arguments)
    batches = iter(batches)
    rate = 1e-2 if spot else 1e-3
    name = "q_on" if args.q_on else "q_off"

    phases = [phase for phase in PHASES if phase in states]
    with_q_on = args.opt and args.q_on
    goes_online = "online_pretrain" if args.opt else "online_finetune"

    def start(phase):
        networks = {key: script.Critic(4, 1) if key[0] == "q" else script.Actor(4, 1) for key in KEYS[with_q_on]}
        for key, network in networks.items():
            network.load_state_dict(states[phase][key])
        adams = {key: torch.optim.Adam(networks[key].parameters(), rate) for key in networks if "target" not in key}
        for key, adam in adams.items():
            if not (spot and phase == goes_online and key != "q_on"):  # SPOT's start anew where it goes online
                adam.load_state_dict(states[phase][f"{key}_optimizer"])
        return networks, adams

    def descend(adam, loss):
        adam.zero_grad()
        loss.backward()
        adam.step()

    def follow(networks, *keys):
        with torch.no_grad():
            for key in keys:
                for old, new in zip(networks[f"{key}_target"].parameters(), networks[key].parameters(), strict=True):
                    old.copy_(0.7 * old + 0.3 * new)

    def loss(values, target):
        return ((values[0] - target) ** 2).mean() + ((values[1] - target) ** 2).mean()

    def target_of(networks, key, batch, gamma):
        with torch.no_grad():
            q = networks[f"{key}_target"](batch.next_observations, networks["actor_target"](batch.next_observations))
            return batch.rewards + gamma * (1 - batch.terminals) * torch.minimum(q[0], q[1])

    def end(phase, networks):
        before, after = states[phase], states[phases[phases.index(phase) + 1]]
        for key, network in networks.items():
            for weight, value in network.state_dict().items():
                moved = (after[key][weight] - before[key][weight]).norm()
                assert (value - after[key][weight]).norm() <= 0.01 * moved, (phase, key, weight)

    def constraint(observations, actions, weight):
        """SPOT's, of the VAE that its phase has trained."""
        if not spot:
            return 0.0
        return weight * script.elbo_loss(vae, observations, actions, 0.7).mean()

    if spot:
        vae, batch = script.VAE(4, 1), next(batches)
        vae.load_state_dict(states["vae"]["vae"])
        descend(torch.optim.Adam(vae.parameters(), 1e-3), constraint(batch.observations, batch.actions, 1.0))
        for weight, value in vae.state_dict().items():
            torch.testing.assert_close(value, states["offline"]["vae"][weight], rtol=0, atol=1e-5)
    networks, adams = start("offline")
    for step in range(1, 7):
        batch = next(batches)
        target = target_of(networks, "q_off", batch, 0.9)
        descend(adams["q_off"], loss(networks["q_off"](batch.observations, batch.actions), target))
        if step % 2 == 0:
            actions = networks["actor"](batch.observations)
            q = networks["q_off"](batch.observations, actions)[0]
            scale = (1.0 if spot else 2.0) / q.abs().mean().item()
            near = constraint(batch.observations, actions, 0.4) if spot else ((actions - batch.actions) ** 2).mean()
            descend(adams["actor"], near - scale * q.mean())
            follow(networks, "q_off", "actor")
    end("offline", networks)

    gamma = 0.8 if spot else 0.9
    if args.opt:
        networks, adams = start("online_pretrain")
    for step in range(1, 7) if args.opt else ():
        both = next(batches)
        target, q = target_of(networks, name, both, gamma), networks[name]
        off, on = slice(0, 16), slice(16, 32)
        offline_loss, online_loss = (
            loss(q(both.observations[part], both.actions[part]), target[part]) for part in (off, on)
        )
        if args.q_on_init == "meta":
            inner = torch.autograd.grad(offline_loss, list(q.parameters()), retain_graph=True)
            adapted = copy.deepcopy(q)
            for parameter, gradient in zip(adapted.parameters(), inner, strict=True):
                parameter.data -= 0.1 * gradient
            online_loss = loss(adapted(both.observations[on], both.actions[on]), target[on])
            outer = torch.autograd.grad(online_loss, list(adapted.parameters()))
            for parameter, *gradients in zip(q.parameters(), inner, outer, strict=True):
                parameter.grad = sum(gradients)
            adams[name].step()
        else:
            descend(adams[name], online_loss + (offline_loss if args.q_on_init == "joint" else 0))
        if step % 2 == 0:
            follow(networks, name)
    if args.opt:
        end("online_pretrain", networks)

    networks, adams = start("online_finetune")
    critics = ["q_off", "q_on"] if with_q_on else ["q_off"]
    if with_q_on and args.kappa_init == 1:
        critics = ["q_on"]
    for step in range(12):
        batch = next(batches)
        for key in critics:
            target = target_of(networks, key, batch, gamma)
            descend(adams[key], loss(networks[key](batch.observations, batch.actions), target))
        if step % 2 == 1:
            actions = networks["actor"](batch.observations)
            q = sum(w * networks[key](batch.observations, actions)[0] for key, w in shares(args, step // 2).items())
            cooled = 0.4 * max(0.1, 1 - (args.n_tau * args.opt + step // 2) / OWN[spot_opt]["lambda_decay"])
            near = constraint(batch.observations, actions, cooled)
            descend(adams["actor"], near - q.mean() / (q.abs().mean().item() if spot else 1))
            follow(networks, *critics, "actor")
    end("online_finetune", networks)
    assert next(batches, None) is None


PHASES = ("offline", "collect", "online_pretrain", "online_finetune", "done")
OFF = ("actor", "actor_target", "q_off", "q_off_target")
KEYS = {True: (*OFF, "q_on", "q_on_target"), False: OFF}


def shares(args, step: int) -> dict[str, float]:
    """The critics' weights in Eq. 4 at a step of fine-tuning: kappa from 0.2 to 1 over 40 steps, 30 of them before."""
    if not (args.opt and args.q_on):
        return {"q_off": 1.0}
    if args.kappa_init == 1:
        return {"q_on": 1.0}
    kappa = 0.2 + 0.8 * (30 + step) / 40
    return {"q_off": 1 - kappa, "q_on": kappa}


@pytest.mark.parametrize("script", [td3_opt, iql_opt, rlpd_opt])
def test_one_learning_rate_for_all(script):
    args = script.resolve(script.Args(env_id="hopper-medium-v2", learning_rate=1e-3))
    parts = script.Agent(args, 3, 2, torch.device("cpu")).parts()
    rates = {name: float(part.param_groups[0]["lr"]) for name, part in parts.items() if "optimizer" in name}
    assert len(rates) >= 3 and set(rates.values()) == {1e-3}


@pytest.mark.parametrize("script", [td3_opt, spot_opt, iql_opt, rlpd_opt])
def test_q_on_is_new(script):
    """Not a copy of Q_off, whose bias it is to be without."""
    agent = script.Agent(script.resolve(script.Args(env_id="hopper-medium-v2")), 3, 2, torch.device("cpu"))
    assert not equal(agent.q_on.state_dict(), agent.q_off.state_dict())


@pytest.mark.parametrize("script", OWN, ids=lambda script: script.__name__)
def test_every_target_starts_as_a_copy(script):
    parts = script.Agent(script.resolve(script.Args(env_id="hopper-medium-v2")), 3, 2, torch.device("cpu")).parts()
    targets = [name for name in parts if name.endswith("_target")]
    assert len(targets) >= (2 if script in OPT else 1)
    for name in targets:
        network, target = parts[name.removesuffix("_target")], parts[name]
        assert equal(network.state_dict(), target.state_dict())
        assert not {x.data_ptr() for x in network.parameters()} & {x.data_ptr() for x in target.parameters()}


def test_twins_start_apart_as_pytorchs_layers():
    layer, plain = td3_opt.EnsembleLinear(2, 100, 300), torch.nn.Linear(100, 300)
    for mine, own in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert not torch.equal(mine[0], mine[1])
        for member in mine:
            assert member.abs().max() <= 0.1 and member.std().item() == pytest.approx(own.std().item(), rel=0.15)


def test_the_size_of_exploration_noise():
    torch.manual_seed(0)
    actions = [td3_opt.explore(lambda _: np.zeros(24, np.float32), None, 0.1) for _ in range(500)]
    assert np.std(actions) == pytest.approx(0.1, rel=0.03) and np.mean(actions) == pytest.approx(0, abs=0.003)
    actions = td3_opt.explore(lambda _: np.full(500, 0.95, np.float32), None, 0.1)
    assert actions.max() == 1 and 0.25 < (actions == 1).mean() < 0.37  # beyond half a standard deviation: 0.31


PROTOCOL = dict(offline_steps=1_000_000, online_steps=300_000, n_tau=25_000, n_pretrain=50_000, q_on_init="meta")
PROTOCOL |= dict(meta_lr=3e-4, meta_second_order=False, init_online_fraction=0.5, batch_size=256, gamma=0.99, tau=0.005)
PROTOCOL |= dict(eval_freq=5_000, eval_episodes=10, opt=True, q_on=True, kappa_init=0.3, kappa_end=0.9)
PROTOCOL |= dict(kappa_decay=150_000, replay="balanced")
TD3 = dict(policy_frequency=2, policy_noise=0.2, noise_clip=0.5, exploration_noise=0.1, collect_noise=0.1)
PUBLISHED = {  # the backbones' own
    td3_opt: TD3 | dict(utd=5, learning_rate=3e-4, bc_alpha=2.5),
    spot_opt: TD3
    | dict(utd=1, actor_learning_rate=1e-4, critic_learning_rate=3e-4, vae_learning_rate=1e-3, vae_steps=100_000)
    | dict(kl_weight=0.5, lambda_init=1.0, lambda_decay=1_000_000, lambda_end=0.5),
    iql_opt: dict(utd=1, learning_rate=3e-4, expectile=0.7, beta=3.0, dropout=0.0),
    rlpd_opt: dict(utd=20, offline_utd=1, learning_rate=3e-4, ensemble_size=10, subset_size=2, replay="symmetric"),
}


@pytest.mark.parametrize("script", OPT, ids=lambda script: script.__name__)
def test_what_is_not_given_is_the_papers(script):
    args = vars(script.resolve(script.Args(env_id="hopper-medium-v2")))
    expected = PROTOCOL | PUBLISHED[script]
    assert {name: args[name] for name in expected} == expected
    vanilla = script.resolve(script.Args(env_id="hopper-medium-v2", opt=False))
    assert vanilla.replay == ("symmetric" if script is rlpd_opt else "uniform")
