"""The search space, the study and its storage, and which of its trials are still wanted: what tune.py asks of Optuna."""

import datetime
import fcntl
import inspect
import json
import math
import os
import socket
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from engine import tracking
from engine.config import UserError, suggestion
from engine.settings import Settings, replaced

RANGE_KEYS = {"low", "high", "log", "step"}
MOST_FAILURES = 5  # one after another
TRIES = 3  # of a trial whose worker died
UNSIGNED = 5  # seconds within which a worker signs a trial
AHEAD = 4  # waiting trials for each worker, at least 16 in all: a study that is told to end earlier must not have queued thousands


def rule(settings: Settings) -> tuple[str, str]:
    """("max" or "min", the score that decides). A study must know it before the first trial."""
    if settings.task.best == "auto":
        raise UserError('task.best = "auto": a search needs it by name, such as "max accuracy" or "min rmse"')
    direction, score = settings.task.best.split()
    return direction, score


# The space


def check_space(settings: Settings) -> None:
    """Every key, range and choice, before the first trial. Raises UserError with a line for each mistake."""
    space, errors = settings.tune.space, []
    if not space:
        errors.append('tune.space: empty; name what is searched, such as "optim.lr" = { low = 1e-5, high = 1e-2, log = true }')
    for key, wanted in space.items():
        try:
            current(settings, key)
            for value in range_ends(settings, key, wanted) if isinstance(wanted, dict) else wanted:
                replaced(settings, {key: value})
            if not wanted:
                raise UserError(f"tune.space.{key!r} = []: empty; give the values to choose from")
        except UserError as error:
            errors += [line if line.startswith("tune.space") else f"tune.space: {line}" for line in error.lines]
    if errors:
        raise UserError(*errors)


def current(settings: Settings, key: str) -> Any:
    """The config's own value of "section.key", or of "section.table.entry" (None where the table lacks it). Raises UserError."""
    values = settings.values()
    section, _, name = key.partition(".")
    name, _, entry = name.partition(".")
    known = [f"{section}.{name}" for section in values.keys() - {"run", "track", "tune"} for name in values[section]]
    if f"{section}.{name}" not in known or (entry and not isinstance(values[section][name], dict)):
        raise UserError(f"tune.space.{key!r}: no such setting{suggestion(key, known)}")
    return values[section][name].get(entry) if entry else values[section][name]


def whole(settings: Settings, key: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a range gives whole numbers: of whole ends, unless the setting itself is a real number."""
    numbers = [wanted["low"], wanted["high"], wanted.get("step", 1)]
    return all(isinstance(number, int) for number in numbers) and not isinstance(current(settings, key), float)


def range_ends(settings: Settings, key: str, wanted: Mapping[str, Any]) -> list[int | float]:
    unknown = sorted(set(wanted) - RANGE_KEYS)
    if unknown:
        raise UserError(f"tune.space.{key!r}: unknown key {unknown[0]!r}{suggestion(unknown[0], RANGE_KEYS)}")
    numbers, log = [wanted.get("low"), wanted.get("high"), wanted.get("step", 1)], wanted.get("log", False)
    if not all(isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in numbers):
        raise UserError(f"tune.space.{key!r} = {dict(wanted)}: needs two numbers, low and high, and step as a number where it is given")
    low, high, step = numbers
    for wrong, said in (
        (low >= high, f"low = {low} must be less than high = {high}"),
        (not isinstance(log, bool), f"log = {log!r} must be true or false"),
        (log is True and low <= 0, f"low = {low} must be above 0 where log = true"),
        (log is True and "step" in wanted, f"step = {step} cannot be had with log = true; drop one"),
        (step <= 0, f"step = {step} must be above 0"),
    ):
        if wrong:
            raise UserError(f"tune.space.{key!r}: {said}")
    return [low, high, low + step] if "step" in wanted and low + step <= high else [low, high]


def plain(wanted: list[Any]) -> bool:
    """Optuna takes no lists or tables as choices: their place stands for them."""
    return all(isinstance(value, str | int | float | bool) for value in wanted)


def chosen(settings: Settings, key: str, drawn: Any) -> Any:
    """The value of a setting, from what Optuna keeps of it."""
    wanted = settings.tune.space[key]
    return drawn if isinstance(wanted, dict) or plain(wanted) or drawn is None else wanted[drawn]


def suggest(trial: Any, settings: Settings) -> dict[str, Any]:
    """The values of a trial by setting."""
    values = {}
    for key, wanted in settings.tune.space.items():
        if not isinstance(wanted, dict):
            values[key] = chosen(settings, key, trial.suggest_categorical(key, wanted if plain(wanted) else range(len(wanted))))
        elif whole(settings, key, wanted):
            values[key] = trial.suggest_int(key, wanted["low"], wanted["high"], step=wanted.get("step", 1), log=wanted.get("log", False))
        else:
            values[key] = trial.suggest_float(key, wanted["low"], wanted["high"], step=wanted.get("step"), log=wanted.get("log", False))
    return values


def first_trial(settings: Settings) -> dict[str, Any]:
    """The config's own numbers, as far as the space holds them."""
    first = {}
    for key, wanted in settings.tune.space.items():
        value = current(settings, key)
        if isinstance(wanted, dict):
            first |= {key: value} if value is not None and wanted["low"] <= value <= wanted["high"] else {}
        elif value in wanted:
            first[key] = value if plain(wanted) else wanted.index(value)
    return first


# The study


def by_name(module: Any, key: str, name: str, options: dict[str, Any]) -> Any:
    """An object of a class of optuna.samplers or optuna.pruners. Raises UserError."""
    known = [word for word in module.__all__ if not word.startswith("Base")]
    if name not in known:
        raise UserError(f"tune.{key} = {name!r}: no such class of {module.__name__}{suggestion(name, known)}")
    try:
        return getattr(module, name)(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"tune.{key}_options = {options}: {name} refuses them: {error}") from None


class JournalLock:
    """The kernel's own lock, which ends with its owner. It also cuts off a line that a kill tore: the next would be glued to it."""

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "r+b")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        size = self.file.seek(0, os.SEEK_END)
        if size and (self.file.seek(-1, os.SEEK_END), self.file.read())[1] != b"\n":
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


def storage(folder: Path, url: str) -> Any:
    """The journal in the study's folder, or any storage of Optuna by its URL. Raises UserError where it cannot be reached."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if not url:
        path = folder / "study.journal"
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
        return optuna.storages.JournalStorage(backend)
    for last in (False, True):
        try:
            return optuna.storages.get_storage(url)
        except (SQLAlchemyError, ValueError, ImportError, OSError) as error:
            if last:
                said = tracking.without_secrets(str(error).splitlines()[0])
                raise UserError(f"tune.storage = {tracking.without_secrets(url)!r}: cannot be reached: {said}") from None
            time.sleep(1)  # another machine may have made the same tables at this moment


def open_study(settings: Settings, folder: Path, seed: int) -> Any:
    """The study of these settings, begun or gone on with. Raises UserError for a study of others."""
    import optuna

    tune = settings.tune
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = dict(tune.sampler_options)
    if "seed" in inspect.signature(getattr(optuna.samplers, tune.sampler, dict).__init__).parameters:
        options.setdefault("seed", seed % 2**32)
    study = optuna.create_study(
        study_name=folder.name,
        sampler=by_name(optuna.samplers, "sampler", tune.sampler, options),
        pruner=by_name(optuna.pruners, "pruner", tune.pruner, tune.pruner_options),
        storage=storage(folder, tune.storage),
        direction={"max": "maximize", "min": "minimize"}[rule(settings)[0]],
        load_if_exists=True,
    )
    ours = json.loads(json.dumps(tracking.result_values(settings.values(), settings, "tune")))
    theirs = study.user_attrs.get("settings", ours)
    for key in sorted(ours.keys() | theirs):
        if ours.get(key) != theirs.get(key):
            what = f"{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
            raise UserError(f"{folder}: the study {folder.name} is one of another config ({what}); set run.dir to another folder")
    if "settings" not in study.user_attrs:
        study.set_user_attr("settings", ours)
    return study


# Which trials are wanted


def identity() -> str:
    """Host, process and when it was born: a process number comes again."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def at_work(trial: Any, waited: float) -> bool:
    """Whether a running trial's worker lives, or may yet sign it, `waited` seconds after it was seen first: clocks of hosts differ.
    Those of other hosts are their own supervisor's affair."""
    host, pid, born = trial.user_attrs.get("worker", "  ").split(" ")
    if not host:
        return waited < UNSIGNED
    try:
        worker = psutil.Process(int(pid)) if host == socket.gethostname() else None
        return worker is None or (abs(worker.create_time() - float(born)) < 3 and worker.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def failed(trial: Any) -> bool:
    """Whether it was given up: for its own reason, or since its workers died again and again."""
    return trial.state.name == "FAIL" and ("reason" in trial.user_attrs or trial.user_attrs["try"] >= TRIES)


class Search:
    """A study, and the slots of its wanted trials.

    A slot is done when one trial of it has finished. Where two supervisors queue a trial for the same slot at once, the lower
    number stands: so many machines end with exactly the wanted count. Trials without a slot lost a race for the last waiting one.
    """

    def __init__(self, settings: Settings, place: Path, begun: float, worker: int = 0):
        self.settings, self.place, self.begun = settings, place, begun
        self.seen: dict[int, float] = {}  # running trials by number, and when
        self.study = open_study(settings, place, settings.run.seed)
        # A sampler that starts anew must not draw what it drew before; the first worker of a fresh study has run.seed itself.
        drawn = len(self.study.get_trials(deepcopy=False)) - len(self.in_state("WAITING"))
        host = zlib.crc32(socket.gethostname().encode()) if settings.tune.storage else 0
        if shift := drawn * settings.tune.workers + worker + host:
            self.study = open_study(settings, place, settings.run.seed + shift)

    def in_state(self, *states: str) -> list[Any]:
        """Trials of slots in these states; all without one."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if "slot" in trial.user_attrs and (not states or trial.state.name in states)]

    def wanted(self, trial: Any) -> bool:
        """Not where tune.trials is less than it was when it was queued."""
        return trial.user_attrs["slot"] < self.settings.tune.trials

    def waiting(self) -> bool:
        return any(map(self.wanted, self.in_state("WAITING")))

    def unsigned(self) -> bool:
        return any("worker" not in trial.user_attrs for trial in self.in_state("RUNNING"))

    def top_up(self) -> int:
        """Fail the trials of dead workers and queue their values again; see that the next slots have a trial. Returns how many were queued."""
        from optuna.trial import TrialState, create_trial

        grid = self.settings.tune.sampler == "GridSampler"  # its cells are all there is to try
        for trial in self.in_state("RUNNING"):
            if not at_work(trial, time.monotonic() - self.seen.setdefault(trial.number, time.monotonic())):
                self.tell(trial.number, "FAIL", None)
        slots: dict[int, list[Any]] = {slot: [] for slot in range(self.settings.tune.trials)}
        for trial in filter(self.wanted, self.in_state()):
            slots[trial.user_attrs["slot"]].append(trial)
        empty = [(slot, trials) for slot, trials in slots.items() if all(trial.state.name == "FAIL" for trial in trials)]
        waiting = sum(trial.state.name == "WAITING" for trials in slots.values() for trial in trials)
        queued = empty[: max(0, max(16, AHEAD * self.settings.tune.workers) - waiting)]
        for slot, trials in queued:
            attributes, known, fixed = {"slot": slot, "try": 1}, {}, {}
            if not trials and slot == 0:
                fixed = first_trial(self.settings)
            elif trials and not failed(trials[-1]):
                attributes["try"], before = trials[-1].user_attrs["try"] + 1, trials[-1].system_attrs
                known = {key: before[key] for key in ("grid_id", "search_space") if key in before}
                fixed = before.get("fixed_params", {}) | trials[-1].params
            # Where nothing is known the attribute must be missing: some samplers leave a trial that has it alone.
            known |= {"fixed_params": fixed} if fixed and not grid else {}
            self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes, system_attrs=known))
        return len(queued)

    def draw(self) -> tuple[Any, dict[str, Any]] | None:
        """The next waiting trial, signed, and its values by setting; None where another worker was faster.

        Raises UserError for a sampler that cannot draw from the space.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial = self.study.ask()
            if not self.sign(trial):
                return None
            return trial, suggest(trial, self.settings)
        except UpdateFinishedTrialError:  # a supervisor took its worker for dead
            return None
        except (ImportError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"tune.sampler = {self.settings.tune.sampler!r}: cannot draw from tune.space: {said}") from None

    def sign(self, trial: Any) -> bool:
        """Whether a drawn trial is this worker's to run."""
        slot = trial.user_attrs.get("slot")
        rivals = [other for other in self.in_state() if other.user_attrs["slot"] == slot and other.number < trial.number]
        if slot is None or not self.wanted(trial) or any(other.state.name != "FAIL" for other in rivals):
            self.tell(trial, "FAIL", None)
            return False
        trial.set_user_attr("worker", identity())
        return True

    def tell(self, trial: Any, state: str, value: Any) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            if state == "FAIL" and value:
                trial.set_user_attr("reason", value)
            self.study.tell(trial, value if state == "COMPLETE" else None, state=TrialState[state], skip_if_finished=True)
        except UpdateFinishedTrialError:
            pass  # a supervisor took its worker for dead
        except RuntimeError:  # how a sampler that has tried all says so, outside of Optuna's own loop
            self.study.set_user_attr("exhausted", True)

    def failures(self) -> list[Any]:
        """The last ones one after another, since this command began."""
        ended = [trial for trial in self.in_state("COMPLETE", "PRUNED", "FAIL") if trial.datetime_complete.timestamp() >= self.begun]
        ended = sorted((trial for trial in ended if trial.state.name != "FAIL" or failed(trial)), key=lambda trial: trial.datetime_complete)
        last = max((place for place, trial in enumerate(ended) if trial.state.name != "FAIL"), default=-1)
        return ended[last + 1 :]

    def over(self) -> bool:
        """Whether no further trial may begin."""
        late = 0 < self.settings.tune.timeout <= time.time() - self.begun
        return late or len(self.failures()) >= MOST_FAILURES or self.study.user_attrs.get("exhausted", False)

    def refuse_failures(self) -> None:
        if len(failures := self.failures()) >= MOST_FAILURES:
            reason = failures[-1].user_attrs.get("reason", "its worker died")
            raise UserError(f"{len(failures)} trials failed one after another, the last by: {reason}")

    def line(self) -> str:
        """Best value, trials done, pruned, failed, time left."""
        complete, pruned = self.in_state("COMPLETE"), self.in_state("PRUNED")
        done, trials, now = complete + pruned, self.settings.tune.trials, time.time()
        best = f"{self.study.best_value:.6g}" if complete else "none yet"
        text = f"best {best}  done {len(done)}/{trials}  pruned {len(pruned)}  failed {sum(map(failed, self.in_state('FAIL')))}"
        lately = sum(trial.datetime_complete.timestamp() >= self.begun for trial in done)
        left = [(now - self.begun) / lately * (trials - len(done))] if lately else []
        left += [self.begun + self.settings.tune.timeout - now] if self.settings.tune.timeout else []
        return f"{text}  left {datetime.timedelta(seconds=round(max(0, min(left))))}" if left else text
