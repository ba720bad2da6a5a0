"""What tracking costs: samples per second with offline wandb each ten steps, beside no tracking; and the time to the first step.

    make bench-tracking

The same training as overhead.py's, in two processes that take turns and wait for each other, in an order drawn anew: what
wandb's own process and thread do meanwhile counts. Ratios are taken within rounds. Exit status 0 where the bars hold, else 1.
Processor time, of all processes of a contender, is printed beside: a busy computer hardly changes it.
"""

import argparse
import multiprocessing
import random
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


def contender(connection: Any, words: list[str], batch_size: int, steps: int, threads: int, folder: str) -> None:
    """Trains some steps whenever it is asked to. In a process of its own."""
    import torch

    from data import Splits
    from engine import settings
    from train import train

    torch.set_num_threads(threads)
    workload, file, done = WORKLOADS["table"](), Path(folder, "tracking.toml"), 0
    file.write_text(workload.settings)

    def tick() -> None:
        nonlocal done
        if done % steps == 0:
            connection.send(time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children()))
            connection.recv()
        done += 1

    train_set = Turns(workload.dataset(workload.columns), tick)
    valid_set = workload.dataset({key: column[:1000] for key, column in workload.columns.items()})
    splits = Splits(train_set, valid_set, None, workload.info, preprocessing={})
    never = [f"train.{key}=1_000_000_000" for key in ("steps", "eval_every", "save_every")]
    more = [f"train.batch_size={batch_size}", "train.log_every=10", f"run.dir={folder}", "track.mode=offline", *words]
    train(settings.parse([file], [*never, *more]), splits=splits)


def rounds(batch_size: int, count: int, steps: int, threads: int) -> tuple[list[tuple[float, float]], list[float]]:
    """Seconds without and with tracking, round by round; and seconds of processor time of each, over all but the first three rounds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as off, tempfile.TemporaryDirectory() as on:
        pipes, processes = [], []
        for folder, words in ((off, []), (on, [TRACKED])):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=contender, args=(theirs, words, batch_size, steps, threads, folder), daemon=True))
            processes[-1].start()
            ours.recv()
            pipes.append(ours)
        shuffle, taken, work = random.Random(0).shuffle, [], []
        while len(taken) < count:
            if not list(Path(on, "wandb").glob("offline-run-*/*.wandb")):  # it starts beside training: that is measured below
                taken, work = [], []
            order, seconds, used = [0, 1], [0.0, 0.0], [0.0, 0.0]
            shuffle(order)
            for place in order:
                start = time.perf_counter()
                pipes[place].send("go")
                used[place] = pipes[place].recv()
                seconds[place] = time.perf_counter() - start
            taken.append((seconds[0], seconds[1]))
            work.append(used)
        for process in processes:
            process.kill()
            process.join()
        assert not Path(off, "wandb").exists()
    return taken[3:], [end - begin for begin, end in zip(work[2], work[-1], strict=True)]


def throughput(options: argparse.Namespace) -> bool:
    holds = True
    for batch_size in options.batch:
        taken, work = rounds(batch_size, options.rounds + 3, options.steps, options.threads)
        low, middle, high = statistics.quantiles([off / on for off, on in taken], n=4)
        rates = [batch_size * options.steps / statistics.median(seconds) for seconds in zip(*taken, strict=True)]
        print(f"batch {batch_size}: {options.rounds} rounds of {options.steps} steps, {options.threads} threads")
        print(f"  processor time with / without {work[1] / work[0]:.4f}")
        print(f"  without {rates[0]:,.0f} samples/s, with {rates[1]:,.0f}")
        print(f"  with / without {middle:.4f} (quartiles {low:.4f} {high:.4f}), at least {BAR}: {'holds' if middle >= BAR else 'FAILS'}", flush=True)
        holds &= middle >= BAR
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
    parser.add_argument("--rounds", type=int, default=120, help="rounds that count; three more come before them")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7, help="starts without and with tracking")
    options = parser.parse_args()
    holds = throughput(options)
    return 0 if start(options.pairs) and holds else 1


if __name__ == "__main__":
    sys.exit(main())
