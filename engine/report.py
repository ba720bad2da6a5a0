"""What a run says: console lines and metrics.jsonl."""

import contextlib
import itertools
import json
import os
import resource
import sys
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import process

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12, "V100": 125e12, "4090": 165e12}
"""16-bit floating-point operations a second, dense, of devices by a part of their names"""


Table = tuple[str, list[str], list[list[Any]]]
"""name, columns, rows: for a tracker"""


class Journal:
    """A file of one JSON object a line, cut back to a step when a run resumes, so that no line stands twice."""

    def __init__(self, run: Path | None, name: str, step: int):
        self.file, self.pending = None, b""
        if run and process.rank() == 0:
            kept = [json.dumps(line) + "\n" for line in read_lines(run / name) if line["step"] <= step]
            process.write_text(run / name, "".join(kept))
            self.file = open(run / name, "ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        """Times and rates belong inside line["clock"]: all else is equal in a run that was killed and one that was not."""
        if self.file:
            self.pending += (json.dumps(line) + "\n").encode()
            with contextlib.suppress(OSError):  # the disk is full, as the saver says too: once there is room again
                self.pending = self.pending[self.file.write(self.pending) :]

    def close(self) -> None:
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, if there is one; a kill may have torn the last one."""
    lines = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for text in path.read_text().splitlines():
            lines.append(json.loads(text))
    return lines


def earlier_seconds(lines: list[dict[str, Any]]) -> float:
    """What a run took before its last resume, by metrics.jsonl: each process counts from its own start."""
    clocks = [line["clock"]["seconds"] for line in lines]
    return sum(now for now, following in itertools.pairwise(clocks) if following < now)


def history(run: Path, step: int) -> list[dict[str, Any]]:
    """All that was logged up to a step, in the order of steps."""
    lines = [*read_lines(run / "steps.jsonl"), *read_lines(run / "metrics.jsonl")]
    return sorted((line for line in lines if line["step"] <= step), key=lambda line: line["step"])


class Clock:
    """Seconds and rates for the "clock" objects; time spent in `paused` counts as no training."""

    def __init__(self, step: int, batch_size: int, dataset: Any = None, model: Any = None):
        self.batch_size = batch_size
        self.tokens, self.flops = getattr(dataset, "tokens_per_sample", 0), getattr(model, "flops_per_token", 0)
        self.begun = time.perf_counter()
        self.restart(step)

    def restart(self, step: int) -> None:
        self.since, self.step, self.pause = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """Seconds since the start; seconds a step and samples a second of training since `restart`; the peak of memory in 2**20 bytes.

        Where samples are of `tokens_per_sample` tokens, also these a second, and where the model has `flops_per_token` and the device
        is a known one, the share of its peak that they are (model FLOPs utilisation).
        """
        now = time.perf_counter()
        each = max(1e-9, now - self.since - self.pause) / max(1, step - self.step)
        cuda = torch.cuda.is_available()
        memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        rates = {"samples_per_second": round(self.batch_size / each, 1), "step_seconds": round(each, 6), "memory_mb": round(memory, 1)}
        if self.tokens:
            rates["tokens_per_second"] = round(self.batch_size * self.tokens / each, 1)
        peak = next((peak for name, peak in PEAK.items() if cuda and name in torch.cuda.get_device_name()), 0.0)
        if self.tokens and self.flops and peak:
            rates["flops_utilisation"] = round(rates["tokens_per_second"] * self.flops / peak / process.world_size(), 4)
        return {"seconds": round(now - self.begun, 3)} | rates


class Journals(contextlib.ExitStack):
    """metrics.jsonl, a line an evaluation; steps.jsonl, a line each train.log_every; the tracker; the bar or lines on the screen."""

    def __init__(self, run: Path | None, step: int, total: int, tracker: Any = None):
        from tqdm import tqdm

        super().__init__()
        self.tell = tracker.log if tracker else lambda line: None
        self.evaluations, self.steps = Journal(run, "metrics.jsonl", step), Journal(run, "steps.jsonl", step)
        hidden = self.steps.file is None or not sys.stderr.isatty()  # a bar on a terminal, plain lines elsewhere
        self.bar = tqdm(initial=step, total=total, unit="step", disable=hidden, dynamic_ncols=True, mininterval=0.5)
        self.tick = self.bar.update
        for part in (self.steps, self.evaluations, self.bar):
            self.callback(part.close)

    def log(self, line: dict[str, Any]) -> None:
        self.steps.write(line)
        self.tell(line)
        self.bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)

    def evaluation(self, line: dict[str, Any], improved: bool) -> None:
        self.evaluations.write(line)
        self.tell(line)
        if self.steps.file:
            self.bar.clear()
            scores = "".join(f"  |  {split}: {scores_text(line[split])}" for split in ("train", "valid"))
            rate = f"  |  {line['clock']['samples_per_second']:,.0f} samples/s" + ("  * best" if improved else "")
            print(f"epoch {line['epoch']:g}  step {line['step']}{scores}{rate}", flush=True)


def profiler(run: Path | None, wanted: bool) -> Any:
    """torch.profiler over the 6th to the 10th step of this process: a context with .step(). Leaves trace.json.gz and profile.txt."""
    if not wanted or run is None or process.rank() > 0:
        return contextlib.nullcontext(types.SimpleNamespace(step=lambda: None))

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(run / "trace.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        (run / "profile.txt").write_text(profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40))

    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1), on_trace_ready=write)


def prediction_table(info: Any, predictions: np.ndarray, target: np.ndarray, most: int = 1000) -> tuple[list[str], list[list[Any]]]:
    """Columns and the first rows: the true and the predicted label with the probability, or the two values and their difference."""
    predictions, target = predictions[:most], target[:most]
    if not info.labels or predictions.ndim > 2:
        return ["row", "true", "predicted"], [[place, *pair] for place, pair in enumerate(zip(target.tolist(), predictions.tolist(), strict=True))]
    columns = np.stack([1 - predictions, predictions], 1) if predictions.ndim == 1 else predictions
    names = [[info.labels[int(true)], info.labels[best]] for true, best in zip(target, columns.argmax(1), strict=True)]
    return ["row", "true", "predicted", "probability"], [[place, *pair, float(columns[place].max())] for place, pair in enumerate(names)]


def parameter_lines(model: nn.Module) -> list[str]:
    """Parameters by block, with their share and what is frozen."""
    lines = [f"parameters {parameter_count(model.parameters()):,}"]
    for name, block in model.named_children():
        if count := parameter_count(block.parameters()):
            trained = parameter_count(parameter for parameter in block.parameters() if parameter.requires_grad)
            lines.append(f"  {name:<20} {count:>12,}" + ("" if trained == count else f"  ({trained:,} trained)"))
    return lines


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    # A sharded parameter is empty here; DeepSpeed keeps its true size beside.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def scores_text(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" if abs(value) < 1e4 else f"{name} {value:.6g}" for name, value in scores.items())


if __name__ == "__main__":
    from engine import page

    raise SystemExit(process.exit_status(page.main))
