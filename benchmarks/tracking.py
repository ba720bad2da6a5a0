"""What tracking costs: samples per second with offline wandb each ten steps, beside no tracking; and the time to the first step.

    make bench-tracking

The same training as overhead.py's, in two processes that take turns, in an order drawn anew; the other one is stopped meanwhile, so that
what wandb's own process and thread do counts where it belongs. The bar is on all steps by all seconds. Exit status 0 where the bars hold,
else 1. Processor time, of all processes of a contender, is printed beside: a busy computer hardly changes it.
"""

import argparse
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from overhead import WORKLOADS, Turns
from startup import ROOT, environment, seconds_to_first_step, write_table

BAR, BAR_SECONDS = 0.98, 1.5
TRACKED = 'track.to=["wandb"]'


def contender(connection: Any, words: list[str], batch_size: int, threads: int, folder: str) -> None:
    """Trains for some seconds whenever it is asked to. In a process of its own."""
    import torch

    from data import Splits
    from engine import settings
    from train import train

    torch.set_num_threads(threads)
    workload, file, done, end = WORKLOADS["table"](), Path(folder, "tracking.toml"), 0, 0.0
    file.write_text(workload.settings)

    def tick() -> None:
        nonlocal done, end
        if time.perf_counter() >= end:
            connection.send((done, time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())))
            end = connection.recv() + time.perf_counter()
        done += 1

    train_set = Turns(workload.dataset(workload.columns), tick)
    valid_set = workload.dataset({key: column[:1000] for key, column in workload.columns.items()})
    splits = Splits(train_set, valid_set, None, workload.info, preprocessing={})
    never = [f"train.{key}=1_000_000_000" for key in ("steps", "eval_every", "save_every")]
    more = [f"train.batch_size={batch_size}", "train.log_every=10", f"run.dir={folder}", "track.mode=offline", *words]
    train(settings.parse([file], [*never, *more]), splits=splits)


class Contender:
    def __init__(self, words: list[str], batch_size: int, threads: int, folder: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=contender, args=(theirs, words, batch_size, threads, folder), daemon=True)
        self.process.start()
        self.now = self.pipe.recv()
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """To it and to wandb's own process: who waits for a turn does nothing."""
        ours = psutil.Process(self.process.pid)
        for process in [ours, *ours.children(recursive=True)]:
            process.send_signal(number)

    def turn(self, seconds: float) -> list[float]:
        """Steps, seconds and seconds of processor time of a turn."""
        before, begun = self.now, time.perf_counter()
        self.signal(signal.SIGCONT)
        self.pipe.send(seconds)
        self.now = self.pipe.recv()
        taken = time.perf_counter() - begun
        self.signal(signal.SIGSTOP)
        return [self.now[0] - before[0], taken, self.now[1] - before[1]]


def rounds(batch_size: int, options: argparse.Namespace) -> list[list[list[float]]]:
    """Turns without and with tracking, round by round."""
    with tempfile.TemporaryDirectory() as off, tempfile.TemporaryDirectory() as on:
        both = [Contender(words, batch_size, options.threads, folder) for folder, words in ((off, []), (on, [TRACKED]))]
        shuffle, taken = random.Random(0).shuffle, []
        while len(taken) < options.rounds + 1:
            if not list(Path(on, "wandb").glob("offline-run-*/*.wandb")):  # it starts beside training: that is measured below
                taken = []
            order = [0, 1]
            shuffle(order)
            turns = {place: both[place].turn(options.seconds) for place in order}
            taken.append([turns[0], turns[1]])
        for one in both:
            one.signal(signal.SIGKILL)
            one.process.join()
        assert not Path(off, "wandb").exists()
    return taken[1:]


def throughput(options: argparse.Namespace) -> bool:
    holds = True
    for batch_size in options.batch:
        taken = rounds(batch_size, options)
        off, on = ([sum(turns) for turns in zip(*side, strict=True)] for side in zip(*taken, strict=True))
        ratios = [tracked[0] / tracked[1] / (without[0] / without[1]) for without, tracked in taken]
        low, _, high = statistics.quantiles(ratios, n=4)
        rates = [batch_size * steps / seconds for steps, seconds, _ in (off, on)]
        ratio = rates[1] / rates[0]
        print(f"batch {batch_size}: {options.rounds} rounds of {options.seconds:g} s each, {options.threads} threads")
        print(f"  processor time of a step, with / without {on[2] / on[0] / (off[2] / off[0]):.4f}")
        print(f"  without {rates[0]:,.0f} samples/s, with {rates[1]:,.0f}")
        print(
            f"  with / without {ratio:.4f} (quartiles of rounds {low:.4f} {high:.4f}), at least {BAR}: {'holds' if ratio >= BAR else 'FAILS'}",
            flush=True,
        )
        holds &= ratio >= BAR
    return holds


def start(pairs: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder, "rows.csv"), 20_000, 30)
        Path(folder, "table.toml").write_text('[data]\nname = "table"\ntrain = "rows.csv"\ntarget = "target"\n[model]\nname = "mlp"\n')
        words = [str(ROOT / "train.py"), "--config", f"{folder}/table.toml", f"data.root={folder}", "track.mode=offline", "train.log_every=10"]
        first, whole = [], []
        for number in range(pairs):
            steps, runs = [], []
            for name, more in (("off", []), ("on", [TRACKED])):
                steps.append(seconds_to_first_step(*words, f"run.dir={folder}/{name}-{number}", *more))
                begun = time.perf_counter()
                command = [sys.executable, *words, f"run.dir={folder}/whole-{name}-{number}", "train.epochs=1", *more]
                subprocess.run(command, check=True, cwd=folder, env=environment(), capture_output=True)
                runs.append(time.perf_counter() - begun)
            first.append(steps)
            whole.append(runs)
    for title, taken in (("to the first step", first), ("a whole run of one epoch", whole)):
        growth = statistics.median(on - off for off, on in taken)
        print(f"{title}: {statistics.median(off for off, _ in taken):.2f} s, with tracking {growth:+.2f} s")
    growth = statistics.median(on - off for off, on in first)
    print(f"  {growth:+.2f} s to the first step, at most {BAR_SECONDS}: {'holds' if growth <= BAR_SECONDS else 'FAILS'}")
    return growth <= BAR_SECONDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=60, help="rounds that count; one more comes before them")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn: three of the bursts in which a tracker is told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7, help="starts without and with tracking")
    options = parser.parse_args()
    holds = throughput(options)
    return 0 if start(options.pairs) and holds else 1


if __name__ == "__main__":
    sys.exit(main())
