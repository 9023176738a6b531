"""Replay: the table of both buffers, the sum tree against a naive one, the density ratio against a known one."""

import math

import numpy as np
import pytest
import scipy.stats
import td3_opt
import torch
from td3_opt import BalancedReplay, ReplayBuffer, SumTree, Transitions

CPU = torch.device("cpu")


def dataset(n: int, observation_dim: int = 3, action_dim: int = 2, seed: int = 0) -> Transitions:
    rng = np.random.default_rng(seed)
    columns = (rng.standard_normal((n, observation_dim)), rng.uniform(-1, 1, (n, action_dim)), rng.standard_normal(n))
    columns += (rng.standard_normal((n, observation_dim)), rng.uniform(size=n) < 0.1)
    return Transitions(*(np.asarray(column, np.float32) for column in columns))


def fill_online(buffer: ReplayBuffer, data: Transitions) -> list[int]:
    return [buffer.add(*(column[i] for column in data)) for i in range(len(data.rewards))]


def test_rows_come_back_as_they_were_stored_and_the_ring_wraps_around():
    offline, online = dataset(10), dataset(7, seed=1)
    buffer = ReplayBuffer(offline, online_capacity=5, device=CPU)
    assert fill_online(buffer, online) == [10, 11, 12, 13, 14, 10, 11]
    for column, stored in zip(offline, buffer[torch.arange(10)], strict=True):
        np.testing.assert_array_equal(stored, column)
    for column, stored in zip(online, buffer[torch.tensor([10, 11, 12, 13, 14])], strict=True):
        np.testing.assert_array_equal(stored, column[[5, 6, 2, 3, 4]])


def test_some_states_of_the_dataset_and_of_the_first_and_last_online_transitions():
    column = np.arange(6_000, dtype=np.float32)[:, None]
    buffer = ReplayBuffer(Transitions(column, column, column[:, 0], column, column[:, 0]), 13_000, CPU)
    for step in range(12_000):
        buffer.add([-step], [0], 0, [0], 0)
    states = buffer.some_states()
    assert len(states["offline"]) == 2_000
    assert states["offline"].flatten().tolist() == list(range(0, 6_000, 3))
    assert states["first"].flatten().tolist() == list(range(0, -6_000, -5))
    assert states["last"].flatten().tolist() == list(range(-6_000, -12_000, -5))  # fewer than 20,000: the halves


def test_uniform_samplers_reach_every_row_of_their_buffer_and_no_other():
    buffer = ReplayBuffer(dataset(10), online_capacity=20, device=CPU)
    fill_online(buffer, dataset(5))
    torch.manual_seed(0)
    n = 30_000
    expected = {"offline": range(10), "online": range(10, 15), "uniform": range(15)}
    for name, rows in expected.items():
        counts = np.bincount(buffer.sample(name, n), minlength=30)
        assert counts[list(rows)].sum() == n
        assert scipy.stats.chisquare(counts[list(rows)]).pvalue > 0.001
    symmetric = buffer.sample("symmetric", 256)
    assert (symmetric < 10).sum() == 128 == ((symmetric >= 10) & (symmetric < 15)).sum()


@pytest.mark.parametrize("size", [1, 100, 129, 1_000, 16_385])
def test_sum_tree_draws_proportionally(size):
    rng = np.random.default_rng(size)
    priorities = rng.gamma(0.3, size=size)  # over several orders of magnitude
    priorities[rng.uniform(size=size) < 0.1] = 0
    priorities[size // 2] = 1.0
    tree = SumTree(size, CPU)
    tree.set(torch.arange(size), torch.from_numpy(priorities))
    torch.manual_seed(size)
    counts = np.bincount(np.concatenate([tree.sample(100_000) for _ in range(10)]), minlength=size)
    assert counts.shape == (size,) and counts.sum() == 1_000_000
    assert (counts[priorities == 0] == 0).all()
    expected = priorities / priorities.sum() * 1_000_000
    rare = expected < 10  # chi-square wants 5 or more expected in a cell: one cell for the rare ones
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
        if expected[-1] < 5:
            counts, expected = counts[:-1], expected[:-1] * counts[:-1].sum() / expected[:-1].sum()
    assert len(counts) == 1 or scipy.stats.chisquare(counts, expected).pvalue > 0.001


def test_sum_tree_never_draws_an_empty_leaf():
    """The leaves behind the last filled one have priority 0, next to the largest priorities that occur."""
    tree = SumTree(1_000, CPU)
    tree.set(torch.arange(300), torch.full((300,), 1e3))
    tree.set(torch.tensor([299]), torch.tensor([1e-3]))
    torch.manual_seed(0)
    assert max(tree.sample(10_000).max() for _ in range(20)) < 300


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_draws_at_the_edges_of_the_parts_never_reach_an_empty_leaf(edge, monkeypatch):
    """Empty leaves before, between and behind the filled ones; rounding must not lead to them."""
    monkeypatch.setattr(torch, "rand", lambda n, **given: torch.full((n,), edge, **given))
    rng = np.random.default_rng(0)
    for size in (3, 130, 1_000):
        for _ in range(50):
            priorities = rng.gamma(0.3, size=size) * (rng.uniform(size=size) < 0.5)
            priorities[[0, -1]], priorities[size // 2] = 0, 1e-3
            tree = SumTree(size, CPU)
            tree.set(torch.arange(size), torch.from_numpy(priorities))
            for n in (1, 16, 256):
                assert (priorities[tree.sample(n)] > 0).all()


def test_sum_tree_equals_a_naive_one_after_many_updates_with_repeated_indices():
    size, rng = 1_037, np.random.default_rng(0)
    tree, naive = SumTree(size, CPU), np.zeros(size)
    for _ in range(1_000):
        leaves, priorities = rng.integers(0, size, 100), rng.uniform(1e-3, 1e3, 100)
        leaves[50:60] = leaves[:10]  # on top of the repetitions by chance
        tree.set(torch.from_numpy(leaves), torch.from_numpy(priorities))
        for leaf, priority in zip(leaves, priorities, strict=True):
            naive[leaf] = priority
    np.testing.assert_array_equal(tree.leaves.view(-1)[:size], naive)
    padded = np.zeros(tree.leaves.numel())
    padded[:size] = naive
    np.testing.assert_allclose(tree.nodes, padded.reshape(tree.leaves.shape).sum(1), rtol=1e-12)
    # at given points, one in each 2,000th of the total, the draw is the naive one's: the first cumulative sum beyond
    torch.manual_seed(1)
    drawn = tree.sample(2_000)
    torch.manual_seed(1)
    points = (np.arange(2_000) + torch.rand(2_000, dtype=torch.float64).numpy()) / 2_000 * naive.sum()
    np.testing.assert_array_equal(drawn, np.searchsorted(np.cumsum(naive), points, side="right"))


def test_a_draw_from_each_equal_part_of_the_total():
    """256 leaves of one priority: each is drawn once. A share of the total is drawn to within one draw of a batch."""
    tree = SumTree(1_000, CPU)
    tree.set(torch.arange(256), torch.full((256,), 0.3))
    torch.manual_seed(0)
    assert all(torch.equal(tree.sample(256), torch.arange(256)) for _ in range(20))
    tree.set(torch.arange(1_000), torch.cat([torch.ones(700), torch.full((300,), 7 / 3 * 0.99)]))
    online = torch.stack([(tree.sample(256) >= 700).double().mean() for _ in range(1_000)])
    expected = 300 * 7 / 3 * 0.99 / (700 + 300 * 7 / 3 * 0.99)
    part = expected * 256 % 1  # of the one stratum that both share; independent draws would have 0.031
    assert online.std().item() == pytest.approx(math.sqrt(part * (1 - part)) / 256, rel=0.1) and online.std() < 0.002
    assert online.mean().item() == pytest.approx(expected, abs=3e-4)


def test_density_ratio_loss_by_hand():
    """w = 1 everywhere: -log 1 - log 1 = 0. w = 3 offline, 1/3 online: -log(1/2) - log(1/2)."""
    one = torch.ones(4)
    assert td3_opt.density_ratio_loss(one, one).item() == pytest.approx(0, abs=1e-6)
    assert td3_opt.density_ratio_loss(3 * one, one / 3).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def gaussian_replay(n: int) -> BalancedReplay:
    """B_off ~ N(0, 1), B_on ~ N(0.7, 0.8^2) in the first coordinate of the state; all else is constant."""
    rng = np.random.default_rng(0)

    def columns(mean, std):
        observations = np.stack([rng.normal(mean, std, n), np.zeros(n)], 1).astype(np.float32)
        zeros = np.zeros((n, 1), np.float32)
        return Transitions(observations, zeros, zeros[:, 0], observations, zeros[:, 0])

    buffer = ReplayBuffer(columns(0.0, 1.0), n, CPU)
    online = columns(0.7, 0.8)
    buffer.rows[n:] = torch.from_numpy(np.hstack([c.reshape(n, -1) for c in online]))
    buffer.added = buffer.n_online = n
    buffer.online_size.fill_(n)
    torch.manual_seed(0)
    return BalancedReplay(buffer, 256, CPU)


def test_the_density_ratio_loss_is_least_at_the_density_ratio():
    """Three kinds of transitions: of 8 offline ones 4, 3 and 1, of 8 online ones 1, 3 and 4."""
    offline, online = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    ratio = torch.tensor([1 / 4, 1, 4], dtype=torch.float64, requires_grad=True)
    least = td3_opt.density_ratio_loss(ratio[offline], ratio[online])
    (gradient,) = torch.autograd.grad(least, ratio)
    assert gradient.abs().max() < 1e-9
    for kind in range(3):
        for factor in (0.8, 1.25):
            other = ratio.detach().clone()
            other[kind] *= factor
            assert td3_opt.density_ratio_loss(other[offline], other[online]) > least + 1e-4


def test_priorities_after_an_update():
    """w^(1/5) / mean_off w^(1/5), between 1e-3 and 1e3, for the rows just used; all other priorities stay."""
    replay = gaussian_replay(1_000)
    replay.start(0.5)
    before = replay.tree.leaves.view(-1).clone()
    rows = torch.tensor([3, 1_005, 3, 1_999])
    batch = replay.buffer[rows]
    torch.manual_seed(5)
    uniform = replay.buffer[torch.cat([replay.buffer.sample(which, 256) for which in ("offline", "online")])]
    with torch.no_grad():
        offline = torch.cat([uniform.observations[:256], uniform.actions[:256]], 1)
        mean_offline = replay.ratio(offline).double().pow(0.2).mean()
    torch.manual_seed(5)
    replay.update(rows, batch)
    with torch.no_grad():
        inputs = torch.cat([batch.observations, batch.actions], 1)
        expected = (replay.ratio(inputs).squeeze(1).double().pow(0.2) / mean_offline).clamp(1e-3, 1e3)
    after = replay.tree.leaves.view(-1)
    torch.testing.assert_close(after[rows], expected, rtol=1e-5, atol=0)
    changed = torch.ones(len(after), dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(after[changed], before[changed])


def test_the_density_ratio_starts_at_one():
    replay = gaussian_replay(1_000)
    kinds = [type(layer).__name__ for layer in replay.ratio]
    assert kinds == ["Linear", "ReLU"] * 3 and replay.ratio[4].bias.item() == 1
    assert [tuple(replay.ratio[i].weight.shape) for i in (0, 2, 4)] == [(256, 3), (256, 256), (1, 256)]
    for i, bound in ((0, 1 / 16), (2, 1 / 16), (4, 3e-3)):  # Off2On's: uniform in +-bound
        weight = replay.ratio[i].weight
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (replay.ratio[0].bias == 0).all() and (replay.ratio[2].bias == 0).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_initial_online_share(fraction):
    buffer = ReplayBuffer(dataset(20_000), 3_000, CPU)
    fill_online(buffer, dataset(700, seed=1))
    replay = BalancedReplay(buffer, 256, CPU)
    replay.start(fraction)
    torch.manual_seed(0)
    rows = replay.tree.sample(100_000)
    assert rows.max() < 20_700
    assert (rows >= 20_000).double().mean().item() == pytest.approx(fraction, abs=0.02 * fraction)


def test_later_transitions_enter_at_the_largest_priority_seen():
    buffer = ReplayBuffer(dataset(2_000), 5, CPU)
    fill_online(buffer, dataset(4, seed=1))
    replay = BalancedReplay(buffer, 16, CPU)
    replay.start(0.5)  # online ones at 2000 / 4
    for value in dataset(3, seed=2).rewards:  # the last two wrap around
        row = buffer.add(np.zeros(3), np.zeros(2), value, np.zeros(3), 0)
        replay.add(row)
        assert replay.tree.leaves.view(-1)[row] == 500
    replay.largest.fill_(700.0)
    replay.add(2_001)
    assert replay.tree.leaves.view(-1)[2_001] == 700
    assert replay.tree.nodes.sum().item() == pytest.approx(replay.tree.leaves.sum().item())


def test_the_largest_priority_follows_the_updates():
    replay = gaussian_replay(1_000)
    replay.start(0.01)  # the largest at the start is 1
    assert replay.largest == 1
    with torch.no_grad():
        replay.ratio[4].bias.fill_(0.0)
        replay.ratio[4].weight.fill_(0.0)
    rows = torch.tensor([1])
    replay.update(rows, replay.buffer[rows])  # a dead network: 0 / (0 + 1e-10), clamped
    assert replay.tree.leaves.view(-1)[1].item() == pytest.approx(1e-3) and replay.largest == 1
    replay.largest.fill_(0.5)
    with torch.no_grad():
        replay.ratio[4].bias.fill_(2.0)
    replay.update(rows, replay.buffer[rows])
    assert replay.largest == replay.tree.leaves.view(-1)[1] and 0.9 < replay.largest < 1.1


def test_no_priority_is_above_1000(monkeypatch):
    replay = gaussian_replay(1_000)
    replay.start(0.5)
    density_ratio = replay.density_ratio

    def extreme(batch):  # of the uniform batch of both buffers, and of the rows used: 1e4 / 1e-6 before the bound
        return 0 * density_ratio(batch) + (1e-30 if len(batch.rewards) == 512 else 1e20)

    monkeypatch.setattr(replay, "density_ratio", extreme)
    rows = torch.tensor([1, 1_500])
    replay.update(rows, replay.buffer[rows])
    assert replay.tree.leaves.view(-1)[rows].tolist() == [1e3, 1e3] and replay.largest == 1e3
