"""Checkpoints that cannot be lost: written aside, hashed, committed by one rename, verified before they are loaded.

checkpoints/epoch=003-step=00000120/ holds model*.safetensors and optim*.safetensors (one each, or one a rank under ZeRO-3)
and manifest.json: hashes, shapes and the small Progress. Nothing in it can execute.

    python -m engine.checkpoint RUN_OR_CHECKPOINT --output DIR      consolidate weights into one file, without processes
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from engine import metrics, process, state
from engine.config import UserError
from engine.process import Diverged
from engine.tensors import StoredTensors, fsync_folder, sha256, write_tensors

FORMAT = 1


@dataclasses.dataclass
class Progress:
    """All that is not a tensor: where the run is and what it has seen."""

    step: int = 0
    """optimizer steps done"""
    steps_per_epoch: int = 1
    """of this run, for losses that change over epochs"""
    pinned: list[list[float]] = dataclasses.field(default_factory=list)
    """[score, step] of the best evaluations, best first: their checkpoints are kept"""
    evaluations_since_best: int = 0
    loss_sums: list[float] = dataclasses.field(default_factory=list)
    """each rank's sum of step losses since the last log line"""
    loss_steps: int = 0
    """how many they are"""

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def judge(self, score: float, direction: str, min_delta: float, keep_best: int) -> bool:
        """Take in an evaluation's deciding score; whether it is the best so far. A score that is not finite never is."""
        improved = math.isfinite(score) and metrics.better(direction, score, self.pinned[0][0] if self.pinned else None, min_delta)
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1
        if improved:
            self.pinned.insert(0, [score, self.step])
        elif math.isfinite(score):
            rest = sorted([*self.pinned[1:], [score, self.step]], reverse=direction == "max", key=lambda pin: pin[0])
            self.pinned = [*self.pinned[:1], *rest]
        del self.pinned[keep_best:]
        return improved

    def pinned_steps(self) -> set[int]:
        return {int(step) for _, step in self.pinned}


def phase(name: str) -> None:
    """A named point of saving. Tests put a SIGKILL here."""


def folder_name(step: int, steps_per_epoch: int) -> str:
    return f"epoch={step // steps_per_epoch:03d}-step={step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("=")[2])


def folders(run: Path) -> list[Path]:
    """Committed checkpoints, newest first, whole or not."""
    return listing(run / "checkpoints")


def listing(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("epoch=*-step=*") if re.fullmatch(r"epoch=\d+-step=\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


class Saver:
    """Saves while training goes on: the state is copied into kept buffers, a thread writes it, a later step commits.

    The thread only writes. Collective calls and the rename belong to the main thread: two threads that issue collectives on
    one group can deadlock.
    """

    def __init__(self, run: Path | None, parts: tuple[Any, ...], keep_last: int, steps_per_epoch: int, saved_step: int):
        """`parts` are what state.capture takes: accelerator, wrapped model, model, optimizer. Without a run nothing is saved."""
        self.folder = run / "checkpoints" if run else None
        self.parts = parts
        self.keep_last = keep_last
        self.steps_per_epoch = steps_per_epoch
        self.buffers: dict[str, torch.Tensor] = {}
        self.thread: threading.Thread | None = None
        self.saved_step = saved_step
        self.whole = True  # whether the last one written is
        if self.folder and process.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in [*self.folder.glob(".tmp-*"), *self.folder.glob(".old-*")]:
                shutil.rmtree(left)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def save(self, progress: Progress) -> None:
        """Collective. Blocks for the copy, and for the previous save where that is not done."""
        if progress.step == self.saved_step or self.folder is None:
            return
        self.commit()
        captured = state.capture(*self.parts)
        phase("copy")
        weights, moments = self.copied(captured.weights), self.copied(captured.moments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.pinned = progress.pinned_steps()
        self.saved_step = progress.step
        self.manifest = {
            "format": FORMAT,
            "progress": dataclasses.asdict(progress),
            "processes": process.world_size(),
            "sharded": bool(captured.shapes),
            "shapes": captured.shapes,
            "aliases": state.aliases(self.parts[2]),
            "moments": state.moments_form(self.parts[3]),
            "scaler": captured.scaler,
        }
        self.target = self.folder / folder_name(progress.step, self.steps_per_epoch)
        self.written: dict[str, Any] = {}
        self.failure: str | None = "the writing thread died"
        self.thread = threading.Thread(target=self._write, args=(weights, moments, bool(captured.shapes)))
        self.thread.start()

    def copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            if name not in self.buffers or self.buffers[name].shape != tensor.shape:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor, non_blocking=True)
        return {name: self.buffers[name] for name in tensors}

    @property
    def aside(self) -> Path:
        return self.folder / f".tmp-{self.target.name}"

    def _write(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], sharded: bool) -> None:
        try:
            bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not finite(tensor)]
            if bad:
                self.failure = f"{bad[0]} is not finite"
                return
            phase("write")
            self.aside.mkdir(exist_ok=True)
            suffix = f"-{process.rank():05d}-of-{process.world_size():05d}" if sharded else ""
            for kind, tensors in (("model", weights), ("optim", moments)):
                if tensors:
                    name = f"{kind}{suffix}.safetensors"
                    self.written[name] = write_tensors(self.aside / name, tensors)
                    phase(f"written {kind}")
            self.failure = None
        except OSError as error:  # disk full, permission: training goes on, the last whole checkpoint stays
            self.failure = str(error)

    def commit(self) -> bool:
        """Collective. Waits for the writers, then makes the checkpoint exist by one rename. Returns whether the last one does. Raises Diverged."""
        if self.thread is None:
            return self.whole
        self.thread.join()
        self.thread = None
        phase("gather")
        reports = process.gather((self.written, self.failure))
        failures = [failure for _, failure in reports if failure]
        if diverged := [failure for failure in failures if failure.endswith("not finite")]:
            raise Diverged(f"{diverged[0]} after step {self.saved_step}; the checkpoint before it stays the last")
        self.whole = not failures
        if process.rank() == 0:
            self._finish({name: entry for written, _ in reports for name, entry in written.items()}, failures)
        return self.whole

    def _finish(self, files: dict[str, Any], failures: list[str]) -> None:
        try:
            if failures:
                raise OSError(failures[0])
            phase("manifest")
            write_manifest(self.aside, self.manifest | {"files": files})
            phase("rename")
            shutil.rmtree(self.target, ignore_errors=True)  # torn remains of the same step
            os.rename(self.aside, self.target)
            fsync_folder(self.folder)
            phase("prune")
            self._prune()
        except OSError as error:
            self.whole = False
            shutil.rmtree(self.aside, ignore_errors=True)
            process.warn(f"saving step {self.saved_step}: {error}; training goes on, the last whole checkpoint stays")

    def _prune(self) -> None:
        # Later ones are those that were skipped at the start: counted, they would push out the whole ones.
        found = [path for path in folders(self.folder.parent) if step_of(path) <= self.saved_step]
        keep = {step_of(path) for path in found[: self.keep_last]} | self.pinned
        for path in found:
            if step_of(path) not in keep:
                aside = path.with_name(f".old-{path.name}")  # renamed first: a kill must not leave half a checkpoint
                os.rename(path, aside)
                threading.Thread(target=shutil.rmtree, args=(aside, True)).start()  # 0.2 s a GB


def finite(tensor: torch.Tensor) -> bool:
    """By one sum, which in 16 bits would be infinite beyond 65,504."""
    return math.isfinite(float(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    with open(path, "w") as file:
        json.dump(manifest | {"digest": digest_of(manifest)}, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def problem(folder: Path) -> str | None:
    """Why a checkpoint must not be loaded, or None for a whole one. Reads and hashes every byte."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = manifest.pop("digest")
    except OSError as error:
        return f"manifest.json: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError):
        return "manifest.json is torn"
    if digest != digest_of(manifest) or manifest["format"] != FORMAT:
        return "manifest.json was altered"
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name in sorted(present - set(manifest["files"])):
        return f"{name} does not belong to it"
    # Names come from a listing of the folder, so that no path in a manifest can lead out of it.
    for name, entry in manifest["files"].items():
        path = folder / name
        if name not in present or not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{name} was altered"
    return None


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that verifies; says which were skipped and why."""
    for folder in folders(run):
        reason = problem(folder)
        if reason is None:
            return folder
        print(f"skipped {folder}: {reason}", flush=True)
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def stored(folder: Path, manifest: dict[str, Any], kinds: tuple[str, ...] = ("model", "optim")) -> StoredTensors:
    files = sorted(name for name in manifest["files"] if name.startswith(kinds))
    return StoredTensors([folder / name for name in files], manifest["shapes"])


def resume(run: Path, accelerator: Any, wrapped: Any, model: Any, optimizer: Any) -> Progress:
    """Weights, moments and progress of the newest whole checkpoint, on every rank; a fresh Progress where there is none."""
    folder = process.on_rank_zero(lambda: newest_whole(run))
    if folder is None:
        return Progress()
    manifest = read_manifest(folder)
    there, now = manifest["moments"], state.moments_form(optimizer)
    if there != now:
        process.say(f"the moments of {there} are left behind: the optimizer is now {now}")
    tensors = stored(folder, manifest, ("model", "optim") if there == now else ("model",))
    refuse_other_models(run, folder, tensors, model)
    form, now = (manifest["sharded"], manifest["processes"]), (state.zero_stage(wrapped) == 3, process.world_size())
    if form != now:
        process.say(f"converted {folder.name} from {form_name(*form)} to {form_name(*now)}")
    state.restore(accelerator, wrapped, model, optimizer, tensors, manifest["scaler"])
    progress = Progress(**manifest["progress"])
    if len(progress.loss_sums) != process.world_size():  # their mean is what is logged
        progress.loss_sums = [sum(progress.loss_sums) / max(1, len(progress.loss_sums))] * process.world_size()
    process.say(f"resumed {folder} at step {progress.step}")
    return progress


def refuse_other_models(run: Path, folder: Path, tensors: StoredTensors, model: Any) -> None:
    """Raises UserError where names or shapes differ. What run.resume has just brought into a fresh folder is put aside then."""
    wanted = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in [*model.named_parameters(), *state.buffers(model).items()]}
    wanted = {name: list(shape) for name, shape in wanted.items()}
    saved = {name: list(tensors.spec(name)[1]) for name in tensors.places if not name.startswith("optim.")}
    different = sorted(name for name in wanted.keys() | saved if wanted.get(name) != saved.get(name))
    if not different:
        return
    shapes = f"{different[0]} is {saved.get(different[0], 'missing')} there, {wanted.get(different[0], 'missing')} here"
    if not (run / "tracker.json").exists() and process.rank() == 0:  # no step was made here
        shutil.rmtree(run / "refused", ignore_errors=True)
        os.rename(run / "checkpoints", run / "refused")
    raise UserError(f"{folder}: it is of another model ({shapes}); give the settings of that model, or another run.dir or run.resume")


def form_name(sharded: bool, processes: int) -> str:
    return f"{'shards' if sharded else 'whole tensors'} of {processes} process{'es' if processes > 1 else ''}"


def adopt(source: Path, run: Path) -> None:
    """Copy a chosen checkpoint (or a run's newest whole one), what it pins and the history so far into a fresh run folder."""
    chosen = (source if (source / "manifest.json").exists() else newest_whole(source) or source).resolve()
    reason = problem(chosen) if chosen in listing(chosen.parent) else "neither a run folder with a whole checkpoint nor a checkpoint"
    if reason:
        raise UserError(f"run.resume = {str(source)!r}: {reason}; choose another")
    progress = Progress(**read_manifest(chosen)["progress"])
    wanted = {progress.step} | progress.pinned_steps()
    for name in ("metrics.jsonl", "steps.jsonl"):
        if (chosen.parent.parent / name).exists():
            shutil.copy(chosen.parent.parent / name, run / name)
    aside = run / ".tmp-checkpoints"  # all of them or none: without, the run folder still counts as fresh
    shutil.rmtree(aside, ignore_errors=True)
    for path in listing(chosen.parent):
        if step_of(path) in wanted:
            shutil.copytree(path, aside / path.name)
    os.rename(aside, run / "checkpoints")


if __name__ == "__main__":
    from engine.export import main

    raise SystemExit(process.exit_status(main))
