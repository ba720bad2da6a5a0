"""Search hyper-parameters of the deep model, or of the boosted one, over [tune.space] of the same TOML.

    python tune.py --config conf/adult.toml tune.trials=50 tune.workers=2
    python tune.py --config conf/adult_lightgbm.toml tune.target=boost
    torchrun --nproc_per_node 2 tune.py --config conf/adult.toml

The same command again goes on with the study. Every worker is a process with its own GPU or share of cores; under torchrun
each trial uses all processes. What comes out is a study's folder: the journal, trials.csv, best.toml, pictures.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import config, process, search, study_report, tracking
from engine.config import UserError
from engine.settings import Settings, command_line, parse, plan_of, replaced

MOST_FAILURES = 5  # one after another
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")


def main() -> None:
    files, overrides, options = command_line(__doc__, add=add_options)
    settings = parse(files, overrides)
    search.check_space(settings)
    place = study_folder(settings)
    if options.worker is not None:
        process.die_with_parent()
        work(settings, place, options.worker)
    elif process.world_size() > 1:
        work_together(settings, place)
    else:
        supervise(settings, place)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)


def study_folder(settings: Settings) -> Path:
    return tracking.run_folder(settings, "tune")


def rule(settings: Settings) -> tuple[str, str]:
    """("max" or "min", the score that decides). A study must know it before the first trial."""
    if settings.task.best == "auto":
        raise UserError('task.best = "auto": a search needs it by name, such as "max accuracy" or "min rmse"')
    direction, score = settings.task.best.split()
    return direction, score


# One trial


class Trials:
    """Runs trials in this process; the data is read and prepared once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.direction, self.score = rule(settings)
        self.splits: dict[str, Any] = {}

    def run(self, values: dict[str, Any], report: Any) -> float:
        """The best validation score with these values; `report(step, score)` may raise TrialPruned."""
        settings = replaced(self.settings, values)
        key = settings.data.model_dump_json()
        if key not in self.splits:
            self.splits = {key: self.read(settings)}
        if settings.tune.target == "boost":
            from boost import boost

            return boost(settings, self.splits[key], report, trial=True)["best"][self.score]
        from train import train

        result = train(settings, self.splits[key], lambda step, scores: report(step, scores[self.score]), trial=True)
        if not result["best"]:
            raise process.Diverged("no evaluation gave a finite score")
        return result["best"][self.score]

    def read(self, settings: Settings) -> Any:
        data_file = config.module("data", settings.data.name)
        return (data_file.read if settings.tune.target == "boost" else data_file.load)(settings.data, settings.task.kind)


def run(trials: Trials, values: dict[str, Any], report: Any) -> tuple[str, Any]:
    """("COMPLETE", score), ("PRUNED", None) or ("FAIL", reason): a trial that fails does not end the study."""
    import optuna

    try:
        return "COMPLETE", trials.run(values, report)
    except optuna.TrialPruned:
        return "PRUNED", None
    except process.Stopped:
        raise
    except Exception as error:
        return "FAIL", reason_of(error)


def tell(study: Any, trial: Any, outcome: tuple[str, Any]) -> None:
    from optuna.trial import TrialState

    state, value = outcome
    if state == "FAIL":
        trial.set_user_attr("reason", value)
        value = None
    study.tell(trial, value, state=TrialState[state]) if state == "COMPLETE" else study.tell(trial, state=TrialState[state])


def reason_of(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        return f"out of memory: {text}"
    return f"{type(error).__name__}: {text}"


# Workers: processes that ask for waiting trials until none is left


def identity() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"


def trials_in(study: Any, *states: str) -> list[Any]:
    """The study's trials in these states; those that lost a race for the last waiting one do not count."""
    from optuna.trial import TrialState

    found = study.get_trials(deepcopy=False, states=tuple(TrialState[state] for state in states) or None)
    return [trial for trial in found if "surplus" not in trial.user_attrs]


def work(settings: Settings, place: Path, number: int) -> None:
    """One worker. The supervisor keeps as many trials waiting as are still wanted."""
    study = search.open_study(settings, place, settings.run.seed + number, rule(settings)[0])
    trials = Trials(settings)
    while trials_in(study, "WAITING"):
        trial = study.ask()
        if "queued" not in trial.user_attrs:  # another worker took the last waiting one just now
            trial.set_user_attr("surplus", True)
            tell(study, trial, ("FAIL", "surplus"))
            continue
        trial.set_user_attr("worker", identity())

        def report(step: int, score: float, trial: Any = trial) -> None:
            prune(trial, step, score)

        tell(study, trial, run(trials, search.suggest(trial, settings.tune.space), report))
        if needs_fresh_process(settings):
            return


def prune(trial: Any, step: int, score: float) -> None:
    from optuna import TrialPruned

    trial.report(score, step)
    if trial.should_prune():
        raise TrialPruned


def needs_fresh_process(settings: Settings) -> bool:
    """DeepSpeed, and a change of strategy, cannot be undone inside a process: then each trial has its own."""
    return settings.strategy.name != "ddp" or any(key.startswith("strategy.") for key in settings.tune.space)


def work_together(settings: Settings, place: Path) -> None:
    """Under torchrun: rank 0 draws and decides, all ranks hear of it, so that every rank trains and prunes alike."""
    if needs_fresh_process(settings):
        raise UserError("strategy: cannot be searched under torchrun; use python tune.py, which gives each trial a process of its own")
    from optuna import TrialPruned

    from engine import strategy

    strategy.start(settings, plan_of(settings.train, process.world_size()))  # the process group, for the first broadcast
    held: dict[str, Any] = {}

    def begin() -> None:
        held["owner"] = process.lock(place)
        held["study"] = opened(settings, place)

    def draw() -> dict[str, Any] | None:
        requeue_and_top_up(held["study"], settings, alive={identity()})
        if enough(held["study"], settings, held["begun"]):
            return None
        held["trial"] = held["study"].ask()
        held["trial"].set_user_attr("worker", identity())
        return search.suggest(held["trial"], settings.tune.space)

    def report(step: int, score: float) -> None:
        def decide() -> bool:
            held["trial"].report(score, step)
            return held["trial"].should_prune()

        if process.on_rank_zero(decide):
            raise TrialPruned

    held["begun"] = time.monotonic()
    process.on_rank_zero(begin)
    trials = Trials(settings)
    while (values := process.on_rank_zero(draw)) is not None:
        outcome = run(trials, values, report)
        process.on_rank_zero(lambda outcome=outcome: tell(held["study"], held["trial"], outcome))
        process.say(live_line(held["study"], settings, held["begun"]) if process.rank() == 0 else "")
    process.on_rank_zero(lambda: study_report.conclude(held["study"], settings, place))


# The supervisor: counts, restarts, reports


def opened(settings: Settings, place: Path) -> Any:
    """The study with its first trial waiting: the numbers of the config."""
    search.mend_journal(place)
    study = search.open_study(settings, place, settings.run.seed, rule(settings)[0])
    if not trials_in(study):
        study.enqueue_trial(search.first_trial(settings), user_attrs={"queued": True})
    return study


def requeue_and_top_up(study: Any, settings: Settings, alive: set[str]) -> None:
    """Fail the trials of dead workers of this host and queue their parameters again; keep the count that is wanted."""
    from optuna.trial import TrialState

    for trial in trials_in(study, "RUNNING"):
        worker = trial.user_attrs.get("worker", "")
        if worker in alive or (worker and worker.split("/")[0] != socket.gethostname()):
            continue
        if not worker and alive:  # asked for a moment ago: its worker has not signed it yet
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"queued": True, "retry_of": trial.number})
    missing = settings.tune.trials - len(trials_in(study, "COMPLETE", "PRUNED", "RUNNING", "WAITING"))
    for _ in range(missing):
        study.enqueue_trial({}, user_attrs={"queued": True})


def enough(study: Any, settings: Settings, begun: float) -> bool:
    late = 0 < settings.tune.timeout <= time.monotonic() - begun
    return late or not trials_in(study, "WAITING") or failed_in_a_row(study) >= MOST_FAILURES


def failed_in_a_row(study: Any) -> int:
    ended = sorted(trials_in(study, "COMPLETE", "PRUNED", "FAIL"), key=lambda trial: trial.datetime_complete)
    count = 0
    for trial in reversed([trial for trial in ended if trial.state.name != "FAIL" or "reason" in trial.user_attrs]):
        if trial.state.name != "FAIL":
            break
        count += 1
    return count


def supervise(settings: Settings, place: Path) -> None:
    """Start workers, replace those that die, until the wanted number of trials has finished."""
    owner = process.lock(place)  # noqa: F841, the lock lasts as long as this name
    study = opened(settings, place)
    begun = time.monotonic()
    workers: dict[int, subprocess.Popen] = {}
    shown, deaths, done = "", 0, 0
    try:
        while True:
            deaths = count_deaths(workers, deaths)
            if (now_done := len(trials_in(study, "COMPLETE", "PRUNED"))) > done:
                deaths, done = 0, now_done
            alive = {f"{socket.gethostname()}/{worker.pid}" for worker in workers.values() if worker.poll() is None}
            requeue_and_top_up(study, settings, alive)
            if enough(study, settings, begun) and not alive:
                break
            for number in range(settings.tune.workers):
                if not enough(study, settings, begun) and number not in workers:
                    workers[number] = start_worker(settings, number)
            line = live_line(study, settings, begun)
            if line != shown:
                print(line, flush=True)
                shown = line
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("interrupted; finished trials are kept, the same command goes on", flush=True)
        raise
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    study_report.conclude(study, settings, place)


def count_deaths(workers: dict[int, subprocess.Popen], deaths: int) -> int:
    """Take ended workers off the list. Raises UserError where none can work: the reason stands above, from the worker itself."""
    for number, status in [(number, worker.poll()) for number, worker in workers.items()]:
        if status is not None:
            del workers[number]
            deaths += status != 0
            if status == 2 or deaths >= 2 * MOST_FAILURES:
                raise UserError(f"tune: worker {number} ended with status {status}; its own words are above")
    return deaths


def start_worker(settings: Settings, number: int) -> subprocess.Popen:
    """A worker of its own GPU, or share of cores. It asks to die with this process."""
    import torch

    environment = dict(os.environ)
    cores = max(1, (os.cpu_count() or 1) // settings.tune.workers)
    environment.setdefault("OMP_NUM_THREADS", str(cores))
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    return subprocess.Popen([sys.executable, *sys.argv, "--worker", str(number)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def live_line(study: Any, settings: Settings, begun: float) -> str:
    count = {state: len(trials_in(study, state)) for state in ("COMPLETE", "PRUNED", "FAIL")}
    done = count["COMPLETE"] + count["PRUNED"]
    best = f"{study.best_value:.6g}" if count["COMPLETE"] else "none yet"
    return f"best {best}  done {done}/{settings.tune.trials}  pruned {count['PRUNED']}  failed {count['FAIL']}"


if __name__ == "__main__":
    process.die_with_launcher()
    sys.exit(process.exit_status(main))
