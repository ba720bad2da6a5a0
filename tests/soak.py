"""Kill runs again and again, and compare what they end with with runs that were never killed.

    make soak
    python tests/soak.py --kills 200 --seed 0

Runs of one process, ddp x 2 and zero3-offload x 2 are killed by SIGKILL up to three times each, at random steps, inside every phase
of saving and before random file operations; of one rank, or of the launcher with all its ranks. The same command resumes them until they end. Their
weights, moments and journals (without the clocks) must equal, bit for bit, those of the straight run. Exit status 1 on one difference.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launch

ALL_RANKS = ("step", "copy", "write", "gather")
SHARDED = ("written model", "written optim")  # under ddp rank 0 alone writes tensors
RANK_ZERO = ("manifest", "rename", "prune", "file")
LATEST = {"step": 8, "file": 40}  # of a process's n-th times; a phase comes about nine times in a run


@dataclass(frozen=True)
class Kind:
    name: str
    processes: int
    strategy: str

    def start(self, run: Path, *more: str, root: Path = launch.ROOT, **how: Any) -> launch.Running:
        """The tiny run in a folder, by this repository or a copy. `how` as for launch.start, and the variables of tests/child.py."""
        words = [*launch.TINY, launch.halves(self.processes), f"strategy.name={self.strategy}", f"run.dir={run}", *more]
        script = root / ("tests/child.py" if any(key.isupper() for key in how) else "train.py")
        return launch.start(*words, log=launch.new_log(run), processes=self.processes, script=script, **how)

    def points(self, random_numbers: random.Random) -> Iterator[str]:
        """KILL of tests/child.py, without end: every point, rank and victim in turn, in an order drawn anew each time."""
        places = [("step", rank) for rank in range(self.processes)]  # "step" twice: there are many of them
        for rank in range(self.processes):
            first = [*SHARDED, *RANK_ZERO] if rank == 0 else list(SHARDED) if self.strategy == "zero3-offload" else []
            places += [(point, rank) for point in [*ALL_RANKS, *first]]
        victims = ["rank", "launcher"] if self.processes > 1 else ["rank"]
        while True:
            turns = [(*place, victim) for place in places for victim in victims]
            random_numbers.shuffle(turns)
            for point, rank, victim in turns:
                yield f"{point}/{random_numbers.randint(1, LATEST.get(point, 3))}/{rank}/{victim}"


KINDS = [Kind("one process", 1, "ddp"), Kind("ddp x 2", 2, "ddp"), Kind("zero3-offload x 2", 2, "zero3-offload")]


@dataclass
class Count:
    kills: int = 0
    resumed: int = 0
    """starts after a kill that went on from a checkpoint"""
    runs: int = 0
    identical: int = 0
    points: collections.Counter = field(default_factory=collections.Counter)
    differences: list[str] = field(default_factory=list)


def whole(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    return sorted((folder / "checkpoints").glob("epoch=*"), key=lambda path: path.name.rpartition("=")[2])[-1]


def outcome(run: Path) -> dict[str, object]:
    """All that must not depend on kills, by file."""
    last = whole(run)
    found: dict[str, object] = {f"{last.name}/{path.name}": path.read_bytes() for path in last.iterdir()}
    found |= {f"best/{path.name}": path.read_bytes() for path in (run / "best").glob("*.safetensors")}
    for name in ("metrics.jsonl", "steps.jsonl", "result.json"):
        text = (run / name).read_text()
        lines = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else [json.loads(text)]
        found[name] = [{key: value for key, value in line.items() if key != "clock"} for line in lines]
    return found


def differences(run: Path, straight: Path) -> list[str]:
    mine, wanted = outcome(run), outcome(straight)
    return sorted(name for name in mine.keys() | wanted if mine.get(name) != wanted.get(name))


def killed_run(kind: Kind, run: Path, points: list[str], cold: bool, count: Count) -> str:
    """One run to its end, through kills at these points. What went wrong, if anything."""
    kills = run.with_suffix(".kills")
    kills.touch()
    for point in [*points, None]:
        known, died = any((run / "checkpoints").glob("epoch=*")), kills.read_text()
        running = kind.start(run, cold=cold, **({"KILL": point, "KILLS": str(kills)} if point else {}))
        status = running.wait(180)
        resumed = "\nresumed " in running.text
        count.resumed += resumed
        if kills.read_text() != died:
            count.kills += 1
            count.points[point.split("/")[0]] += 1
        elif status or resumed != known:
            return f"status {status}, resumed: {resumed}, see {running.log}"
        else:
            break  # its last start, or the point never came
    return ""


def soak(kills: int, seed: int, folder: Path, cold_every: int = 0, kinds: list[Kind] = KINDS) -> Count:
    """Kill runs of these kinds in turn until so many kills are spent. Every `cold_every`-th run goes by the real commands."""
    random_numbers = random.Random(seed)
    points = {kind: kind.points(random_numbers) for kind in kinds}
    straight = {kind: folder / f"straight {kind.name}" for kind in kinds}
    for kind, run in straight.items():
        kind.start(run).succeed(180)
    count = Count()
    while count.kills < kills and not count.differences:
        kind = kinds[count.runs % len(kinds)]
        run = folder / f"run {count.runs}"
        wanted = min(kills - count.kills, random_numbers.choice([1, 2, 3, 3]))
        count.runs += 1
        cold = cold_every > 0 and count.runs % cold_every == 0
        wrong = killed_run(kind, run, [next(points[kind]) for _ in range(wanted)], cold, count)
        count.differences += [f"{run}: {kind.name}: {line}" for line in ([wrong] if wrong else differences(run, straight[kind]))]
        if not count.differences:
            count.identical += 1
            shutil.rmtree(run)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold-every", type=int, default=10, help="each so many runs go by `python` and `torchrun` themselves; 0: none")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    begun = time.monotonic()
    count = soak(options.kills, options.seed, folder, options.cold_every)
    print(*(f"{point}: {number}" for point, number in sorted(count.points.items())), sep=", ")
    print(f"{count.kills} kills, {count.resumed} resumed from a checkpoint, {count.identical} of {count.runs} runs identical; ", end="")
    print(f"seed {options.seed}, {time.monotonic() - begun:.0f} s")
    print("\n".join(count.differences))
    if not count.differences:
        shutil.rmtree(folder)
    return 1 if count.differences else 0


if __name__ == "__main__":
    sys.exit(main())
