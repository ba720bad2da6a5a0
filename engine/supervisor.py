"""The workers of a study: started, replaced when they die, ended together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine import process, study_report, tracking
from engine.config import UserError
from engine.settings import Settings
from engine.slots import MOST_FAILURES, Slots
from engine.study import lock

# As it was typed, taken while this is imported: later a tracker hides passwords in sys.argv while it starts.
COMMAND = [sys.executable, *sys.argv]


def supervise(settings: Settings, place: Path) -> None:
    """Start workers, replace those that die, until the wanted number of trials has finished."""
    owner = lock(settings, place)  # noqa: F841, it lasts as long as this name
    found = Slots(settings, place, time.time())
    with tracking.Tracker(settings, place, "tune") as tracker:
        tracker.start()
        signal.signal(signal.SIGTERM, process.stop)
        workers: dict[int, subprocess.Popen] = {}
        try:
            keep_working(found, workers)
        except (KeyboardInterrupt, process.Stopped):
            print("\nstopped; finished trials are kept, the same command goes on", flush=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            end(workers)
            found.top_up()
            study_report.conclude(found, tracker)
        found.refuse_failures()


def keep_working(found: Slots, workers: dict[int, subprocess.Popen]) -> None:
    shown, deaths, done = "", 0, 0
    while True:
        deaths = count_deaths(workers, deaths)
        settled = not found.in_state("RUNNING", "WAITING")  # and what is queued now may run a moment later
        settled = not found.top_up() and settled
        if (now_done := len(found.in_state("COMPLETE", "PRUNED"))) > done:
            deaths, done = 0, now_done
        line = found.line()
        if sys.stdout.isatty():
            print(f"\r{line:<110}", end="", flush=True)
        elif (counts := line.partition("  left")[0]) != shown:
            print(line, flush=True)
            shown = counts
        more = not found.over() and found.waiting()
        if not more and (settled or not workers) and not found.unsigned():
            break
        for number in range(found.settings.tune.workers if more else 0):
            if number not in workers:
                workers[number] = start_worker(found, number)
        study_report.import_what_draws()
        time.sleep(0.25)  # a look takes some 10 ms from a worker's core
    for worker in workers.values():
        worker.kill()  # it has nothing left to do but to end, for a second
    print(flush=True, end="\n" if sys.stdout.isatty() else "")


def count_deaths(workers: dict[int, subprocess.Popen], deaths: int) -> int:
    """Take ended workers off the list. Raises UserError where none can work: the reason stands above, from the worker itself."""
    for number, status in [(number, worker.poll()) for number, worker in workers.items()]:
        if status is not None:
            del workers[number]
            deaths += status != 0
            if status == 2 or deaths >= MOST_FAILURES:
                raise UserError(f"tune: worker {number} ended with status {status}; its own words are above")
    return deaths


def start_worker(found: Slots, number: int) -> subprocess.Popen:
    """A worker of its own GPU, or share of cores. It asks to die with this process, and hears no Ctrl-C of the terminal."""
    environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // found.settings.tune.workers)), **os.environ}
    environment.pop("WANDB_SERVICE", None)  # the supervisor's own, which would end with it
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else range(count)
        environment["CUDA_VISIBLE_DEVICES"] = str(visible[number % count])
    words = [*COMMAND, "--worker", str(number), str(os.getpid()), str(found.begun)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def end(workers: dict[int, subprocess.Popen]) -> None:
    """Ask, then kill: a deep trial stops at its next step."""
    for worker in workers.values():
        worker.terminate()
    deadline = time.monotonic() + 10
    for worker in workers.values():
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
