"""Which trials of a study are still wanted, and who is at work on them."""

import datetime
import os
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import psutil

from engine.config import UserError
from engine.search import first_trial, suggest
from engine.settings import Settings
from engine.study import open_study

MOST_FAILURES = 5  # one after another
TRIES = 3  # of a trial whose worker died
UNSIGNED = 5  # seconds within which a worker signs a trial
AHEAD = 4  # waiting trials for each worker, at least 16 in all: a study that is told to end earlier must not have queued thousands


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


class Slots:
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
