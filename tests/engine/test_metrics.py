"""Scores equal scikit-learn's on uneven parts, for one process and for two."""

import math
import types

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.preprocessing import label_binarize
from torch import nn

import ranks
from data import Info
from data._dataset import TableDataset
from engine import metrics
from engine.config import UserError
from engine.evaluate import Scorer, evaluate
from engine.settings import Task

EMPTY = types.SimpleNamespace(__name__="models.empty")
INFOS = {
    "binary": Info("binary", 1, ["no", "yes"]),
    "multiclass": Info("multiclass", 4, ["a", "b", "c", "d"]),
    "regression": Info("regression", 1, target_mean=1e4, target_std=3.0),
}
# Rows in batches of 8: the last one uneven, a second process without a row in it, or without any row at all.
SIZES = [61, 72, 65, 6]


class Given(nn.Module):
    """A model whose outputs are in the batch."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["output"]


def table(kind: str, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    if kind == "regression":
        target = torch.randn(rows, generator=generator)
        return {"target": target, "output": target + 0.3 * torch.randn(rows, generator=generator)}
    classes = INFOS[kind].outputs
    target = torch.arange(rows) % max(2, classes)
    noise = torch.randn(rows, classes, generator=generator)
    if kind == "binary":
        return {"target": target.float(), "output": (target - 0.4 + noise[:, 0]).round(decimals=1)}  # with ties
    return {"target": target, "output": nn.functional.one_hot(target, classes) + noise}


def expected(kind: str, rows: int) -> dict[str, float]:
    """By scikit-learn."""
    columns = table(kind, rows)
    output, target = columns["output"].double(), columns["target"].numpy()
    if kind == "regression":
        truth, guess = target.astype(float) * 3 + 1e4, output.numpy() * 3 + 1e4
        return {
            "loss": sk.mean_squared_error(target, output),
            "rmse": sk.root_mean_squared_error(truth, guess),
            "mse": sk.mean_squared_error(truth, guess),
            "mae": sk.mean_absolute_error(truth, guess),
            "r2": sk.r2_score(truth, guess),
            "pearson": np.corrcoef(truth, guess)[0, 1],
        }
    if kind == "binary":
        chances = output.sigmoid().numpy()
        guess = (chances > 0.5).astype(int)
        scores = {
            "loss": sk.log_loss(target, chances, labels=[0, 1]),
            "f1": sk.f1_score(target, guess),
            "precision": sk.precision_score(target, guess),
            "recall": sk.recall_score(target, guess),
            "auroc": sk.roc_auc_score(target, chances),
            "average_precision": sk.average_precision_score(target, chances),
        }
    else:
        chances = output.softmax(1).numpy()
        guess = chances.argmax(1)
        each = label_binarize(target, classes=range(4))
        scores = {
            "loss": sk.log_loss(target, chances, labels=range(4)),
            "auroc": sk.roc_auc_score(target, chances, multi_class="ovr", average="macro"),
            "average_precision": sk.average_precision_score(each, chances, average="macro"),
        }
    return scores | {
        "accuracy": sk.accuracy_score(target, guess),
        "macro_accuracy": sk.balanced_accuracy_score(target, guess),
        "macro_f1": sk.f1_score(target, guess, average="macro"),
    }


def scored(kind: str, rows: int) -> dict[str, float]:
    names = list(metrics.NAMED[kind])
    scorer = Scorer(Task(metrics=names, best=f"max {names[0]}"), INFOS[kind], EMPTY, torch.device("cpu"))
    return evaluate(Given(), TableDataset(table(kind, rows)), scorer, 8)


def all_scores() -> dict[tuple[str, int], dict[str, float]]:
    return {(kind, rows): scored(kind, rows) for kind in INFOS for rows in SIZES}


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory) -> list[dict[tuple[str, int], dict[str, float]]]:
    return ranks.together(all_scores, folder=tmp_path_factory.mktemp("scores"))


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", INFOS)
def test_scores_equal_scikit_learns(kind, rows):
    assert scored(kind, rows) == pytest.approx(expected(kind, rows), rel=1e-6)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", INFOS)
def test_two_processes_have_the_same_scores(on_two_processes, kind, rows):
    first, second = (scores[kind, rows] for scores in on_two_processes)
    assert first == second
    assert first == pytest.approx(expected(kind, rows), rel=1e-6)


def test_the_loss_is_weighted_and_the_scores_are_not():
    columns, weights = table("multiclass", 61), torch.arange(61) % 3.0
    scorer = Scorer(Task(), INFOS["multiclass"], EMPTY, torch.device("cpu"))
    found = evaluate(Given(), TableDataset(columns, None, weights), scorer, 8)
    chances = columns["output"].double().softmax(1).numpy()
    assert found["loss"] == pytest.approx(sk.log_loss(columns["target"], chances, sample_weight=weights, labels=range(4)), rel=1e-6)
    assert found["accuracy"] == sk.accuracy_score(columns["target"], chances.argmax(1))


def test_weights_of_zero_give_no_loss():
    scorer = Scorer(Task(), INFOS["regression"], EMPTY, torch.device("cpu"))
    found = evaluate(Given(), TableDataset(table("regression", 6), None, torch.zeros(6)), scorer, 8)
    assert math.isnan(found["loss"])


@pytest.mark.parametrize("kind", INFOS)
def test_an_output_that_is_no_number_gives_no_score(kind):
    columns = table(kind, 61)
    columns["output"][3] = math.nan
    scorer = Scorer(Task(), INFOS[kind], EMPTY, torch.device("cpu"))
    assert all(map(math.isnan, evaluate(Given(), TableDataset(columns), scorer, 8).values()))
    assert not any(map(math.isnan, evaluate(Given(), TableDataset(table(kind, 61)), scorer, 8).values()))  # and is forgotten


def test_one_row_has_scores_without_an_error():
    for kind, info in INFOS.items():
        scorer = Scorer(Task(), info, EMPTY, torch.device("cpu"))
        found = evaluate(Given(), TableDataset(table(kind, 1)), scorer, 8)
        assert math.isfinite(found["loss"])


def test_sums_over_many_rows_stay_exact():
    rows = 1_000_000
    columns = {"target": torch.zeros(rows), "output": torch.full((rows,), 0.1)}
    scorer = Scorer(Task(), Info("regression", 1), EMPTY, torch.device("cpu"))
    assert evaluate(Given(), TableDataset(columns), scorer, 100_000)["mae"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-9)


@pytest.mark.parametrize(
    ("direction", "score", "best", "min_delta", "improved"),
    [
        ("max", 0.5, None, 0.0, True),
        ("max", 0.5, 0.5, 0.0, False),
        ("max", 0.6, 0.5, 0.1, False),  # by more than min_delta
        ("max", 0.75, 0.5, 0.125, True),
        ("min", 0.5, 0.6, 0.0, True),
        ("min", 0.5, 0.5, 0.0, False),
        ("min", 0.375, 0.5, 0.125, False),
        ("max", math.nan, 0.5, 0.0, False),
        ("min", math.nan, 0.5, 0.0, False),
    ],
)
def test_an_improvement_is_more_than_min_delta(direction, score, best, min_delta, improved):
    assert metrics.better(direction, score, best, min_delta) is improved


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ({}, ["rmse", "mae", "r2"]),
        ({"metrics": ["mae"]}, ["mae", "rmse"]),  # the one that decides is always there
        ({"metrics": ["mae"], "best": "min loss"}, ["mae"]),
        ({"metrics": ["mae"], "best": "max r2"}, ["mae", "r2"]),
    ],
)
def test_the_score_that_decides_is_among_them(task, names):
    assert metrics.names(Task(**task), INFOS["regression"], EMPTY) == names


@pytest.mark.parametrize(
    ("kind", "task", "line"),
    [
        ("binary", {"metrics": ["acuracy"]}, r"task\.metrics = 'acuracy': no metric of a binary task; did you mean accuracy\?"),
        ("binary", {"best": "max rmse"}, r"task\.best = 'rmse': no metric of a binary task"),
        ("regression", {"metrics": ["accuracy"]}, r"task\.metrics = 'accuracy': no metric of a regression task"),
    ],
)
def test_a_metric_of_another_kind_is_refused(kind, task, line):
    with pytest.raises(UserError, match=line):
        metrics.names(Task(**task), INFOS[kind], EMPTY)


def test_a_models_file_brings_metrics_and_kinds():
    from torchmetrics.regression import MeanAbsoluteError

    rating = metrics.Kind("mse", ("off",), "min off", lambda output, info: output.round())
    own = types.SimpleNamespace(__name__="models.own", KINDS={"rating": rating}, off=lambda info: MeanAbsoluteError())
    scorer = Scorer(Task(), Info("rating", 1), own, torch.device("cpu"))
    columns = {"target": torch.tensor([1.0, 2.0, 3.0]), "output": torch.tensor([1.4, 2.4, 2.0])}
    assert evaluate(Given(), TableDataset(columns), scorer, 2)["off"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=r"task\.kind = 'ratings': no such kind; did you mean rating\?"):
        metrics.kind_of("ratings", own)
