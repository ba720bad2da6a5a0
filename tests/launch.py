"""Training in processes of its own, for tests that kill, stop and resume it.

Importing torch and DeepSpeed takes longer than these runs. So a process is forked from one that has imported the packages
(never this repository), and torch's own elastic agent forks its ranks: real processes and real signals, born another way.
`cold=True` is the command that a user types. Conditions are waited for with a deadline; nothing sleeps and hopes.
"""

import atexit
import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ROOT, environment

PACKAGES = [
    "accelerate", "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "matplotlib.backends.backend_agg", "pandas",
    "sklearn.datasets", "tomli", "torch._inductor.compile_fx", "torch.distributed.run", "torchmetrics", "tqdm", "transformers",
]  # fmt: skip
SINGLE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

TINY = (
    "model.width=16", "model.depth=1", "train.steps=24", "train.batch_size=64", "train.clip=1.0", "train.log_every=3",
    "train.eval_every=7", "train.save_every=5", "run.deterministic=true",
)  # fmt: skip
"""The bundled digits with dropout, past the end of an epoch (19 steps); what is logged, scored and saved never coincides for long."""


def halves(processes: int) -> str:
    """Accumulation over two micro-steps."""
    return f"train.micro_batch={64 // 2 // processes}"


@dataclass
class Running:
    """A started command and the file of all that it prints."""

    process: Any
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        if not eventually(lambda: self.poll() is not None, timeout):
            self.end()
            raise AssertionError(f"still running after {timeout} s:\n{self.text}")
        return self.poll()

    def succeed(self, timeout: float = 120) -> str:
        """What it printed; it must end with status 0."""
        status = self.wait(timeout)
        assert status == 0, f"status {status}:\n{self.text}"
        return self.text

    def until(self, condition: str | Callable[[], Any], timeout: float = 60) -> None:
        """Wait for a text in its output, or for a condition, while it runs."""
        met = (lambda: condition in self.text) if isinstance(condition, str) else condition
        if not eventually(lambda: met() or self.poll() is not None, timeout) or not met():
            self.end()
            raise AssertionError(f"{condition} did not come:\n{self.text}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ranks(self) -> list[int]:
        """Processes that it started itself."""
        return children(self.pid)

    def end(self) -> None:
        """Kill it with all that it started, whatever their sessions."""
        if self.poll() is None:
            for pid in [*descendants(self.pid), self.pid]:
                send(pid, signal.SIGKILL)
            eventually(lambda: self.poll() is not None, 10)


started: list[Running] = []


@atexit.register
def end_all() -> None:
    while started:
        started.pop().end()


def eventually(condition: Callable[[], Any], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    try:
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield from descendants(child)
        yield child


def alive(pid: int) -> bool:
    """A zombie that nobody has reaped yet does nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: int) -> None:
    if alive(pid):
        os.kill(pid, number)


def new_log(run: Path) -> Path:
    """A file beside a run folder that is not there yet."""
    numbers = (run.with_name(f"{run.name}-{number}.log") for number in itertools.count(1))
    return next(path for path in numbers if not path.exists())


def start(
    *words: object,
    log: Path,
    processes: int = 1,
    launcher: Sequence[str] = (),
    script: Path = ROOT / "train.py",
    folder: Path = ROOT,
    cold: bool = False,
    before: Sequence[str] = (),
    **variables: str,
) -> Running:
    """`python script words`, or `torchrun --nproc_per_node processes launcher script words` for several processes or with options.

    `before` are words in front of a cold command.
    """
    options = ["--nproc_per_node", str(processes), *launcher] if processes > 1 or launcher else []
    command = [str(script), *map(str, words)]
    # What a killed torchrun leaves in the folder for temporary files goes with the log.
    env = environment(**SINGLE, **variables) | {"PYTHONPATH": str(script.parent), "TMPDIR": str(log.parent)}
    log.touch()
    if cold:
        prefix = [*before, sys.executable, *(["-m", "torch.distributed.run", *options] if options else [])]
        with open(log, "a") as output:
            process: Any = subprocess.Popen([*prefix, *command], cwd=folder, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    else:
        os.environ.update(SINGLE)  # threads that a package starts when it is imported would not survive the fork
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PACKAGES)
        process = context.Process(target=forked, args=(options, command, str(folder), env, str(log)))
        process.start()
    started.append(Running(process, log))
    return started[-1]


def copy_of_repository(folder: Path, **files: str) -> Path:
    """The product's own files, and more of them: models__tied="..." becomes models/tied.py."""
    for pattern in ("*.py", "*.toml", "engine/*.py", "models/*.py", "data/*.py", "conf/*.toml", "tests/child.py"):
        for path in ROOT.glob(pattern):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    for name, text in files.items():
        (folder / f"{name.replace('__', '/')}.py").write_text(text)
    return folder


def run(*words: object, timeout: float = 120, **how: Any) -> str:
    """Start it, wait until it has ended with status 0; what it printed. `how` as for `start`."""
    return start(*words, **how).succeed(timeout)


def forked(options: list[str], command: list[str], folder: str, env: dict[str, str], log: str) -> None:
    """The life of a forked process: a script as __main__, or torchrun that forks ranks with it."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process that was not forked from a server
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    if not options:
        return as_main(command)
    from torch.distributed import run as torchrun

    parse = torchrun.config_from_args

    def config_from_args(arguments: Any) -> Any:
        config, _, _ = parse(arguments)
        config.start_method = "fork"
        return config, as_main, [command]

    torchrun.config_from_args = config_from_args
    torchrun.main([*options, *command])


def as_main(command: list[str]) -> None:
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
