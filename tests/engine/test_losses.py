"""Losses: one value a sample, equal to torch's, and a mean over the global batch that does not depend on its cut."""

import types

import pytest
import torch
import torch.nn.functional as F

from data import Info
from engine import losses
from engine.config import UserError
from engine.order import Order
from engine.settings import Plan, Task

BINARY, CLASSES, REGRESSION = Info("binary", 1, ["no", "yes"]), Info("multiclass", 3, ["a", "b", "c"]), Info("regression", 1)
EMPTY = types.SimpleNamespace(__name__="models.empty")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("info", "task", "expected"),
    [
        (BINARY, {}, lambda o, t: F.binary_cross_entropy_with_logits(o, t)),
        (BINARY, {"loss": "bce", "loss_options": {"label_smoothing": 0.2}}, lambda o, t: F.binary_cross_entropy_with_logits(o, t * 0.8 + 0.1)),
        (CLASSES, {}, lambda o, t: F.cross_entropy(o, t)),
        (CLASSES, {"loss_options": {"label_smoothing": 0.1}}, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)),
        (REGRESSION, {}, lambda o, t: F.mse_loss(o, t)),
        (REGRESSION, {"loss": "huber", "loss_options": {"delta": 0.5}}, lambda o, t: F.huber_loss(o, t, delta=0.5)),
        (REGRESSION, {"loss": "l1"}, lambda o, t: F.l1_loss(o, t)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_one_value_a_sample_whose_mean_is_torchs(info, task, expected, dtype):
    output = numbers(7, 3) if info is CLASSES else numbers(7)
    target = {"binary": torch.arange(7) % 2.0, "multiclass": torch.arange(7) % 3, "regression": numbers(7) * 2}[info.kind]
    output = output.to(dtype)
    values = losses.build(Task(**task), info, EMPTY)(output, {"target": target}, None)
    assert values.shape == (7,)
    assert values.dtype == torch.float32  # also of outputs in 16 bits
    torch.testing.assert_close(values.mean(), expected(output.float(), target))


def test_a_large_logit_has_a_finite_loss():
    values = losses.build(Task(), BINARY, EMPTY)(torch.tensor([1e4, -1e4]), {"target": torch.tensor([0.0, 0.0])}, None)
    assert values.tolist() == [1e4, 0.0]


def test_the_models_file_comes_first():
    own = types.SimpleNamespace(__name__="models.own", mse=lambda output, batch, progress, *, scale=2.0: scale * output)
    assert losses.build(Task(), REGRESSION, own)(torch.ones(2), {}, None).tolist() == [2.0, 2.0]
    assert losses.build(Task(loss_options={"scale": 3.0}), REGRESSION, own)(torch.ones(2), {}, None).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"loss": "crossentropy"}, r"task\.loss = 'crossentropy': no such loss in models\.empty or engine/losses\.py; did you mean cross_entropy\?"),
        ({"loss": "build"}, r"task\.loss = 'build': no such loss"),
        ({"loss": "mse", "loss_options": {"delta": 1}}, r"task\.loss_options\.delta: mse has no such option"),
        ({"loss_options": {"smoothing": 1}}, r"task\.loss_options\.smoothing: cross_entropy has no such option; did you mean label_smoothing\?"),
    ],
)
def test_what_is_not_there_is_refused(task, line):
    with pytest.raises(UserError, match=line):
        losses.build(Task(**task), CLASSES, EMPTY)


def test_a_coupled_loss_is_taken_as_it_is():
    assert losses.weighted(torch.tensor(3.0), torch.zeros(4)) == 3.0


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("samples", [24, 61])
def test_gradients_are_those_of_the_weighted_mean_however_the_batch_is_cut(processes, accumulation, samples):
    inputs, target, weights = numbers(samples, 3), numbers(samples), torch.rand(samples) + 0.1

    class Data:
        def __len__(self) -> int:
            return samples

        def weights(self, rows: torch.Tensor) -> torch.Tensor:
            return weights[rows]

    sequence = Order(Data(), samples, 24, Plan(24 // processes // accumulation, processes, accumulation), 0)
    for step in range(sequence.steps_per_epoch):
        cut = torch.zeros(3, requires_grad=True)
        for rank in range(processes):
            for positions, factor in sequence.batches(rank, step, step + 1):
                values = losses.mse(inputs[positions] @ cut, {"target": target[positions]}, None)
                (losses.weighted(values, factor) / processes / accumulation).backward()
        rows = sequence.permutation(0)[24 * step : 24 * (step + 1)]
        whole = torch.zeros(3, requires_grad=True)
        ((inputs[rows] @ whole - target[rows]) ** 2 * weights[rows]).sum().div(weights[rows].sum()).backward()
        torch.testing.assert_close(cut.grad, whole.grad)
