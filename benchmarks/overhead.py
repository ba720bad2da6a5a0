"""What a training loop costs: samples per second of this repository's, beside a bare loop, Lightning and transformers.

    make bench-overhead
    python benchmarks/overhead.py --batch 256 --rounds 20
    python benchmarks/overhead.py --workload text

All contenders are alive at once in one process and take turns: a round is some optimizer steps of each, in an order
drawn anew. A slow second of the computer hits neighbours alike, and ratios are taken within rounds. Each contender runs
in its framework's own loop on a greenlet of its own, which is left and entered again between two steps; one thread, so
that all share the same cores, caches and pool of workers. Exit status 0 where the bars hold, else 1.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the loops are compared, not the devices
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset, TensorDataset

from data import Info, Splits

Tick = Callable[[], None]
"""called by a contender before each of its steps"""

BARE, DEFAULT, OURS = "bare PyTorch, fused AdamW", "bare PyTorch, default AdamW", "Plainloop"
LIGHTNING, TRANSFORMERS = "Lightning Trainer", "transformers Trainer"


@dataclass
class Workload:
    """One model on one kind of data, the same for all contenders."""

    columns: dict[str, Tensor]
    """a batch's keys and the whole column of each, in memory; "target" is 0 or 1, float32 [n]"""
    dataset: Callable[[dict[str, Tensor]], Any]
    """this repository's data set over such columns"""
    info: Info
    build: Callable[[], nn.Module]
    """model(batch) -> logits [b]"""
    settings: str
    """TOML of the same model for this repository"""
    bars: dict[str, float]
    """least throughput of this repository's loop, relative to each peer's"""
    batches: list[int]
    """sizes that are tried by default"""
    rounds: int
    """that count; three more come before them"""
    steps: int
    """optimizer steps of each contender in a round"""


def table() -> Workload:
    """200,000 rows of 30 numbers, a binary target and an MLP of 3 x 256."""
    from data.table import TableDataset
    from models.mlp import Config, Model

    random_numbers = torch.Generator().manual_seed(0)
    numeric = torch.randn(200_000, 30, generator=random_numbers)
    noise = torch.randn(len(numeric), generator=random_numbers)
    target = (numeric[:, :5].sum(1) + noise > 0).float()
    info = Info(kind="binary", outputs=1, labels=["0", "1"], numeric=30)
    config = Config(name="mlp", width=256, depth=3, dropout=0.0)
    return Workload(
        columns={"numeric": numeric, "target": target},
        dataset=TableDataset,
        info=info,
        build=lambda: Model(config, info),
        settings="""
            data = { name = "table", train = "given.csv", target = "target" }
            model = { name = "mlp", width = 256, depth = 3, dropout = 0.0 }
        """,
        bars={BARE: 0.95, LIGHTNING: 2.0, TRANSFORMERS: 1.5},
        batches=[256, 1024],
        rounds=120,
        steps=25,
    )


def small_bert(vocabulary: int) -> str:
    """A folder with the config and random weights of a BERT of 4 x 256."""
    from transformers import BertConfig, BertModel

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    BertModel(BertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


def texts() -> Workload:
    """20,000 texts of 64 random tokens, a binary target and a BERT of 4 x 256."""
    from data._cache import Arrays
    from data._listing import Listing, Sequences
    from models.text import Config, Model

    random_numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(8000, (20_000, 64), generator=random_numbers)
    target = (tokens[:, 0] < 4000).float()
    info = Info(kind="binary", outputs=1, labels=["0", "1"], more={"vocabulary": 8000, "pad": 0, "end": None, "max_length": 64})
    config = Config(name="text", pretrained=small_bert(8000))

    def dataset(columns: dict[str, Tensor]) -> Sequences:
        flat, rows = columns["tokens"].int().flatten().numpy(), np.arange(len(columns["target"]))
        listing = Listing(columns["target"].numpy(), {"train": rows}, None, None, info, {}, [], {}, [])
        return Sequences(
            listing, "train", SimpleNamespace(group_lengths=True, balance="none"), {"tokens": Arrays(flat, np.arange(len(rows) + 1) * 64, {})}
        )

    return Workload(
        columns={"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool), "target": target},
        dataset=dataset,
        info=info,
        build=lambda: Model(config, info).train(),  # transformers loads it for evaluation, and Lightning leaves it so
        settings=f"""
            data = {{ name = "text", train = "given.csv", text = "text", target = "target" }}
            model = {{ name = "text", pretrained = "{config.pretrained}" }}
        """,
        bars={BARE: 0.95, LIGHTNING: 1.0, TRANSFORMERS: 1.0},
        batches=[32],
        rounds=30,
        steps=2,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {"table": table, "text": texts}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch)
    return binary_cross_entropy_with_logits(logits, batch["target"]), logits


def bare(workload: Workload, batch_size: int, folder: str, tick: Tick, fused: bool = True) -> None:
    """What one writes by hand and in a hurry, with nothing to lose time on."""
    model = workload.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    while True:
        order = torch.randperm(len(workload.columns["target"]))
        for indices in order.split(batch_size):
            tick()
            batch = {key: column.index_select(0, indices) for key, column in workload.columns.items()}
            loss, _ = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def bare_default(workload: Workload, batch_size: int, folder: str, tick: Tick) -> None:
    bare(workload, batch_size, folder, tick, fused=False)


class Turns(Dataset):
    """A data set of this repository's that ticks at each batch. One batch is one step here."""

    def __init__(self, dataset: Any, tick: Tick):
        self.dataset, self.tick, self.lengths = dataset, tick, getattr(dataset, "lengths", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        self.tick()
        return self.dataset.__getitems__(positions)


def ours(workload: Workload, batch_size: int, folder: str, tick: Tick, splits: Splits | None = None) -> None:
    """The repository's own train(), its settings read as a user's are; scored and saved once, after the last round."""
    from engine import settings
    from train import train

    file = Path(folder, "overhead.toml")
    file.write_text(workload.settings)
    never = "1_000_000_000"
    overrides = [f"train.{key}={never}" for key in ("steps", "eval_every", "save_every")]
    if splits is None:
        train_set = workload.dataset(workload.columns)
        valid_set = workload.dataset({key: column[:1000] for key, column in workload.columns.items()})
        splits = Splits(train_set, valid_set, None, workload.info, preprocessing={})
    splits = dataclasses.replace(splits, train=Turns(splits.train, tick))
    train(settings.parse([file], [*overrides, f"train.batch_size={batch_size}", f"run.dir={folder}/plainloop"]), splits=splits)


def lightning(workload: Workload, batch_size: int, folder: str, tick: Tick) -> None:
    """Trainer, DataLoader, self.log and a metric as the documentation of Lightning and torchmetrics has them."""
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import Accuracy

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.build()
            self.accuracy = Accuracy(task="binary")

        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
            tick()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            columns = dict(zip(workload.columns, batch, strict=True))
            loss, logits = loss_of(self.model, columns)
            self.accuracy(logits, columns["target"])
            self.log("train_loss", loss)
            self.log("train_accuracy", self.accuracy)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    loader = DataLoader(TensorDataset(*workload.columns.values()), batch_size=batch_size, shuffle=True)
    Trainer(accelerator="cpu", max_epochs=-1, default_root_dir=f"{folder}/lightning").fit(Module(), loader)


def transformers(workload: Workload, batch_size: int, folder: str, tick: Tick) -> None:
    """Trainer at its defaults (among them the fused AdamW), a dataset of dicts and the default collator."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.build()

        def forward(self, labels: Tensor, **columns: Tensor) -> dict[str, Tensor]:
            loss, logits = loss_of(self.model, columns | {"target": labels})
            return {"loss": loss, "logits": logits}

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(workload.columns["target"])

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"labels" if key == "target" else key: column[index] for key, column in workload.columns.items()}

    class Ticks(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            tick()

    arguments = TrainingArguments(
        f"{folder}/transformers",
        per_device_train_batch_size=batch_size,
        num_train_epochs=10**6,
        remove_unused_columns=False,
        use_cpu=True,
    )
    Trainer(Module(), arguments, train_dataset=Rows(), callbacks=[Ticks()]).train()


CONTENDERS = {BARE: bare, DEFAULT: bare_default, OURS: ours, LIGHTNING: lightning, TRANSFORMERS: transformers}


def take_turns(runs: dict[str, Callable[[Tick], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds that each contender took for its steps, round by round."""
    hub = getcurrent()

    def contender(run: Callable[[Tick], None]) -> greenlet:
        done = 0

        def tick() -> None:
            nonlocal done
            if done % steps == 0:
                hub.switch()
            done += 1

        return greenlet(lambda: run(tick), parent=hub)

    turns = {name: contender(run) for name, run in runs.items()}
    for turn in turns.values():  # up to the first step; also what fails to start fails here, with its traceback
        turn.switch()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(turns)
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            turns[name].switch()
            seconds[name].append(time.perf_counter() - start)
            if turns[name].dead:
                raise RuntimeError(f"{name}: ended before its last round")
    for turn in turns.values():
        turn.throw()
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, peer: str) -> list[float]:
    """Throughput of one contender relative to a peer's, within each round."""
    return [theirs / own for own, theirs in zip(seconds[name], seconds[peer], strict=True)]


def report(seconds: dict[str, list[float]], samples: int, bars: dict[str, float]) -> bool:
    """Prints the table of one run; whether all bars hold. `samples` are those of one contender's round."""
    print(f"  {'':30}{'samples/s':>12}{'of bare':>10}{'quartiles':>16}")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(ratios(seconds, name, BARE), n=4)
        print(f"  {name:30}{samples / statistics.median(times):12,.0f}{middle:10.3f}{low:9.3f} {high:6.3f}")
    holds = True
    for peer, bar in bars.items() if OURS in seconds else ():
        if peer in seconds:
            middle = statistics.median(ratios(seconds, OURS, peer))
            print(f"  {OURS} / {peer}: {middle:.3f}, at least {bar}: {'holds' if middle >= bar else 'FAILS'}")
            holds &= middle >= bar
    return holds


def gain_of_lengths(batch_size: int, rounds: int, steps: int) -> None:
    """Prints what batches of similar length save on the reviews of films in nsmc/, with a BERT of 4 x 256."""
    from data import text
    from engine import settings

    values = f"""
        data = {{ name = "text", train = "nsmc/train.tsv", text = "document", target = "label", quote = "", tokenizer = "bpe" }}
        model = {{ name = "text", pretrained = "{small_bert(8000)}" }}
    """
    with tempfile.TemporaryDirectory() as folder, silence():
        file = Path(folder, "lengths.toml")
        file.write_text(values)
        found = {grouped: settings.parse([file], [f"data.group_lengths={str(grouped).lower()}"]) for grouped in (True, False)}
        splits = {grouped: text.load(chosen.data) for grouped, chosen in found.items()}
        info = splits[True].info
        workload = Workload({}, lambda columns: None, info, nn.Identity, values, {}, [], 0, 0)
        runs = {str(grouped): functools.partial(ours, workload, batch_size, f"{folder}/{grouped}", splits=given) for grouped, given in splits.items()}
        for name in runs:
            Path(folder, name).mkdir()
        seconds = take_turns(runs, 1 + rounds, steps)
    speeds = {name: batch_size * steps / statistics.mean(times[1:]) for name, times in seconds.items()}
    print(f"\nnsmc, batch {batch_size}: {speeds['True']:,.0f} samples/s in batches of similar length, {speeds['False']:,.0f} in random ones", end="")
    print(f": {speeds['True'] / speeds['False']:.2f} times as many")


@contextlib.contextmanager
def silence():
    """Progress bars are drawn as usual, into the void."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as void, contextlib.redirect_stdout(void), contextlib.redirect_stderr(void):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="table")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="default: the workload's own")
    parser.add_argument("--rounds", type=int, default=0, help="rounds that count; three more come before them")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of each contender in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], choices=list(CONTENDERS), help="contenders to leave out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.workload]()
    names = [name for name in CONTENDERS if name not in options.without]
    count, steps = options.rounds or workload.rounds, options.steps or workload.steps
    warm_up, holds = 3, True
    for batch_size in options.batch or workload.batches:
        with tempfile.TemporaryDirectory() as folder, silence():
            runs = {name: functools.partial(CONTENDERS[name], workload, batch_size, folder) for name in names}
            seconds = take_turns(runs, warm_up + count, steps)
        counted = {name: times[warm_up:] for name, times in seconds.items()}
        rounds = f"{count} rounds of {steps} steps, {options.threads} threads"
        print(f"\n{options.workload}, batch {batch_size}: {rounds}")
        holds &= report(counted, batch_size * steps, workload.bars)
        if options.workload == "text" and os.environ.get("PLAINLOOP_DATA"):
            gain_of_lengths(batch_size, rounds=8, steps=20)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
