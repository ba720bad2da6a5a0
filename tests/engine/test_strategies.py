"""Every strategy computes the same, and any of them goes on where another one stopped, on any number of processes."""

import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import launch
from soak import KINDS, Kind, differences

ONE, DDP, ZERO3 = KINDS
ZERO2 = Kind("zero2 x 2", 2, "zero2")
PLAIN = ("model.dropout=0", "train.log_every=1")
"""dropout masks differ from rank to rank, and so with the number of ranks"""


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 2e-2, marks=pytest.mark.slow)])
def test_losses_agree(tmp_path, precision, tolerance):
    words = (*PLAIN, "train.steps=100", "train.eval_every=100", "train.save_every=100", f"train.precision={precision}")
    kinds = [ONE, DDP, ZERO2, ZERO3]
    for kind in kinds:
        kind.start(tmp_path / kind.name, *words).succeed()
    straight = losses(tmp_path / ONE.name)
    assert len(straight) == 100
    assert straight[-1] < 0.7 * straight[0]
    for kind in kinds[1:]:
        apart = max(abs(one - other) for one, other in zip(straight, losses(tmp_path / kind.name), strict=True))
        print(f"{precision}, {kind.name}: losses at most {apart:.1e} from one process")
        assert apart <= tolerance


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([DDP, ONE, DDP], id="ddp 2-1-2"),
        pytest.param([DDP, ZERO3, ONE], id="ddp to zero3-offload to one process"),
        pytest.param([ZERO3, Kind("", 1, "zero3-offload"), ZERO3], id="zero3-offload 2-1-2", marks=pytest.mark.slow),
        pytest.param([ZERO2, ZERO3, ZERO2], id="zero2 to zero3-offload and back", marks=pytest.mark.slow),
    ],
)
def test_changed_in_mid_epoch(tmp_path, kinds):
    """Each sample comes once an epoch, and the end is that of the run that never changed."""
    straight, run, positions = tmp_path / "straight", tmp_path / "run", tmp_path / "positions"
    positions.mkdir()
    kinds[0].start(straight, *PLAIN, "train.steps=38").succeed()
    text = ""
    for kind, steps in zip(kinds, (11, 25, 38), strict=True):
        text = kind.start(run, *PLAIN, f"train.steps={steps}", POSITIONS=str(positions)).succeed()
    assert "converted epoch=001-step=00000025 from" in text
    seen = sorted(int(word) for file in positions.iterdir() for word in file.read_text().split())
    assert seen == list(range(2 * 1168))
    apart = max(abs(one - other) for one, other in zip(losses(straight), losses(run), strict=True))
    print(f"{' -> '.join(kind.name for kind in kinds)}: losses at most {apart:.1e} from the straight run")
    assert apart <= 1e-3


def test_mean_loss_over_a_change(tmp_path):
    """The logged line that spans the change is the mean of all its steps."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    words = ("model.dropout=0", "train.log_every=12")
    DDP.start(straight, *words).succeed()
    stopped = DDP.start(run, *words, KILL="step/18/0/rank", KILLS=str(tmp_path / "kills"), SIGNAL="SIGTERM")
    assert stopped.wait() == 1
    assert "resumed" in ONE.start(run, *words).succeed()
    assert losses(run) == pytest.approx(losses(straight), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ddp", ["train.precision=bf16", "optim.name=SGD", "optim.options={momentum=0.9}"]),
        ("ddp", ["optim.name=NAdam", "train.workers=2"]),
        ("zero2", ["optim.name=SGD", "optim.options={momentum=0.9, nesterov=true}"]),
        ("zero2-offload", ["train.precision=bf16"]),
        ("zero3", ["train.precision=bf16", "strategy.sharded_init=true"]),
        ("zero3-offload", ["train.precision=bf16"]),
        ("zero3-offload", ["optim.name=NAdam"]),
    ],
)
def test_exact_after_a_kill(tmp_path, name, words):
    """Strategies, precisions and optimizers with more state than a moment of each weight."""
    kind = Kind(name, 2, name)
    run, straight = tmp_path / "run", tmp_path / "straight"
    kind.start(straight, *words).succeed()
    assert kind.start(run, *words, KILL="step/13/1/launcher", KILLS=str(tmp_path / "kills")).wait() != 0
    assert "resumed" in kind.start(run, *words).succeed()
    assert differences(run, straight) == []


TIED = '''
import torch
from models import mlp
from torch import nn


class Config(mlp.Config):
    running: bool = False
    """running means"""


class Model(nn.Module):
    """A tied weight, a frozen layer, and buffers."""

    def __init__(self, config, info):
        super().__init__()
        self.first = nn.Linear(info.numeric, 16)
        self.norm = nn.BatchNorm1d(16) if config.running else nn.LayerNorm(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.there = nn.Linear(16, 16, bias=False)
        self.back = nn.Linear(16, 16, bias=False)
        self.back.weight = self.there.weight
        self.head = nn.Linear(16, info.outputs)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, batch):
        x = self.frozen(self.norm(self.first(batch["numeric"]))).relu()
        return self.head(x + self.back(self.there(x).relu()) * self.scale[0])
'''


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "running"),
    [(ZERO3, True), (Kind("ddp x 3", 3, "ddp"), True), (ZERO2, False)],
)
def test_tied_frozen_and_buffers(tmp_path, kind, running):
    """They come back from a kill, and are in best/ once each, whole and unchanged."""
    root = launch.copy_of_repository(tmp_path / "copy", models__tied=TIED)
    words = ("model.name=tied", f"model.running={str(running).lower()}", "train.batch_size=48", f"train.micro_batch={24 // kind.processes}")
    run, straight = tmp_path / "run", tmp_path / "straight"
    kind.start(straight, *words, root=root).succeed()
    assert kind.start(run, *words, root=root, KILL="step/12/0/launcher", KILLS=str(tmp_path / "kills")).wait() != 0
    assert "resumed" in kind.start(run, *words, root=root).succeed()
    assert differences(run, straight) == []
    with safe_open(run / "best" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["aliases"]) == {"back.weight": "there.weight"}
        assert {"there.weight", "frozen.weight", "scale"} < set(file.keys())
        assert "back.weight" not in file.keys()
        assert ("norm.running_mean" in file.keys()) == running
    text = launch.run(run, "--split", "test", log=tmp_path / "infer.log", script=root / "infer.py")
    score = json.loads((run / "result.json").read_text())["test"]["accuracy"]
    assert f"accuracy {score:.4g}" in text


MANY = '''
import torch
from data import Info, Splits
from engine.config import DataConfig
from torch.utils.data import Dataset


class Config(DataConfig):
    samples: int = 5_000_000
    """rows, made where they are asked for"""


class Rows(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitems__(self, positions):
        index = positions % self.length
        return {"numeric": (index[:, None] * torch.tensor([3, 5, 7]) % 11).float(), "target": index % 2}


def load(config, kind):
    info = Info("multiclass", 2, ["even", "odd"], numeric=3)
    return Splits(Rows(config.samples), Rows(500), None, info, {})
'''


@pytest.mark.slow
def test_resuming_near_the_end_of_a_long_epoch(tmp_path):
    """No replay: the first step comes as soon as in a fresh run, of which it takes less than 1.5 x the time."""
    root = launch.copy_of_repository(tmp_path / "copy", data__many=MANY)
    config = tmp_path / "many.toml"
    config.write_text('[data]\nname = "many"\n[model]\nname = "mlp"\nwidth = 8\ndepth = 1\n[train]\nbatch_size = 50_000\n')

    def seconds(name: str, steps: int) -> float:
        mark, begun = tmp_path / f"{name}-first", time.monotonic()
        words = ("--config", config, f"train.steps={steps}", f"run.dir={tmp_path / name}")
        running = launch.start(*words, log=tmp_path / f"{name}.log", script=root / "tests/child.py", FIRST_STEP=str(mark))
        running.until(mark.exists)
        took = time.monotonic() - begun
        running.succeed()
        mark.unlink()
        return took

    seconds("base", 98)
    fresh, resumed = [], []
    for turn in range(5):
        fresh.append(seconds(f"fresh{turn}", 1))
        shutil.copytree(tmp_path / "base", tmp_path / f"resumed{turn}")
        resumed.append(seconds(f"resumed{turn}", 99))
        assert "at step 98" in (tmp_path / f"resumed{turn}.log").read_text()
    print(f"to the first step: fresh {min(fresh):.2f} s, resumed at step 98 of 100 {min(resumed):.2f} s")
    assert min(resumed) < 1.5 * min(fresh)
