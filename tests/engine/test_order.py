"""Order: every sample once an epoch, the same global batches on any number of processes, resumed at any step."""

import math

import pytest
import torch
from torch.utils.data import Dataset

from engine import order
from engine.order import Order
from engine.settings import Plan


class Numbers(Dataset):
    """n samples; a batch shows its own positions."""

    def __init__(self, samples: int):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"position": positions}


class Weighted(Numbers):
    def weights(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.float() % 4  # some are zero


class ByLength(Numbers):
    @property
    def lengths(self) -> torch.Tensor:
        return torch.arange(self.samples) * 7919 % 64


def plan(batch_size: int, processes: int = 1, accumulation: int = 1) -> Plan:
    return Plan(batch_size // processes // accumulation, processes, accumulation)


def make(samples: int, batch_size: int, processes: int = 1, accumulation: int = 1, kind: type = Numbers, seed: int = 0) -> Order:
    return Order(kind(samples), samples, batch_size, plan(batch_size, processes, accumulation), seed)


def steps(one: Order, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions and factors of each step's whole global batch: micro-step by micro-step, rank by rank."""
    ranks = [list(one.batches(rank, first, last)) for rank in range(one.plan.processes)]
    found = []
    for step in range(last - first):
        cuts = [ranks[rank][step * one.plan.accumulation + micro] for micro in range(one.plan.accumulation) for rank in range(one.plan.processes)]
        assert all(len(positions) == len(factors) == one.plan.micro for positions, factors in cuts)
        found.append(tuple(torch.cat(parts) for parts in zip(*cuts, strict=True)))
    return found


CUTS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (4, 3)]


@pytest.mark.parametrize("samples", [1, 11, 12, 13, 61, 96])
@pytest.mark.parametrize(("processes", "accumulation"), CUTS)
def test_each_sample_comes_once_an_epoch(samples, processes, accumulation):
    one = make(samples, 12, processes, accumulation)
    assert one.steps_per_epoch == math.ceil(samples / 12)
    for epoch in (0, 1, 7):
        found = steps(one, epoch * one.steps_per_epoch, (epoch + 1) * one.steps_per_epoch)
        positions, factors = (torch.cat(parts) for parts in zip(*found, strict=True))
        counted = positions[factors > 0]
        assert sorted(counted.tolist()) == list(range(epoch * samples, (epoch + 1) * samples))
        assert ((positions >= epoch * samples) & (positions < (epoch + 1) * samples)).all()


@pytest.mark.parametrize("kind", [Numbers, Weighted, ByLength])
@pytest.mark.parametrize(("processes", "accumulation"), CUTS)
def test_any_cut_takes_the_same_global_batches_and_weights(kind, processes, accumulation):
    alone, cut = make(61, 12, kind=kind), make(61, 12, processes, accumulation, kind=kind)
    for (positions, factors), (cut_positions, cut_factors) in zip(steps(alone, 0, 13), steps(cut, 0, 13), strict=True):
        assert torch.equal(positions, cut_positions)
        torch.testing.assert_close(cut_factors / (processes * accumulation), factors)


@pytest.mark.parametrize("kind", [Numbers, Weighted])
@pytest.mark.parametrize(("processes", "accumulation"), CUTS)
def test_factors_give_the_weighted_mean_of_the_global_batch(kind, processes, accumulation):
    one = make(61, 12, processes, accumulation, kind)
    losses = torch.rand(61, generator=torch.Generator().manual_seed(0))
    for step, (positions, factors) in enumerate(steps(one, 0, 12)):
        mean = (losses[positions % 61] * factors).sum() / (processes * accumulation)  # as DDP and accumulation divide
        rows = one.permutation(step // 6)[step % 6 * 12 :][:12]
        weights = one.dataset.weights(rows) if kind is Weighted else torch.ones(len(rows))
        total = weights.sum()
        torch.testing.assert_close(mean, (losses[rows] * weights).sum() / total if total else torch.tensor(0.0))


def test_the_last_batch_is_filled_with_weight_zero():
    positions, factors = steps(make(61, 12), 5, 6)[0]
    assert len(positions) == 12
    assert factors.tolist() == [1.0] + [0.0] * 11  # 61 = 5 x 12 + 1


def test_a_batch_of_weight_zero_counts_nothing():
    class Nothing(Numbers):
        def weights(self, indices: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(indices))

    for _, factors in steps(make(30, 12, kind=Nothing), 0, 3):
        assert (factors == 0).all()


@pytest.mark.parametrize("kind", [Numbers, Weighted, ByLength])
@pytest.mark.parametrize("first", [1, 5, 6, 7, 17])
def test_resuming_at_a_step_is_the_tail(kind, first):
    one = make(61, 12, 2, 3, kind)
    for (positions, factors), (later, later_factors) in zip(steps(one, 0, 20)[first:], steps(one, first, 20), strict=True):
        assert torch.equal(positions, later)
        assert torch.equal(factors, later_factors)


def test_epochs_and_seeds_differ():
    orders = [tuple(make(61, 12, seed=seed).permutation(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_overfit_repeats_the_first_samples():
    one = Order(Numbers(61), 7, 4, plan(4), 0)
    assert one.steps_per_epoch == 2
    found = [(positions % 61)[factors > 0].tolist() for positions, factors in steps(one, 0, 6)]
    for epoch in range(3):
        assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(7))
    assert sorted(Order(ByLength(61), 7, 4, plan(4), 0).permutation(0).tolist()) == list(range(7))


@pytest.mark.parametrize("samples", [1, 4, 5, 799, 800, 801, 2003])
def test_batches_of_similar_length_hold_each_sample_once(samples):
    """Windows are of 50 batches of 4 = 200 samples."""
    one = make(samples, 4, kind=ByLength)
    for epoch in (0, 3):
        assert sorted(one.permutation(epoch).tolist()) == list(range(samples))
    assert torch.equal(one.permutation(2), make(samples, 4, 2, 1, kind=ByLength).permutation(2))


def test_lengths_within_a_batch_are_alike_and_batches_come_in_any_order():
    one = make(2003, 4, kind=ByLength)
    lengths = one.dataset.lengths
    batches = [lengths[batch] for batch in one.permutation(0).split(4)]
    assert len(batches[-1]) == 3 and all(len(batch) == 4 for batch in batches[:-1])
    assert sum(float(batch.max() - batch.min()) for batch in batches) / len(batches) < 4  # at random: about 38
    means = torch.stack([batch.float().mean() for batch in batches])
    assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(len(means)).float()]))[0, 1])) < 0.15
    assert not torch.equal(one.permutation(0), one.permutation(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_order_and_leaves_the_random_numbers_alone(workers):
    one = make(61, 12, 2, 2)
    before = torch.get_rng_state()
    batches = list(order.loader(one, 1, 3, 8, workers))
    assert torch.equal(torch.get_rng_state(), before)
    for batch, (positions, factors) in zip(batches, one.batches(1, 3, 8), strict=True):
        assert torch.equal(batch["position"], positions)
        assert torch.equal(batch["factor"], factors)


def test_seeds_never_meet():
    seeds = {order.seed_of(seed, step, micro, rank) for seed in range(4) for step in range(50) for micro in range(4) for rank in range(4)}
    assert len(seeds) == 4 * 50 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert order.seed_of(1, "epoch", 2) == order.seed_of(1, "epoch", 2)


def test_seeding_fixes_dropout():
    def mask() -> torch.Tensor:
        return torch.nn.functional.dropout(torch.ones(64))

    order.seed_everything(0, 3, 0, 0)
    first = mask()
    assert not torch.equal(mask(), first)
    order.seed_everything(0, 3, 0, 1)
    assert not torch.equal(mask(), first)
    order.seed_everything(0, 3, 0, 0)
    assert torch.equal(mask(), first)
