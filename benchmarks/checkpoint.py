"""What a checkpoint costs: the seconds in which training stands still, beside a plain torch.save of the same state.

    make bench-checkpoint
    python benchmarks/checkpoint.py --parameters 100 --rounds 5

Two processes train an MLP of so many million parameters, under ddp and under zero3-offload. In each round the state is saved both ways, in an
order drawn anew. Ours blocks while the state is copied and while the finished checkpoint is committed; the writing, hashing and fsync go on
beside the steps. torch.save writes the same tensors from rank 0 (from each rank its own under ZeRO) and does not fsync. Then the
weights of a larger checkpoint are consolidated in a process of its own, whose peak memory is printed.
Exit status 0 where ddp blocks for at most a quarter of torch.save, else 1.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

BAR = 0.25
WIDTH = 2048
NUMBERS = 64
STRATEGIES = ("ddp", "zero3-offload")


def depth(millions: int) -> int:
    return max(1, round(millions * 1e6 / WIDTH**2))


class Training:
    """The parts of the loop that a save touches, with the model, strategy and optimizer as train.py makes them."""

    def __init__(self, folder: Path, strategy_name: str, millions: int):
        from data import Info
        from engine import checkpoint, optim, process, settings, strategy
        from models import mlp

        words = ["data.name=bundled", "data.dataset=digits", "model.name=mlp", f"model.width={WIDTH}", f"model.depth={depth(millions)}"]
        chosen = settings.parse([], [*words, "model.dropout=0", "train.batch_size=8", f"strategy.name={strategy_name}"])
        plan = settings.plan_of(chosen.train, process.world_size())
        self.accelerator = strategy.start(chosen, plan)
        self.model = mlp.Model(chosen.model, Info("multiclass", 10, numeric=NUMBERS))
        optimizer = optim.build(self.model, chosen, mlp)
        self.wrapped, self.optimizer = strategy.prepare(self.accelerator, chosen, self.model, optimizer)
        self.progress = checkpoint.Progress()
        parts = (self.accelerator, self.wrapped, self.model, self.optimizer)
        self.saver = checkpoint.Saver(folder / "run", parts, 1, 10**6, 0)
        self.update, self.agreement = strategy.update, process.Agreement()
        self.folder = folder

    def step(self, save: bool = False) -> tuple[bool, float]:
        """One optimizer step as in the loop of train.py: whether a rank was still writing before it, and the seconds of its save."""
        batch = {"numeric": torch.randn(4, NUMBERS)}
        with self.accelerator.accumulate(self.wrapped):
            self.accelerator.backward(self.wrapped(batch).square().mean())
            self.update(self.accelerator, self.wrapped, self.optimizer, 0.0)
        self.progress.step += 1
        _, writing = self.agreement.read()
        seconds = timed(lambda: self.saver.save(self.progress)) if save else 0.0
        self.agreement.issue(False, self.saver.busy)
        return writing, seconds

    def ours(self) -> dict[str, float]:
        _, copy = self.step(save=True)
        while self.step()[0]:
            pass
        return {"copy": copy, "commit": timed(self.saver.commit)}

    def plain(self) -> dict[str, float]:
        from engine import process, state

        captured = state.capture(self.accelerator, self.wrapped, self.model, self.optimizer)
        tensors = captured.weights | captured.moments
        path = self.folder / f"plain-{process.rank()}.pt"
        return {"torch.save": timed(lambda: torch.save(tensors, path) if tensors else None)}


def timed(function: Any) -> float:
    """Seconds until the slowest rank is through."""
    from engine import process

    process.gather(None)
    start = time.perf_counter()
    function()
    return max(process.gather(time.perf_counter() - start))


def rank_main(folder: Path, strategy_name: str, millions: int, rounds: int) -> None:
    from engine import process

    process.die_with_launcher()
    training = Training(folder, strategy_name, millions)
    turns = [training.ours, training.plain]
    shuffle, lines = random.Random(0).shuffle, []
    for _ in range(rounds + 1):
        shuffle(turns)
        line: dict[str, float] = {}
        for turn in turns:
            os.sync()  # what torch.save left to the kernel would be waited for in our fsync
            line |= turn()
        lines.append(line)
    if process.rank() == 0:
        (folder / "rounds.json").write_text(json.dumps(lines))
    torch.distributed.destroy_process_group()


def measure(strategy_name: str, options: argparse.Namespace) -> float:
    """Prints a line; the part of torch.save's seconds in which ours blocks, the median over rounds."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = ["--rank-of", strategy_name, "--folder", folder, "--parameters", options.parameters, "--rounds", options.rounds]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | os.environ
        ended = subprocess.run([*launcher, *map(str, words)], env=env, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(ended.stdout + ended.stderr)
        first, *rounds = json.loads(Path(folder, "rounds.json").read_text())
    parts = {key: statistics.median(line[key] for line in rounds) for key in ("copy", "commit", "torch.save")}
    ratios = [(line["copy"] + line["commit"]) / line["torch.save"] for line in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"  {strategy_name:15}{parts['copy']:8.3f}{parts['commit']:9.3f}{parts['torch.save']:13.3f}{middle:10.3f}{low:9.3f} {high:6.3f}"
        f"{first['copy'] + first['commit']:13.3f}",
        flush=True,
    )
    return middle


def write_checkpoint(folder: Path, millions: int, processes: int = 2) -> int:
    """The weights of a sharded checkpoint as zero3 leaves them. Returns their bytes."""
    from engine import checkpoint, tensors

    folder.mkdir(parents=True)
    shapes = {f"blocks.{4 * number}.weight": [WIDTH, WIDTH] for number in range(depth(millions))}
    files = {}
    for rank in range(processes):
        name = f"model-{rank:05d}-of-{processes:05d}.safetensors"
        piece = torch.randn(WIDTH * WIDTH // processes)
        files[name] = tensors.write_tensors(folder / name, dict.fromkeys(shapes, piece))
    manifest = {"format": checkpoint.FORMAT, "progress": {}, "processes": processes, "sharded": True, "shapes": shapes, "aliases": {}}
    checkpoint.write_manifest(folder, manifest | {"scaler": None, "files": files})
    return len(shapes) * WIDTH * WIDTH * 4


def consolidate(source: Path, output: Path) -> None:
    """Prints MB: resident before, the most of anonymous memory meanwhile above that, the most of all (files that are mapped count)."""
    from engine import export

    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident("RssAnon"))

    before = resident("RssAnon")
    watcher = threading.Thread(target=watch)
    watcher.start()
    output.mkdir()
    export.consolidate(source, output, 10**12)
    done.set()
    watcher.join()
    print(before, most - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def resident(key: str) -> int:
    """MB"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions of the model that is saved")
    parser.add_argument("--consolidated", type=int, default=300, help="millions of the model that is consolidated")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; one more comes before them")
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--consolidate", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.folder, options.rank_of, options.parameters, options.rounds)
        return 0
    if options.consolidate:
        consolidate(*options.consolidate)
        return 0
    print(f"{options.parameters} million parameters, 2 processes, {options.rounds} rounds; seconds\n")
    print(f"  {'':15}{'copy':>8}{'commit':>9}{'torch.save':>13}{'ratio':>10}{'quartiles':>16}{'first save':>13}")
    ratios = {name: measure(name, options) for name in options.strategies}
    holds = ratios.get("ddp", 0.0) <= BAR
    if "ddp" in ratios:
        print(f"\n  ddp blocks for {ratios['ddp']:.3f} of torch.save, at most {BAR}: {'holds' if holds else 'FAILS'}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_checkpoint(folder / "checkpoint", options.consolidated)
        command = [sys.executable, __file__, "--consolidate", folder / "checkpoint", folder / "whole"]
        before, more, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        shutil.rmtree(folder / "whole")
    print(
        f"\nconsolidating {options.consolidated} million parameters, {size / 1e6:,.0f} MB in 2 shards: {more} MB above the {before} MB of a", end=" "
    )
    print(f"process that has imported torch; at most {peak} MB resident, with the pages of the mapped files")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
