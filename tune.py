"""Search hyper-parameters of the deep model, or of the boosted one, over [tune.space] of the same TOML.

    python tune.py --config conf/adult.toml tune.trials=50 tune.workers=2
    python tune.py --config conf/adult.toml tune.target=boost tune.storage=postgresql://…      on as many machines as you like
    python tune.py --config conf/adult.toml tune.method=lightgbm-stepwise
    torchrun --nproc_per_node 2 tune.py --config conf/adult.toml

The same command again goes on with the study. Every worker is a process with its own GPU or share of cores; under torchrun
each trial uses all processes. What comes out is a study's folder: the journal, trials.csv, best.toml, pictures.
"""

import argparse
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from engine import boost_data, config, process, search, study_report, tracking
from engine.config import UserError
from engine.settings import Settings, command_line, parse, plan_of, replaced
from engine.slots import Slots
from engine.study import lock, rule
from engine.supervisor import supervise

ALONE = 60  # seconds after which a process that failed in a trial takes itself for the only one
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")
Report = Callable[[int, dict[str, float]], None]


def main() -> None:
    files, overrides, options = command_line(__doc__, add=add_options)
    settings = parse(files, overrides)
    place = tracking.run_folder(settings, "tune")
    if settings.tune.method == "lightgbm-stepwise":
        signal.signal(signal.SIGTERM, process.stop)
        return study_report.stepwise(settings, place)
    search.check_space(settings)
    if process.world_size() > 1:
        return work_together(settings, place)
    if options.worker is None:
        return supervise(settings, place)
    number, parent, begun = options.worker
    process.die_with_parent()
    if os.getppid() == parent:  # else it died before it could be watched
        work(settings, place, int(number), begun)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker", type=float, nargs=3, help=argparse.SUPPRESS)


# One trial


class Trials:
    """Runs trials in this process; the data is read and prepared once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.splits: dict[str, Any] = {}
        # Under torchrun, for ranks to find out whether all of them failed.
        together = process.world_size() > 1
        self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=ALONE)) if together else None
        splits = self.read(settings)  # what is wrong with the data is said before the first trial
        if settings.tune.target == "boost":
            boost_data.prepare(settings, splits)

    def read(self, settings: Settings) -> Any:
        key = settings.data.model_dump_json()
        if key not in self.splits:  # data.* may be searched too
            data_file = config.module("data", settings.data.name)
            load = data_file.read if settings.tune.target == "boost" and hasattr(data_file, "read") else data_file.load
            self.splits = {key: load(settings.data, settings.task.kind)}
        return self.splits[key]

    def run(self, settings: Settings, report: Report) -> dict[str, float]:
        """The best validation scores; `report(step, scores)` may raise TrialPruned."""
        score = rule(settings)[1]
        if settings.tune.target == "boost":
            from boost import boost

            best = boost(settings, self.read(settings), lambda step, value: report(step, {score: value}), trial=True)["best"]
        else:
            from train import train

            best = train(settings, self.read(settings), report, trial=True)["best"]
        if not math.isfinite(best.get(score, math.nan)):
            raise process.Diverged(f"no evaluation gave a finite {score}")
        return best

    def attempt(self, values: dict[str, Any], decide: Callable[[int, float], None], folder: Path | None) -> tuple[str, Any]:
        """("COMPLETE", score), ("PRUNED", None) or ("FAIL", reason): a trial that fails does not end the study.

        `folder` is where the trial's own record in the trackers is kept, if there are any.
        """
        from optuna import TrialPruned

        score, last = rule(self.settings)[1], 0
        try:
            settings = replaced(self.settings, values | {"track.alerts": False})
            # All trials of a study form a group.
            called = {"group": folder.parent.parent.name, "called": f"trial {int(folder.name)}"} if folder else {}
            with tracking.Tracker(settings, folder, "tune", **called) as tracker:
                tracker.start()

                def report(step: int, scores: dict[str, float]) -> None:
                    nonlocal last
                    last = step
                    tracker.log({"step": step, "valid": scores})
                    decide(step, scores[score])

                try:
                    best = self.run(settings, report)
                except TrialPruned:
                    return "PRUNED", None
                tracker.log({"step": last + 1, "best": best})
                return "COMPLETE", best[score]
        except process.Stopped:
            raise
        except Exception as error:
            said = tracking.without_secrets(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            exhausted = isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)
        gc.collect()  # the traceback held what the trial had allocated
        if self.group:
            try:
                torch.distributed.barrier(self.group)
            except RuntimeError:  # the others wait in the middle of a step, for ever: only the launcher can end them
                raise UserError(f"a process failed alone in a trial: {said}; the same command goes on with the study") from None
        return "FAIL", f"out of memory: {said}" if exhausted else said


def record_folder(settings: Settings, place: Path, trial: Any) -> Path | None:
    """Of a trial in the trackers."""
    if not settings.track.to:
        return None
    folder = place / "trials" / f"{trial.number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pruned(trial: Any, step: int, score: float) -> bool:
    trial.report(score, step)
    return trial.should_prune()


# Workers: processes that take waiting trials until none is left


def work(settings: Settings, place: Path, number: int, begun: float) -> None:
    """One worker. The supervisor keeps as many trials waiting as are still wanted."""
    trials = Trials(settings)
    found = Slots(settings, place, begun, number)
    while not found.over() and found.waiting():
        if (drawn := found.draw()) is None:
            continue
        trial, values = drawn

        def decide(step: int, score: float, trial: Any = trial) -> None:
            from optuna import TrialPruned

            if pruned(trial, step, score):
                raise TrialPruned

        found.tell(trial, *trials.attempt(values, decide, record_folder(settings, place, trial)))
        if needs_fresh_process(settings):
            return


def needs_fresh_process(settings: Settings) -> bool:
    """DeepSpeed, and a change of strategy, cannot be undone inside a process: then each trial has its own."""
    return settings.strategy.name != "ddp" or any(key.startswith("strategy.") for key in settings.tune.space)


def work_together(settings: Settings, place: Path) -> None:
    """Under torchrun: rank 0 draws and decides, all ranks hear of it, so that every rank trains and prunes alike."""
    if settings.tune.target == "boost":
        raise UserError('tune.target = "boost": is one process that uses all cores; start tune.py by python, with tune.workers')
    if needs_fresh_process(settings):
        raise UserError("strategy: cannot change under torchrun; use python tune.py, which gives each trial a process of its own")
    from optuna import TrialPruned

    from engine import strategy

    strategy.start(settings, plan_of(settings.train, process.world_size()))  # the process group, for the first broadcast
    held: dict[str, Any] = {}

    def begin() -> None:
        held["owner"], held["slots"] = lock(settings, place), Slots(settings, place, time.time())

    def draw() -> dict[str, Any] | None:
        held["slots"].top_up()
        if held["slots"].over() or not held["slots"].waiting():
            return None
        held["trial"], values = held["slots"].draw() or (None, {})
        return values

    def decide(step: int, score: float) -> None:
        if process.on_rank_zero(lambda: pruned(held["trial"], step, score)):
            raise TrialPruned

    signal.signal(signal.SIGTERM, process.stop)  # between trials
    process.on_rank_zero(begin)
    trials = Trials(settings)
    with tracking.Tracker(settings, place, "tune") as tracker:
        tracker.start()
        try:
            while (values := process.on_rank_zero(draw)) is not None:
                if values:
                    folder = process.on_rank_zero(lambda: record_folder(settings, place, held["trial"]))
                    outcome = trials.attempt(values, decide, folder)
                    process.on_rank_zero(lambda outcome=outcome: held["slots"].tell(held["trial"], *outcome))
                    process.on_rank_zero(lambda: print(held["slots"].line(), flush=True))
        finally:  # also where a signal ends it
            if "slots" in held:
                study_report.conclude(held["slots"], tracker)
        process.on_rank_zero(lambda: held["slots"].refuse_failures())


if __name__ == "__main__":
    process.die_with_launcher()
    sys.exit(process.exit_status(main))
