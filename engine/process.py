"""Processes: exit status, one word for all ranks, stopping together, dying with the launcher, one owner a run folder, whole files."""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from engine.config import UserError, fail

DIVERGED, STOPPED = 3, 143


class Diverged(Exception):
    """The loss or a weight is not finite. Exit status 3."""


class Stopped(Exception):
    """A signal asked for the end, and the state is saved. Exit status 143."""


def stop(*_: Any) -> None:
    """A handler of signals, where nothing is to be saved first."""
    raise Stopped("stopped by a signal")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(line: str) -> None:
    """One line, from rank 0."""
    if rank() == 0:
        print(line, flush=True)


def warn(line: str) -> None:
    """One line from rank 0 of what goes wrong and ends nothing, where errors stand: a search keeps its workers' other output to itself."""
    if rank() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def exit_status(main: Callable[[], Any]) -> int:
    """Run a script's main and turn its end into the status of the process; no traceback for a mistake of the user's."""
    try:
        main()
        return 0
    except UserError as error:
        if rank() > 0:  # rank 0 has mostly met the same mistake and ends all; where it has not, this line would be lost
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        fail(error)
        return 2
    except OSError as error:  # wherever a disk is full or a folder may not be written
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) or not error.filename:
            raise
        fail(UserError(f"{error.filename}: {error.strerror}; make room or permit it, the same command goes on"))
        return 2
    except Diverged as error:
        say(f"diverged: {error}")
        return DIVERGED
    except Stopped as error:
        say(str(error))
        return STOPPED
    except KeyboardInterrupt:
        say("interrupted; the same command continues from the last checkpoint")
        return 130
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def join(backend: str) -> None:
    """Make the default group of all processes.

    torchrun keeps one store over its restarts, with the addresses of dead ranks in it (pytorch issue 135712). So rank 0 names
    each start, and the others ask for its name under names of their own, which cannot be left from before.
    """
    # The launcher's own store is there before its ranks. Where it is not, the launcher died before die_with_launcher was called.
    usual = dist.constants.default_pg_timeout
    patience = timedelta(seconds=30) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else usual
    store, me, processes = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(usual)
    if me > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{me}", question)
        start = store.get(f"answer/{question}").decode()
        store.set(f"heard/{start}/{me}", "")
    else:
        start, others = uuid.uuid4().hex, range(1, processes)
        while not store.check([f"heard/{start}/{other}" for other in others]):
            for other in others:
                if store.check([f"question/{other}"]):
                    store.set(f"answer/{store.get(f'question/{other}').decode()}", start)
            time.sleep(0.01)
    dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=me, world_size=processes)


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """What rank 0's call returns, on every rank; a UserError there is raised on every rank too."""
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = error.lines
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(*answer[1])
    return answer[0]


def die_with_launcher() -> None:
    """Ask the kernel to kill this rank when its launcher dies: torchrun starts ranks in process groups of their own.

    Only under a launcher: `nohup python train.py &` must outlive its shell. The kernel watches the parent *thread*.
    """
    if "LOCAL_RANK" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Agreement:
    """Flags that all ranks read together, at no wait: reduced in the background from one step boundary to the next.

    The group is gloo's and its own: a flag must neither queue behind gradients nor occupy the GPU.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.flags: Any = (False, False)
        self.work: Any = None

    def issue(self, *flags: bool) -> None:
        self.flags = flags
        if self.group is not None:
            self.flags = torch.tensor(flags, dtype=torch.int32)
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def read(self) -> list[bool]:
        """What was issued last, true where any rank said so."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return [bool(flag) for flag in self.flags]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class StopRequest:
    """Remembers SIGTERM and SIGUSR1 (SLURM's warning) instead of dying of them; restores the old handlers on exit."""

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self.old = {number: signal.signal(number, self._remember) for number in self.signals}
        return self

    def _remember(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def lock(folder: Path) -> IO[str]:
    """Own a run folder until the file is closed or the process ends. Raises UserError that names the owner.

    Data loading processes inherit the lock, so that a killed owner's lasts until they have noticed: hence the retries.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be written: {error.strerror}; set run.dir to another") from None
    deadline = time.monotonic() + 10
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            if time.monotonic() > deadline or alive(owner):
                raise UserError(f"{folder}: locked by {owner or 'another process'}; wait for it or set run.dir") from None
            time.sleep(0.2)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def alive(owner: str) -> bool:
    words = owner.split()
    return len(words) == 4 and words[3] == socket.gethostname() and Path("/proc", words[1]).exists()


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also through a kill or a full disk."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def check_shared(folder: Path) -> None:
    """Raises UserError on every rank where a host does not see the run folder that rank 0 writes."""
    if world_size() == 1:
        return
    mark = folder / f".shared-{on_rank_zero(lambda: uuid.uuid4().hex)}"
    on_rank_zero(lambda: mark.touch())
    seen = gather(None if mark.exists() else socket.gethostname())
    on_rank_zero(lambda: mark.unlink())
    blind = sorted({host for host in seen if host})
    if blind:
        raise UserError(f"{folder}: host {', '.join(blind)} does not see this run folder; put run.dir on a disk that all hosts share")
