"""train.py with what a test asks of it in the environment; tests run it in train.py's place, and no product code knows of it.

KILL = "<point>/<n>/<rank>/<victim>", KILLS = a file: SIGKILL (or SIGNAL) the n-th time that the rank comes to a point: a name of
engine.checkpoint.phase, "step" (an optimizer step is done) or "file" (a file is about to be brought to the disk, renamed or removed). The
victim is the "rank" alone, or the "launcher" too. A line in KILLS says that it came so far. Only in a launcher's first try.

AT_STEPS = "<n>/<m>": between the two steps, LARGEST = bytes of a file at most, or FULL = a folder whose disk is full.
POSITIONS = folder: the samples of every micro-step that count, a line each.
MASTERS = folder: the fp32 weights of every saved step, gathered by DeepSpeed, as safetensors.
FIRST_STEP = file: made when the first optimizer step is done.
"""

import os
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINE = os.environ.get("RANK", "0")


class Killer:
    def __init__(self) -> None:
        self.point, count, _, self.victim = os.environ["KILL"].split("/")
        self.left = int(count)

    def reached(self, point: str) -> None:
        self.left -= point == self.point
        if self.left:
            return
        self.left = -1
        number = signal.Signals[os.environ.get("SIGNAL", "SIGKILL")]
        with open(os.environ["KILLS"], "a") as file:
            file.write(os.environ["KILL"] + "\n")
        if self.victim == "launcher":
            os.kill(os.getppid(), number)
        if self.victim == "rank" or number == signal.SIGKILL:
            os.kill(os.getpid(), number)

    def before(self, function: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            self.reached("file")
            return function(*arguments, **options)

        return called

    def watch(self) -> None:
        from engine import checkpoint

        checkpoint.phase = self.reached
        after_each_step(lambda: self.reached("step"))
        os.fsync, os.rename, os.replace, shutil.rmtree = map(self.before, (os.fsync, os.rename, os.replace, shutil.rmtree))


def after_each_step(function: Any) -> None:
    """Called once a step, where the ranks read whether to stop. (ZeRO calls a torch optimizer more than once.)"""
    from engine.process import Agreement

    read = Agreement.read
    Agreement.read = lambda self: (function(), read(self))[1]


def starve() -> None:
    """No room for files, from one step to another."""
    first, last = map(int, os.environ["AT_STEPS"].split("/"))
    filler = Path(os.environ.get("FULL", "."), "filler")
    step = 0

    def room(largest: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def count() -> None:
        nonlocal step
        step += 1
        if step == first:
            fill() if "FULL" in os.environ else room(int(os.environ["LARGEST"]))
        elif step == last:
            filler.unlink() if "FULL" in os.environ else room(resource.RLIM_INFINITY)

    after_each_step(count)


def record_positions() -> None:
    from engine import order

    file = open(Path(os.environ["POSITIONS"], f"{os.getpid()}.txt"), "w", buffering=1)
    fetch = order.Factored.__getitems__

    def recorded(self: Any, item: Any) -> Any:
        positions, factors = item
        print(*positions[factors > 0].tolist(), file=file)
        return fetch(self, item)

    order.Factored.__getitems__ = recorded


def gather_masters() -> None:
    from engine import checkpoint

    save = checkpoint.Saver.save

    def saved(self: Any, progress: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param
        from safetensors.torch import save_file

        model = self.parts[2]
        masters = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
        if MINE == "0":
            save_file(masters, Path(os.environ["MASTERS"], f"{progress.step}.safetensors"))
        save(self, progress)

    checkpoint.Saver.save = saved


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    asked = os.environ
    if "KILL" in asked and asked["KILL"].split("/")[2] == MINE and asked.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        Killer().watch()
    if "AT_STEPS" in asked and MINE == "0":
        starve()
    if "POSITIONS" in asked:
        record_positions()
    if "MASTERS" in asked:
        gather_masters()
    if "FIRST_STEP" in asked:
        after_each_step(Path(asked["FIRST_STEP"]).touch)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
