"""TabM: its members' losses, their mean, the kinds of tasks and embeddings, and runs of the scripts."""

import json
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import commands
from data import Info
from engine import losses
from engine.config import UserError
from engine.optim import parameter_groups
from models import tabm
from models.tabm import Config, Model, averaged

SMALL = {"name": "tabm", "members": 3, "width": 8, "depth": 1, "dropout": 0.0, "embedding": 4, "bins": 5}
QUANTILES = {"quantiles": [torch.linspace(-2, 2, 257).tolist(), torch.linspace(-1, 3, 257).tolist()]}
INFOS = {
    "binary": Info("binary", 1, ["no", "yes"], 2, [3, 4], more=QUANTILES),
    "multiclass": Info("multiclass", 3, ["a", "b", "c"], 2, [3, 4], more=QUANTILES),
    "regression": Info("regression", 1, [], 2, [3, 4], more=QUANTILES),
}
TOML = """
[data]
name = "table"
train = "train.csv"
target = "y"
numeric_transform = "quantile"
[model]
name = "tabm"
members = 4
width = 16
depth = 1
bins = 6
[train]
epochs = 2
batch_size = 32
save_every = 1
keep_last = 100
"""


def batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(size, (count,), generator=generator) for size in (3, 4)]
    return {"numeric": torch.randn(count, 2, generator=generator), "categorical": torch.stack(words, dim=1)}


@pytest.mark.parametrize("architecture", ["tabm", "tabm-mini", "tabm-packed"])
@pytest.mark.parametrize("numbers", ["plain", "piecewise", "periodic"])
@pytest.mark.parametrize("kind", INFOS)
def test_training_gives_every_member_and_evaluation_their_mean(kind, numbers, architecture):
    torch.manual_seed(0)
    info = INFOS[kind]
    model = Model(Config(**SMALL, numbers=numbers, architecture=architecture), info)
    classes = (3,) if kind == "multiclass" else ()
    each = model.train()(batch(7))
    assert each.shape == (7, 3, *classes)
    assert (each.std(1) > 0).all()  # the members differ
    mean = model.eval()(batch(7))
    assert mean.shape == (7, *classes) and mean.dtype == torch.float32
    expected = {
        "binary": lambda: each.sigmoid().mean(1),
        "multiclass": lambda: each.softmax(-1).mean(1),
        "regression": lambda: each.mean(1),
    }[kind]()
    shares = {"binary": torch.sigmoid, "multiclass": lambda output: output.softmax(-1), "regression": lambda output: output}[kind](mean)
    torch.testing.assert_close(shares, expected)


def test_a_column_of_one_value_and_gaps_has_a_bin():
    info = Info("binary", 1, ["no", "yes"], 1, more={"quantiles": [[0.0] * 257]})
    model = Model(Config(**SMALL), info).train()
    assert model({"numeric": torch.tensor([[0.0], [3.0]])}).isfinite().all()


def test_averages_by_hand():
    two = torch.log(torch.tensor([[1 / 4, 4 / 1]]))  # probabilities 1/5 and 4/5, their mean 1/2
    assert averaged(two, "binary").item() == pytest.approx(0, abs=1e-6)
    three = torch.log(torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]]]))
    torch.testing.assert_close(averaged(three, "multiclass").exp(), torch.tensor([[0.3, 0.3, 0.4]]))
    assert averaged(torch.tensor([[1.0, 2.0, 6.0]]), "regression").item() == 3
    # Where a probability rounds to 1: -log(mean of e^-60 and e^-40) = 40 + log 2 but for rounding.
    assert averaged(torch.tensor([[60.0, 40.0]]), "binary").item() == pytest.approx(40 + np.log(2), rel=1e-6)


def test_a_samples_loss_is_the_mean_of_its_members_losses():
    torch.manual_seed(1)
    output, logits = torch.randn(5, 3), torch.randn(5, 3, 4)
    target, classes = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([3, 0, 1, 1, 2])
    cases = [("bce", output, target, {"label_smoothing": 0.2}), ("mse", output, target, {}), ("huber", output, target, {"delta": 0.5})]
    cases += [("l1", output, target, {}), ("cross_entropy", logits, classes, {"label_smoothing": 0.1})]
    for name, given, truth, options in cases:
        ours, plain = getattr(tabm, name), getattr(losses, name)
        members = torch.stack([plain(given[:, member], {"target": truth}, None, **options) for member in range(3)], dim=1)
        torch.testing.assert_close(ours(given, {"target": truth}, None, **options), members.mean(1))
        # In evaluation there is one output a row.
        torch.testing.assert_close(ours(given[:, 0], {"target": truth}, None, **options), members[:, 0])
    assert {name for name, *_ in cases} == set(losses.NAMES)  # none of the losses would compare members with rows
    # Not the loss of the mean, which would train the members to make up for one another.
    assert not torch.allclose(tabm.mse(output, {"target": target}, None), functional.mse_loss(output.mean(1), target, reduction="none"))


def test_a_member_learns_from_its_own_loss_alone():
    model = Model(Config(**SMALL, architecture="tabm-packed"), INFOS["regression"]).train()
    model(batch(6))[:, 1].sum().backward()
    weights = model.net.output.weight
    assert weights.grad[1].abs().sum() > 0
    assert weights.grad[[0, 2]].abs().sum() == 0


def test_piecewise_embeddings_are_cut_at_the_quantiles_and_not_all_decayed():
    model = Model(Config(**SMALL), INFOS["binary"])
    names = dict(model.named_parameters())
    assert "net.num_module.linear0.weight" in model.not_decayed < names.keys()
    repeated = Info("binary", 1, ["no", "yes"], 1, more={"quantiles": [[0.0] * 200 + [1.0] * 57]})  # one bin is left of five
    assert Model(Config(**SMALL), repeated)({"numeric": torch.tensor([[0.0], [0.5], [1.0]])}).shape == (3, 3)


@pytest.mark.parametrize(("architecture", "adapters"), [("tabm", ["r", "s"]), ("tabm-mini", []), ("tabm-packed", [])])
@pytest.mark.parametrize("numbers", ["plain", "piecewise", "periodic"])
def test_what_is_decayed_is_what_the_authors_decay(numbers, architecture, adapters):
    """Weights and adapters; no biases, though they have a row for each member, no frequencies, no linear part of piecewise embeddings."""
    model = Model(Config(**SMALL, numbers=numbers, architecture=architecture), INFOS["binary"])
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    names = {name.removeprefix("net.") for name, parameter in model.named_parameters() if id(parameter) in decayed}
    wanted = {"output.weight", *(f"backbone.blocks.0.0.{name}" for name in ["weight", *adapters])}
    wanted |= {"backbone.affine.weight"} if architecture == "tabm-mini" else set()
    assert names == (wanted if numbers == "plain" else wanted | {"num_module.linear.weight"})


def test_what_it_cannot_be_built_for_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="set data\\.numeric_transform"):
        Model(Config(**SMALL), Info("binary", 1, numeric=2))
    with pytest.raises(UserError, match="neither"):
        Model(Config(**SMALL), Info("binary", 1))
    for name in ("tabm", "rtdl_num_embeddings"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)  # as where it is not installed
            with pytest.raises(UserError, match=f"pip install {name}"):
                Model(Config(**SMALL), INFOS["binary"])


def test_a_run_killed_and_resumed_is_the_straight_one_and_predicts(tmp_path):
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"a": generator.normal(size=300), "b": generator.integers(0, 9, 300), "c": generator.choice(["x", "y"], 300)})
    table.loc[::17, "a"] = np.nan
    table["y"] = (table.a.fillna(0) + (table.c == "x") + 0.1 * generator.normal(size=300)).round(4)
    table.to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "tabm.toml").write_text(TOML)
    words = ["--config", tmp_path / "tabm.toml", f"data.root={tmp_path}"]
    stopped = commands.run("tests/child.py", *words, "run.dir=killed", folder=tmp_path, KILL="step/8/0/rank", KILLS=str(tmp_path / "kills"))
    assert stopped.status == -signal.SIGKILL, stopped.text
    lines = [["train.py", *words, "run.dir=killed"], ["train.py", *words, "run.dir=straight"]]
    lines += [["infer.py", "killed", "--split", "test"], ["infer.py", "killed", "--input", "train.csv", "--output", "out.csv"]]
    lines += [["train.py", *words, "run.dir=scaled", "data.numeric_transform=standard"]]
    ended = commands.many(lines, tmp_path)
    assert [end.status for end in ended] == [0, 0, 0, 0, 2], [end.text for end in ended]
    last = sorted(path.name for path in (tmp_path / "straight/checkpoints").iterdir())[-1]
    killed, straight = (load_file(tmp_path / name / "checkpoints" / last / "model.safetensors") for name in ("killed", "straight"))
    assert all(torch.equal(killed[name], value) for name, value in straight.items())
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "straight")]
    assert results[0]["test"] == results[1]["test"] and results[0]["best"] == results[1]["best"]
    assert f"rmse {results[0]['test']['rmse']:.4g}"[:9] in ended[2].out
    assert np.isfinite(pd.read_csv(tmp_path / "out.csv").prediction).all()
    assert ended[4].errors.count("\n") == 1 and "numeric_transform" in ended[4].errors
