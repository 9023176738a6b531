"""SPOT's own formulas and phases. What it shares with td3_opt.py is tested there."""

import numpy as np
import pytest
import spot_opt
import torch
from runs import equal, rows, watch_phases
from spot_opt import Args

SHORT = dict(env_id="InvertedPendulum-v5", vae_steps=12, offline_steps=20, online_steps=60, n_tau=30, n_pretrain=16)
SHORT |= dict(batch_size=16, eval_episodes=1, eval_freq=0, progress=False)


def normal_kl(mean, std):
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    return torch.distributions.kl_divergence(p, q)


class LinearVAE:
    """q(z | s, a) is fixed, the decoder linear: its expected reconstruction error has a closed form."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.mean, self.log_std = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator) / 2
        self.weight = torch.randn(6, 3, generator=generator)

    def encode(self, observations, actions):
        n = len(actions) // 4
        return self.mean.repeat(n, 1), self.log_std.repeat(n, 1)

    def decode(self, observations, latents):
        return latents @ self.weight


def test_elbo_loss_against_its_closed_form_on_a_linear_decoder():
    vae = LinearVAE()
    observations, actions = torch.zeros(4, 2), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    std = vae.log_std.exp()
    # E (zW - a)^2 = (mW - a)^2 + s^2 W^2 for each dimension of the action
    error = (vae.mean @ vae.weight - actions) ** 2 + std**2 @ vae.weight**2
    expected = error.mean(1) + 0.3 * normal_kl(vae.mean, std).mean(1)
    torch.manual_seed(2)
    samples = spot_opt.elbo_loss(vae, observations.repeat(50_000, 1), actions.repeat(50_000, 1), 0.3)
    torch.testing.assert_close(samples.view(-1, 4).mean(0), expected, rtol=0.02, atol=0)
    assert samples.view(-1, 4).std(0).min() > 0.1  # it does sample


def test_elbo_loss_weights_the_divergence():
    vae = LinearVAE()
    losses = []
    for weight in (0.0, 2.0):
        torch.manual_seed(3)
        losses.append(spot_opt.elbo_loss(vae, torch.zeros(4, 2), torch.zeros(4, 3), weight))
    torch.testing.assert_close(losses[1] - losses[0], 2 * normal_kl(vae.mean, vae.log_std.exp()).mean(1))


def test_vae_clamps_the_log_standard_deviation_and_decodes_into_the_action_range():
    torch.manual_seed(0)
    vae = spot_opt.VAE(5, 3)
    with torch.no_grad():
        vae.encoder[-1].bias[6:9], vae.encoder[-1].bias[9:] = 100, -100
    mean, log_std = vae.encode(torch.randn(7, 5), torch.randn(7, 3))
    assert mean.shape == log_std.shape == (7, 6)  # latent: twice the action's
    assert (log_std[:, :3] == 15).all() and (log_std[:, 3:] == -4).all()
    actions = vae.decode(torch.randn(7, 5), 1e6 * torch.randn(7, 6))
    assert actions.shape == (7, 3) and actions.abs().max() <= 1
    widths = [tuple(layer.weight.shape) for layer in (*vae.encoder, *vae.decoder) if hasattr(layer, "weight")]
    assert widths == [(750, 8), (750, 750), (12, 750), (750, 11), (750, 750), (3, 750)]


@pytest.mark.parametrize("step, share", [(0, 1), (100_000, 0.9), (300_000, 0.7), (800_000, 0.2), (2_000_000, 0.2)])
def test_cooling(step, share):
    """As SPOT's code: towards 0 at 1,000,000 environment steps, however long the run is, but not below its floor."""
    args = spot_opt.resolve(Args(online_steps=300_000))
    assert spot_opt.lambda_at(step, 0.05, 0.2, args.lambda_decay) == pytest.approx(0.05 * share)


def test_policy_loss_normalises_the_mixed_value_by_its_own_size():
    rng = np.random.default_rng(0)
    q_off, q_on, elbo = rng.normal(3, 5, 64), rng.normal(-9, 5, 64), rng.uniform(0, 1, 64)
    mixed = 0.3 * q_off + 0.7 * q_on
    expected = -mixed.mean() / np.abs(mixed).mean() + 0.25 * elbo.mean()
    off, on = torch.tensor(q_off, requires_grad=True), torch.tensor(q_on, requires_grad=True)
    loss = spot_opt.policy_loss(spot_opt.mixed_value(off, on, 0.7), torch.tensor(elbo), 0.25)
    assert loss.item() == pytest.approx(expected)
    gradients = torch.autograd.grad(loss, (off, on))  # the norm is a constant to the gradient
    for gradient, share in zip(gradients, (0.3, 0.7), strict=True):
        np.testing.assert_allclose(gradient.numpy(), -share / 64 / np.abs(mixed).mean())
    assert spot_opt.mixed_value(off, None, 0.7) is off and spot_opt.mixed_value(None, on, 1.0) is on


def test_networks_with_layer_norm_are_plain_networks():
    torch.manual_seed(0)
    critic = spot_opt.Critic(5, 3, layer_norm=True)
    with torch.no_grad():
        for norm in critic.norms:
            norm.weight.uniform_(0.5, 2), norm.bias.uniform_(-1, 1)
    observations, actions = torch.randn(9, 5), torch.randn(9, 3)
    for first_only in (False, True):
        values = critic(observations, actions, first_only=first_only)
        assert values.shape == ((1, 9) if first_only else (2, 9))
        for i in range(len(values)):
            layers = []
            for linear, norm in zip(critic.layers, [*critic.norms, None], strict=True):
                plain = torch.nn.Linear(*linear.weight[i].shape)
                plain.weight.data, plain.bias.data = linear.weight[i].T, linear.bias[i, 0]
                layers.append(plain)
                if norm is not None:
                    layers += [torch.nn.LayerNorm(256), torch.nn.ReLU()]
                    layers[-2].weight.data, layers[-2].bias.data = norm.weight[i, 0], norm.bias[i, 0]
            expected = torch.nn.Sequential(*layers)(torch.cat([observations, actions], 1)).squeeze(1)
            torch.testing.assert_close(values[i], expected, rtol=1e-4, atol=1e-5)
    kinds = [type(layer).__name__ for layer in spot_opt.Actor(5, 3, layer_norm=True).network]
    assert kinds == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear", "Tanh"]


def test_values_of_the_tasks():
    def values(env_id):
        args = spot_opt.resolve(Args(env_id=env_id))
        return (
            args.lambda_init,
            args.lambda_end,
            args.layer_norm,
            args.gamma,
            args.online_gamma,
            args.utd,
            args.kappa_decay,
        )

    lambdas = {"umaze": 0.25, "umaze-diverse": 0.25, "medium-play": 0.05, "medium-diverse": 0.025}
    lambdas |= {"large-play": 0.025, "large-diverse": 0.025}
    for kind, weight in lambdas.items():
        decay = 200_000 if kind == "large-diverse" else 100_000
        assert values(f"antmaze-{kind}-v2") == (weight, 0.2, False, 0.99, 0.995, 1, decay)
    for task in ("pen", "hammer", "door", "relocate"):
        assert values(f"{task}-cloned-v1") == (1, 0.5, True, 0.99, 0.99, 1, 250_000)
    assert values("hopper-medium-v2") == (1, 0.5, False, 0.99, 0.99, 1, 150_000)


def agent_of(**arguments) -> tuple[Args, spot_opt.Agent]:
    args = spot_opt.resolve(Args(**arguments))
    return args, spot_opt.Agent(args, 45, 24, torch.device("cpu"))


def test_the_agents_networks_and_learning_rates():
    for env_id, norms in (("pen-cloned-v1", 2), ("antmaze-umaze-v2", 0)):
        _, agent = agent_of(env_id=env_id)
        kinds = [type(layer).__name__ for layer in agent.actor.network]
        assert kinds.count("LayerNorm") == norms
        for critic in (agent.q_off, agent.q_on):
            assert [type(norm).__name__ for norm in critic.norms].count("EnsembleLayerNorm") == norms
        for layer, bound in (
            (agent.actor.network[-2], 1e-3),
            (agent.q_off.layers[2], 3e-3),
            (agent.q_on.layers[2], 3e-3),
        ):
            for parameter in layer.parameters():
                assert parameter.abs().max() <= bound
            assert layer.weight.abs().max() > 0.9 * bound
        names = ("actor_optimizer", "q_off_optimizer", "q_on_optimizer", "vae_optimizer")
        rates = [getattr(agent, name).param_groups[0]["lr"] for name in names]
        assert rates == [1e-4, 3e-4, 3e-4, 1e-3]


def test_exploration_noise_has_its_size_and_is_clipped():
    args = Args(noise_clip=0.15)
    torch.manual_seed(0)
    actions = [spot_opt.explore(args, lambda _: np.full(24, 0.2, np.float32), None, 0.1) for _ in range(500)]
    noise = np.concatenate(actions) - 0.2
    assert np.abs(noise).max() == pytest.approx(0.15, abs=1e-6)
    inside = noise[np.abs(noise) < 0.149]
    assert (np.abs(noise) > 0.1499).mean() == pytest.approx(0.1336, abs=0.02)  # |N(0, 1)| > 1.5
    assert inside.std() == pytest.approx(0.1 * 0.7427, rel=0.05)  # of a normal cut at 1.5 standard deviations
    assert spot_opt.explore(args, lambda _: np.ones(24, np.float32), None, 0.1).max() == 1


@pytest.fixture
def watched(monkeypatch, pendulum_file, tmp_path, home):
    """Train in this process, with a copy of all parts at the start of every phase and at the end."""
    monkeypatch.setenv("HOME", str(home))

    def watched(**arguments) -> dict[str, dict]:
        states = watch_phases(spot_opt, monkeypatch)
        spot_opt.train(Args(**(SHORT | arguments), dataset=str(pendulum_file), run_dir=str(tmp_path / "run")))
        return states

    return watched


def changed(before: dict, after: dict) -> set[str]:
    agent = before.keys() - {"buffer", "collector", "balanced", "ratio_optimizer"}
    return {name for name in agent if not equal(before[name], after[name])}


def updates(state: dict) -> set[int]:
    return {int(s["step"]) for s in state["state"].values()}


Q_OFF, Q_ON = ({name, f"{name}_target", f"{name}_optimizer"} for name in ("q_off", "q_on"))
POLICY = {"actor", "actor_target", "actor_optimizer"}


def test_what_each_phase_changes(watched):
    """Bit for bit: the VAE's phase only the VAE, frozen from then on; collection forgets Adam's moments; and so on."""
    states = watched()
    vae = {"vae", "vae_optimizer"}
    assert changed(states["vae"], states["offline"]) == vae
    assert changed(states["offline"], states["collect"]) == Q_OFF | POLICY
    assert changed(states["collect"], states["online_pretrain"]) == {"actor_optimizer", "q_off_optimizer"}
    assert changed(states["online_pretrain"], states["online_finetune"]) == Q_ON
    assert changed(states["online_finetune"], states["done"]) == Q_OFF | Q_ON | POLICY
    # the optimisers of the offline phase start anew online: 30 steps, of which 15 move the policy
    assert updates(states["collect"]["q_off_optimizer"]) == {20} and updates(states["done"]["q_off_optimizer"]) == {30}
    assert updates(states["collect"]["actor_optimizer"]) == {10} and updates(states["done"]["actor_optimizer"]) == {15}
    assert updates(states["done"]["q_on_optimizer"]) == {46} and updates(states["done"]["vae_optimizer"]) == {12}


def test_vanilla_resets_its_optimisers_where_it_goes_online(watched):
    states = watched(opt=False)
    assert changed(states["online_finetune"], states["done"]) == Q_OFF | POLICY
    assert updates(states["online_finetune"]["q_off_optimizer"]) == {20}
    assert updates(states["done"]["q_off_optimizer"]) == {60}


def test_the_policy_moves_in_every_policy_frequencyth_step(watched):
    states = watched(policy_frequency=3, utd=2)  # 20 steps offline, 60 online, where the optimiser starts anew
    assert updates(states["collect"]["actor_optimizer"]) == {6} and updates(states["done"]["actor_optimizer"]) == {20}


@pytest.mark.parametrize(
    "arguments",
    [{"q_on": False}, {"q_on_init": "random"}, {"replay": "symmetric"}, {"kappa_init": 1.0, "kappa_end": 1.0}],
    ids=str,
)
def test_switches(watched, arguments):
    states = watched(**arguments)
    pretrained = changed(states["online_pretrain"], states["online_finetune"])
    tuned = changed(states["online_finetune"], states["done"])
    if "q_on" in arguments:
        assert pretrained == Q_OFF and tuned == Q_OFF | POLICY and "q_on" not in states["done"]
        assert updates(states["done"]["q_off_optimizer"]) == {46}
    elif "q_on_init" in arguments:
        assert pretrained == set() and tuned == Q_OFF | Q_ON | POLICY
    elif "replay" in arguments:
        assert "balanced" not in states["done"] and tuned == Q_OFF | Q_ON | POLICY
    else:
        assert tuned == Q_ON | POLICY  # at kappa = 1 Q_off costs nothing


def test_discount_and_constraint_change_where_the_run_goes_online(watched, monkeypatch):
    gammas, weights = [], []
    td_target, policy_loss = spot_opt.td_target, spot_opt.policy_loss
    monkeypatch.setattr(
        spot_opt, "td_target", lambda q, b, a, gamma: (gammas.append(gamma), td_target(q, b, a, gamma))[1]
    )
    monkeypatch.setattr(spot_opt, "policy_loss", lambda q, e, w: (weights.append(float(w)), policy_loss(q, e, w))[1])
    watched(gamma=0.9, online_gamma=0.95, lambda_init=0.5, lambda_end=0.4, lambda_decay=50)
    assert gammas == [0.9] * 20 + [0.95] * (16 + 2 * 30)
    cooled = [0.5 * max(0.4, 1 - step / 50) for step in range(31, 60, 2)]  # every second gradient step, at 31, 33, ...
    assert weights == pytest.approx([0.5] * 10 + cooled, abs=1e-6)


@pytest.fixture
def first_steps(watched, monkeypatch):
    """Gradients of a run's first steps in each phase beside plain autograd on the very batches and noise."""

    def first_steps(phase: str, **arguments) -> list[dict]:
        steps, minimize, elbo_loss = [], spot_opt.minimize, spot_opt.elbo_loss
        calls = {"elbo": [], "target": [], "mixed": []}
        td_target, mixed_value = spot_opt.td_target, spot_opt.mixed_value

        def watch_elbo(vae, observations, actions, weight):
            calls["elbo"].append(weight)
            return elbo_loss(vae, observations, actions, weight)

        def watch_target(q_target, batch, next_actions, gamma):
            target = td_target(q_target, batch, next_actions, gamma)
            calls["target"].append((q_target, batch, target))
            return target

        def watch_mixed(q_off, q_on, kappa):
            calls["mixed"].append((q_off.detach().clone(), q_on.detach().clone(), float(kappa)))
            return mixed_value(q_off, q_on, kappa)

        def watch(loss, optimizer):
            parameters = optimizer.param_groups[0]["params"]
            before = [p.detach().clone() for p in parameters]
            minimize(loss, optimizer)
            steps.append({"optimizer": optimizer, "before": before, "gradient": [p.grad.clone() for p in parameters]})

        for name, spy in (("minimize", watch), ("elbo_loss", watch_elbo), ("td_target", watch_target)):
            monkeypatch.setattr(spot_opt, name, spy)
        monkeypatch.setattr(spot_opt, "mixed_value", watch_mixed)
        agents, create = [], spot_opt.Agent.__init__

        def keep(self, *rest):
            create(self, *rest)
            agents.append(self)

        monkeypatch.setattr(spot_opt.Agent, "__init__", keep)
        watched(**arguments)
        return steps, calls, agents[0]

    return first_steps


def test_each_critic_has_its_own_target_and_the_policy_its_mix(first_steps):
    """Fine-tuning of one environment step, two gradient steps: Q_off, Q_on, Q_off, Q_on and the policy."""
    arguments = dict(vae_steps=1, offline_steps=0, n_pretrain=0, online_steps=31, utd=2, kl_weight=0.7)
    steps, calls, agent = first_steps("online_finetune", **arguments, kappa_init=0.0, kappa_end=1.0, kappa_decay=100)
    owners = [step["optimizer"] for step in steps]
    names = [agent.vae_optimizer] + [agent.q_off_optimizer, agent.q_on_optimizer] * 2
    names.insert(3, None), names.append(agent.actor_optimizer), names.append(None)  # None: the density ratio's own
    assert all(owner is name for owner, name in zip(owners, names, strict=True) if name is not None)
    assert [call[0] for call in calls["target"]] == [agent.q_off_target, agent.q_on_target] * 2
    assert calls["elbo"] == [0.7, 0.7]  # the VAE's step and the policy's
    (q_off, q_on, kappa) = calls["mixed"][0]
    assert kappa == pytest.approx(0.3)  # environment step 30 of 100
    for (_, batch, target), step in zip(calls["target"], [steps[i] for i in (1, 2, 4, 5)], strict=True):
        critic = spot_opt.Critic(4, 1)
        for parameter, value in zip(critic.parameters(), step["before"], strict=True):
            parameter.data = value
        loss = ((critic(batch.observations, batch.actions) - target) ** 2).mean(1).sum()
        for a, b in zip(step["gradient"], torch.autograd.grad(loss, list(critic.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    # the policy's two values are those of the critics after their step, at the policy's own actions
    actor, batch = spot_opt.Actor(4, 1), calls["target"][-1][1]
    for parameter, value in zip(actor.parameters(), steps[6]["before"], strict=True):
        parameter.data = value
    with torch.no_grad():
        actions = actor(batch.observations)
        for critic, values in ((agent.q_off, q_off), (agent.q_on, q_on)):  # the last step of a critic of this run
            torch.testing.assert_close(critic(batch.observations, actions)[0], values)
    assert not torch.equal(q_off, q_on)


def test_when_it_evaluates_and_what_it_leaves(watched, tmp_path):
    watched(eval_freq=15)
    steps = [(row["phase"], int(row["env_steps"]), int(row["gradient_steps"])) for row in rows(tmp_path / "run")]
    assert steps[:4] == [("vae", 0, 0), ("offline", 0, 27), ("offline", 0, 32), ("online_pretrain", 30, 48)]
    assert steps[4:] == [("online_finetune", 45, 63), ("online_finetune", 60, 78)]
    offline = torch.load(tmp_path / "run" / "offline.pt", weights_only=True)["parts"]
    assert set(offline) == Q_OFF | POLICY | {"vae", "vae_optimizer"}
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    spot_opt.Actor(4, model["action_dim"]).load_state_dict(model["actor"])
    assert model.keys() >= {"actor", "actor_target", "vae", "q_off", "q_off_target", "q_on", "q_on_target"}


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("--vae-steps is -1: write 0 or more", {"vae_steps": -1}),
        ("--lambda-init is -0.1: write a number, 0 or more", {"lambda_init": -0.1}),
        ("--lambda-end is 1.5: write a number from 0 to 1", {"lambda_end": 1.5}),
        ("--online-gamma is 2.0: write a number from 0 to 1", {"online_gamma": 2.0}),
        ("--actor-learning-rate is 0.0: write a positive number", {"actor_learning_rate": 0.0}),
        ("--critic-learning-rate is nan: write a positive number", {"critic_learning_rate": float("nan")}),
        ("--vae-learning-rate is inf: write a positive number", {"vae_learning_rate": float("inf")}),
        ("--kl-weight is inf: write a number, 0 or more", {"kl_weight": float("inf")}),
    ],
)
def test_its_own_arguments(words, arguments):
    with pytest.raises(spot_opt.BadInput) as error:
        spot_opt.resolve(Args(**arguments))
    assert str(error.value) == words


@pytest.mark.parametrize("offline_steps, own, steps", [(1_000_000, None, 100_000), (5_000, None, 5_000), (5_000, 7, 7)])
def test_a_short_run_has_a_short_vae(offline_steps, own, steps):
    assert spot_opt.resolve(Args(offline_steps=offline_steps, vae_steps=own)).vae_steps == steps


def test_the_constraint_reaches_the_policy_through_encoder_and_reconstruction():
    """Finite differences in the actions."""
    torch.manual_seed(0)
    vae, observations = spot_opt.VAE(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    actions = (torch.rand(4, 2, dtype=torch.float64) * 2 - 1).requires_grad_()

    def loss(actions: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return spot_opt.elbo_loss(vae, observations, actions, 0.5).sum()

    assert torch.autograd.gradcheck(loss, (actions,))
