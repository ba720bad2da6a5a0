"""Evaluation visits every row once, on any number of processes, and leaves the model as it was."""

import types

import pytest
import torch
from torch import nn

import ranks
from data import Info
from data._dataset import TableDataset
from engine import evaluate
from engine.settings import Task

CPU = torch.device("cpu")
SIZES = [1, 7, 8, 9, 16, 17, 61]


class Counting(nn.Module):
    """Doubles the row's number, and counts its calls. Dropout would show if it were training."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return self.dropout(self.weight * batch["number"])


def rows(count: int) -> TableDataset:
    return TableDataset({"number": torch.arange(count, dtype=torch.float32)})


def visited(count: int, indices: torch.Tensor | None = None) -> tuple[list[tuple[int, list[float], list[int]]], int]:
    """(place, outputs, indices) of each batch, and the number of calls."""
    model = Counting()
    found = [(place, output.tolist(), batch["index"].tolist()) for place, output, batch in evaluate.outputs(model, rows(count), 8, CPU, indices)]
    return found, model.calls


def all_visited() -> dict[int, tuple[list[tuple[int, list[float], list[int]]], int]]:
    return {count: visited(count) for count in SIZES}


@pytest.mark.parametrize("count", SIZES)
def test_one_process_sees_every_row_once_in_order(count):
    found, calls = visited(count)
    assert [one for _, _, indices in found for one in indices] == list(range(count))
    assert [one for _, outputs, _ in found for one in outputs] == [2.0 * number for number in range(count)]
    assert [place for place, _, _ in found] == list(range(0, count, 8))
    assert calls == len(found)


def test_chosen_rows_come_in_the_order_given():
    found, _ = visited(61, torch.tensor([60, 3, 3, 0, 17, 5, 6, 7, 9, 1]))
    assert [one for _, _, indices in found for one in indices] == [60, 3, 3, 0, 17, 5, 6, 7, 9, 1]
    assert [place for place, _, _ in found] == [0, 8]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_share_the_rows_and_call_equally_often(tmp_path, processes):
    found = ranks.together(all_visited, folder=tmp_path, processes=processes)
    for count in SIZES:
        parts = sorted(part for each in found for part in each[count][0])
        assert [one for _, _, indices in parts for one in indices] == list(range(count))
        assert [one for _, outputs, _ in parts for one in outputs] == [2.0 * number for number in range(count)]
        assert len({each[count][1] for each in found}) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_gets_no_gradient(training):
    model = Counting().train(training)
    for _, output, _ in evaluate.outputs(model, rows(20), 8, CPU):
        assert not output.requires_grad
    assert model.training is training
    assert torch.is_grad_enabled()


def test_a_scorer_forgets_what_it_has_scored():
    class Numbers(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["number"]

    scorer = evaluate.Scorer(Task(), Info("regression", 1), types.SimpleNamespace(__name__="models.empty"), CPU)
    near = TableDataset({"number": torch.arange(9.0), "target": torch.arange(9.0) + 1})
    far = TableDataset({"number": torch.arange(9.0), "target": torch.arange(9.0) + 3})
    found = [evaluate.evaluate(Numbers(), data, scorer, 4)["mae"] for data in (near, far, near)]
    assert found == pytest.approx([1, 3, 1])


def test_a_coupled_loss_counts_by_rows():
    own = types.SimpleNamespace(__name__="models.own", spread=lambda output, batch, progress: output.max() - output.min())
    scorer = evaluate.Scorer(Task(loss="spread"), Info("regression", 1), own, CPU)
    for values in (torch.tensor([0.0, 3.0, 1.0]), torch.tensor([5.0])):
        scorer.add(values, {"target": values}, None)
    assert scorer.compute()["loss"] == pytest.approx(3 * 3 / 4)
