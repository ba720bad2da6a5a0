"""Predictions and scores from one run folder, or from several by vote, with plain PyTorch.

    python infer.py runs/… --input new.csv --output predictions.csv
    python infer.py runs/… --split test
    python infer.py runs/deep runs/boosted --weights 0.6 0.4 --input new.csv --output voted.csv

RUN is a run folder, or a best/ folder copied out of one. Several vote, and a file of predictions may stand for one of them.
`section.key=value` overrides apply to its settings (data.root=…).
Also under `accelerate launch` and `torchrun`: each process predicts its share, the output keeps the input's order.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine import checkpoint, config, evaluate, export, folder, metrics, process, report, settings, tracking, vote
from engine.boosting import BoostPredictor
from engine.config import UserError
from engine.prediction_files import Saved, columns, write_tables

BATCH = 1024  # rows in a batch at most, and at most four of the training's batches: a large model's activations must fit
CHUNK = 65_536  # rows in memory at a time


class Predictor:
    """A model with its weights, settings and preprocessing, from best/ or a run folder that has it."""

    def __init__(self, path: Path, device: torch.device, overrides: list[str] | None = None, files: list[str] | None = None):
        self.path = best_folder(path)
        self.device = device
        self.settings = settings.parse([self.path / "config.toml", *(files or [])], overrides or [])
        self.info = folder.read_info(self.path)
        self.model_file = config.module("models", self.settings.model.name)
        self.model = self.model_file.Model(self.settings.model, self.info)
        export.load_weights(self.model, self.path)
        self.model.to(device)
        self.kind = metrics.kind_of(self.info.kind, self.model_file)
        self.batch = min(BATCH, 4 * (self.settings.train.micro_batch or self.settings.train.batch_size))

    def scorer(self) -> evaluate.Scorer:
        return evaluate.Scorer(self.settings.task, self.info, self.model_file, self.device)

    def score(self, dataset: Any) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Scores, predictions and targets of a labelled data set, in its order, the same on every rank."""
        scorer, kept = self.scorer(), []
        weights_of = getattr(dataset, "weights", None)
        for first, output, batch in evaluate.outputs(self.model, dataset, self.batch, self.device):
            scorer.add(output, batch, weights_of(batch["index"]) if weights_of else None)
            target = batch["target"]
            target = metrics.value(target, self.info) if self.info.kind == "regression" else target
            kept.append((first, self.kind.predict(output, self.info).cpu(), target.cpu()))
        parts = sorted((part for share in process.gather(kept) for part in share), key=lambda part: part[0])
        predictions, targets = (torch.cat([part[place] for part in parts]).numpy() for place in (1, 2))
        return scorer.compute(), predictions, targets

    def predict(self, dataset: Any, logits: bool, scorer: evaluate.Scorer | None) -> np.ndarray:
        """Probabilities (or logits) [n] or [n, classes], or values [n], in the rows' order, on every rank."""
        kept, weights_of = [], getattr(dataset, "weights", None)
        for first, output, batch in evaluate.outputs(self.model, dataset, self.batch, self.device):
            if scorer:
                scorer.add(output, batch, weights_of(batch["index"]) if weights_of else None)
            kept.append((first, (output.float() if logits and self.info.labels else self.kind.predict(output, self.info)).cpu()))
        parts = sorted((part for share in process.gather(kept) for part in share), key=lambda part: part[0])
        return torch.cat([output for _, output in parts]).numpy()

    def split(self, part: str) -> Any:
        """A part of the run's own data; None where there is no such part. Raises UserError where they have changed."""
        splits = config.module("data", self.settings.data.name).load(self.settings.data, self.settings.task.kind)
        folder.require_learned(self.path, splits.info, splits.preprocessing)
        return getattr(splits, part)

    def read(self, source: Path, rows: int) -> Iterator[Any]:
        """A file to predict, in chunks."""
        data_file = config.module("data", self.settings.data.name)
        return data_file.read_rows(source, self.settings.data, folder.read_preprocessing(self.path), self.info, rows)


def best_folder(path: Path) -> Path:
    """Raises UserError for a folder that is no run."""
    for candidate in (path / "best", path):
        if (candidate / "info.json").exists() and any(candidate.glob("model*.safetensors")):
            missing = [name for name in export.INPUTS if not (candidate / name).exists()]
            if missing:
                raise UserError(f"{candidate}: has no {missing[0]}; copy the whole folder")
            return candidate
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the run has not ended, so there is no best/ yet; use --checkpoint step=… of {names(path)}")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a run folder, or a file of predictions")
    if (path / "study.journal").exists():
        raise UserError(f"{path}: is a study; train with --config {path}/best.toml, and name that run's folder")
    raise UserError(f"{path}: not a run folder; it needs best/ with info.json and model.safetensors, as train.py leaves it")


def names(run: Path) -> str:
    return ", ".join(path.name for path in checkpoint.folders(run)) or "none"


def open_run(path: Path, device: torch.device, overrides: list[str], files: list[str] | None) -> Any:
    """A deep or boosted run, or a file of predictions that was made here."""
    if path.is_file():
        return Saved(path)
    if (path / "folds").is_dir():
        return BoostPredictor(path, overrides, files)
    return Predictor(path, device, overrides, files)


def predict_file(predictor: Predictor, source: Path, target: Path | None, logits: bool) -> dict[str, float]:
    """Predict a file in chunks, write them as they come; returns the scores where the file has labels, else {}."""
    scorer, named, count, unseen = None, getattr(predictor.settings.data, "id", ""), 0, Counter()

    def tables() -> Iterator[dict[str, Any]]:
        nonlocal scorer, count
        for number, rows in enumerate(predictor.read(source, CHUNK)):
            if number == 0 and named and named not in rows.ids:
                process.warn(f"{source}: has no column {named!r} (data.id); rows are numbered instead")
            scorer = scorer or (predictor.scorer() if rows.labelled else None)
            count += len(rows.dataset)
            unseen.update(rows.unseen)
            yield rows.ids | columns(predictor.info.labels, predictor.predict(rows.dataset, logits, scorer), logits)

    write_tables(tables(), target if process.rank() == 0 else None)
    for name, times in unseen.items():
        process.warn(f"{source}: column {name!r}: {times:,} of {count:,} values were not seen in training and count as missing")
    return scorer.compute() if scorer else {}


def start_processes() -> torch.device:
    """Join the launcher's processes, if any. Returns this process's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if process.world_size() > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, metavar="FILE", help="a table to predict, with or without the label column")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to: .csv or .parquet")
    parser.add_argument("--split", choices=["train", "valid", "test"], help="score this part of the run's own data")
    parser.add_argument("--logits", action="store_true", help="logits in place of probabilities")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each run in the vote, together 1; default: equal")
    parser.add_argument("--fit-weights", action="store_true", help="find the weights on the validation part")
    parser.add_argument("--average", choices=["probability", "logit"], help="what the vote averages; default: probability")
    parser.add_argument("--checkpoint", metavar="step=N", help="another checkpoint than the best: step=N or epoch=N")


def chosen_weights(run: Path, wanted: str) -> Path:
    """Consolidate a checkpoint on demand; it stays in the run folder as weights-step=N."""
    if (run / "folds").is_dir():
        raise UserError(f"{run}: is a boosted run, which has no checkpoints; leave --checkpoint out")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: has no checkpoints; --checkpoint needs the run folder")
    source = export.choose(run, wanted)
    output = run / f"weights-step={checkpoint.step_of(source)}"
    return output if output.exists() else export.export(run, source, output, 10**10, None)


def main() -> None:
    _, words, options = settings.command_line(__doc__, add=add_options)
    # Names of run folders hold "=" too, but a "/" before it.
    overrides = [word for word in words if "=" in word and "/" not in word.partition("=")[0] and not Path(word).exists()]
    runs = [Path(word) for word in words if word not in overrides]
    if not runs or not (options.input or options.split or options.fit_weights):
        raise UserError("infer.py takes run folders and --input FILE --output FILE, or --split test; see --help")
    if len(runs) == 1 and (options.weights or options.fit_weights or options.average):
        raise UserError("--weights, --fit-weights and --average: are for the vote of several runs; name two or more")
    if len(runs) > 1 and options.checkpoint:
        raise UserError("--checkpoint: is for one run; the vote takes the best weights of each")
    if options.weights and options.fit_weights:
        raise UserError("--weights and --fit-weights: one finds what the other gives; take one of them")
    if options.input and not options.output:
        raise UserError("--input: needs --output FILE, such as predictions.csv")
    if options.output and not options.input:
        raise UserError("--output: is where the predictions of --input FILE go; --split only scores")
    if options.input and options.output.exists() and options.input.exists() and options.output.samefile(options.input):
        raise UserError(f"--output {options.output}: is the input itself; name another file")
    if options.output and options.output.suffix not in (".csv", ".parquet"):
        raise UserError(f"--output {options.output}: must end in .csv or .parquet")
    if options.output and options.output.is_dir():
        raise UserError(f"--output {options.output}: is a folder; name a file in it")
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}; make it first")
    device = start_processes()
    if options.checkpoint:
        runs[0] = Path(process.on_rank_zero(lambda: str(chosen_weights(runs[0], options.checkpoint))))
    members = [open_run(path, device, overrides, options.config) for path in runs]
    predictor = vote.Vote(members, options.weights, options.average) if len(runs) > 1 or runs[0].is_file() else members[0]
    with recorded(predictor, "predict" if options.input else "test") as tracker:
        if options.fit_weights:
            predictor.fit()
        found = {}
        if options.split:
            dataset = predictor.split(options.split)
            if dataset is None:
                raise UserError(f"--split {options.split}: these data have no such part; set data.{options.split}")
            for member in getattr(predictor, "members", [predictor]):
                if options.split != "test" and len(getattr(member, "boosters", [])) > 1:
                    process.say(f"{member.path}: its folds were trained on the {options.split} part too; out-of-fold scores stand in result.json")
            found[options.split], _, _ = predictor.score(dataset)
            process.say(f"{options.split}: {report.scores_text(found[options.split])}")
        if options.input:
            found["input"] = predict_file(predictor, options.input, options.output, options.logits)
            if found["input"]:
                process.say(f"{options.input}: {report.scores_text(found['input'])}")
            process.say(f"predictions {options.output}")
        cells = [[part, score, value] for part, scores in found.items() for score, value in scores.items()]
        tracker.conclude(0, found, [], ("scores", ["part", "score", "value"], cells))


def recorded(predictor: Any, script: str) -> tracking.Tracker:
    """A test or a prediction in the trackers of its run and in its alerts. Its record is kept in the folder of that name in the run's."""
    run = predictor.path.parent if (predictor.path.parent / "tracker.json").exists() else predictor.path
    wanted = predictor.settings.track.to or os.environ.get("PLAINLOOP_ALERTS")
    place = run / script if wanted and os.access(run, os.W_OK) else None
    tracker = tracking.Tracker(predictor.settings, place, script, of="boost" if (run / "folds").is_dir() else "train")
    if tracker.run:
        tracker.run.mkdir(exist_ok=True)
    tracker.start(run_folder=str(run.resolve()))
    return tracker


if __name__ == "__main__":
    process.die_with_launcher()
    sys.exit(process.exit_status(main))
