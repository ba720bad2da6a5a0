"""The pulse: shapes, losses, and real recordings."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import commands
from data import Info
from engine.config import UserError
from models import pulse
from models.pulse import BINS, Config, Model


def info(*shape: int) -> Info:
    return Info("regression", 1, more={"signal": list(shape), "rate": 50.0})


@pytest.mark.parametrize("shape", [(2, 400), (3, 6, 64)])
@pytest.mark.parametrize("backbone", ["spectrum", "residual"])
@pytest.mark.parametrize(("recurrent", "layers", "bidirectional"), [("none", 1, False), ("gru", 1, True), ("lstm", 2, False)])
def test_output_shapes(shape: tuple[int, ...], backbone: str, recurrent: str, layers: int, bidirectional: bool) -> None:
    config = Config(name="pulse", backbone=backbone, width=8, depth=2, recurrent=recurrent, layers=layers, bidirectional=bidirectional)
    model = Model(config, info(*shape))
    batch = {"signal": torch.randn(4, 3, *shape)}
    assert model(batch).shape == (4, 3, 1 + BINS)
    model.eval()
    whole, part = model(batch), model({"signal": batch["signal"][:2]})
    assert whole.shape == (4, 1 + BINS) and torch.allclose(whole[:2], part, atol=1e-3)
    assert ((whole[:, 0] > pulse.SLOWEST) & (whole[:, 0] < pulse.FASTEST)).all()


def test_it_needs_signals() -> None:
    with pytest.raises(UserError, match=r'data.name = "signals"'):
        Model(Config(name="pulse"), Info("regression", 1))


def output_at(rate: float, width: float = 1.0) -> torch.Tensor:
    """[1, 1 + BINS]: a distribution around a rate."""
    logits = -0.5 * ((pulse.rates() - rate) / width) ** 2
    return torch.cat([(logits.softmax(-1) @ pulse.rates())[None], logits])[None]


def test_label_distribution_is_least_at_the_truth() -> None:
    batch = {"target": torch.tensor([100.0])}
    values = [float(pulse.label_distribution(output_at(rate, 4.0), batch, None)) for rate in (80, 90, 100, 110)]
    assert values[2] == min(values) and values[2] < 1e-4 and values[0] > values[1] > 1
    parts = [float(pulse.label_distribution(output_at(90), batch, None, **{name: 2.0}, **{"distribution": 0.0} if name != "distribution" else {}))
             for name in ("distribution", "spectrum", "distance")]  # fmt: skip
    together = float(pulse.label_distribution(output_at(90), batch, None, distribution=2.0, spectrum=2.0, distance=2.0))
    assert sum(parts) == pytest.approx(together) and min(parts) > 0


def test_parts_of_the_loss_rise_over_epochs() -> None:
    batch = {"target": torch.tensor([100.0])}

    def value(epoch: float) -> float:
        return float(pulse.label_distribution(output_at(90), batch, SimpleNamespace(epoch=epoch), distance=1.0, ramp=4.0))

    assert value(0) < value(2) < value(4) == value(9)
    assert value(2) - value(0) == pytest.approx(10 / 4.0 / 2, rel=1e-2)


@pytest.mark.parametrize("name", ["label_distribution", "mse", "negative_pearson"])
def test_clips_beyond_the_recording_do_not_count(name: str) -> None:
    output = torch.cat([output_at(rate) for rate in (70, 90, 120, 110)]).view(2, 2, -1)
    targets = torch.tensor([[75.0, 80.0], [torch.nan, 140.0]])
    loss = getattr(pulse, name)
    before = loss(output, {"targets": targets}, None)
    other = output.clone()
    other[1, 0] = output_at(200)[0]
    assert before.isfinite().all() and torch.equal(before, loss(other, {"targets": targets}, None))
    assert before.shape == (() if name == "negative_pearson" else (2,))


def test_negative_pearson_knows_a_straight_line() -> None:
    output = torch.cat([output_at(rate) for rate in (70, 90, 110)])
    for factor, wanted in ((1.0, 0.0), (-1.0, 2.0)):
        assert float(pulse.negative_pearson(output, {"target": factor * output[:, 0]}, None)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.long
@pytest.mark.skipif("PLAINLOOP_DATA" not in os.environ, reason="PLAINLOOP_DATA is unset: the public data sets are not here")
def test_runners_never_seen(tmp_path: Path) -> None:
    more = {"PLAINLOOP_DATA": os.environ["PLAINLOOP_DATA"]}
    out = commands.succeed("train.py", "--config", commands.ROOT / "conf" / "ppg.toml", "run.dir=run", folder=tmp_path, **more)
    assert float(out.split("\ntest: ")[-1].split("mae ")[1].split()[0]) <= 8
