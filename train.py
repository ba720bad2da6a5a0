"""Train one model on one data set, as one TOML says.

    python train.py --config conf/adult.toml optim.lr=3e-4
    accelerate launch train.py --config conf/adult.toml
    torchrun --nproc_per_node 2 train.py --config conf/adult.toml strategy.name=zero3-offload

The same command again continues where it stopped. What comes out is a run folder: settings, scores, pictures, weights.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data import Info, Splits
from engine import checkpoint, config, export, folder, losses, metrics, optim, order, page, pictures, process, report, strategy, tracking
from engine.evaluate import Scorer, evaluate, to_device
from engine.settings import Plan, Settings, command_line, parse, plan_of

OnEval = Callable[[int, dict[str, float]], None]


@dataclass
class Experiment:
    """What the loop works with, the same on every rank but for the rank's own shards."""

    settings: Settings
    run: Path | None
    """None for a trial of a search: it writes nothing"""
    plan: Plan
    accelerator: Any
    splits: Splits
    model_file: Any
    model: torch.nn.Module
    wrapped: Any
    """the model as the strategy runs it"""
    optimizer: Any
    order: order.Order
    progress: checkpoint.Progress
    total_steps: int
    loss_sum: torch.Tensor
    """of this rank since the last log line; it stays on the device until it is logged"""
    scorer: Scorer | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    """validation scores of the best evaluation since this process started"""

    @property
    def info(self) -> Info:
        return self.splits.info

    @property
    def finished(self) -> bool:
        patience = self.settings.train.patience
        return self.progress.step >= self.total_steps or 0 < patience <= self.progress.evaluations_since_best

    def due(self, every: int, step: int) -> bool:
        """Whether what happens each `every` steps (0: each epoch) happens after this one. The last step is always due."""
        return step % (every or self.order.steps_per_epoch) == 0 or step == self.total_steps


def train(settings: Settings, splits: Splits | None = None, on_eval: OnEval | None = None, trial: bool = False) -> dict[str, Any]:
    """Train to the end, on from where the run folder stands. Returns what result.json holds.

    `on_eval(step, scores)` is called on every rank after each evaluation. A `trial` of a search has no run folder and gives
    the best validation scores alone. Raises UserError, Diverged, Stopped.
    """
    plan = plan_of(settings.train, process.world_size())
    accelerator = strategy.start(settings, plan)
    run = None if trial else tracking.run_folder(settings)
    owner: list[Any] = []  # the run folder stays locked as long as this list lives
    if run:
        process.on_rank_zero(lambda: owner.append(folder.claim(run, settings)))
        process.check_shared(run)
    with tracking.Tracker(settings, run) as tracker:
        experiment = set_up(settings, run, plan, accelerator, splits)
        if run and experiment.finished:
            more = "train.epochs or train.steps" if experiment.progress.step >= experiment.total_steps else "train.patience"
            process.say(f"{run}: finished at step {experiment.progress.step}; more {more} would go on from there")
            if tracking.ended(run):
                return folder.read_result(run)
        if run and not experiment.finished:  # of a run that is continued; killed at its end, it must not be taken for what it is now
            process.on_rank_zero(lambda: (run / "result.json").unlink(missing_ok=True))
        tracker.start(experiment.progress.step, **asdict(plan), parameters=report.parameter_count(experiment.model.parameters()))
        fit(experiment, tracker, on_eval)
        return conclude(experiment, run, tracker) if run else {"best": experiment.best_scores, "step": experiment.progress.step}


def set_up(settings: Settings, run: Path | None, plan: Plan, accelerator: Any, splits: Splits | None) -> Experiment:
    """Data, model and optimizer, at the step where the run folder stands."""
    model_file = config.module("models", settings.model.name)
    splits = splits or config.module("data", settings.data.name).load(settings.data, settings.task.kind)
    metrics.names(settings.task, splits.info, model_file)
    losses.build(settings.task, splits.info, model_file)

    order.seed_everything(settings.run.seed, "weights")
    with strategy.building(settings, plan):
        model = model_file.Model(settings.model, splits.info)
    if run:
        files = {**splits.files, **getattr(model, "files", {})}
        process.on_rank_zero(lambda: folder.write_inputs(run, splits.info, splits.preprocessing, files))
    if hasattr(model_file, "prepare"):
        splits = model_file.prepare(model, splits, accelerator.device)
    optimizer = optim.build(model, settings, model_file)
    for line in [f"run folder {run}", *splits.notes, *report.parameter_lines(model)] if run else []:
        process.say(line)
    wrapped, optimizer = strategy.prepare(accelerator, settings, model, optimizer)
    progress = checkpoint.resume(run, accelerator, wrapped, model, optimizer) if run else checkpoint.Progress()

    samples = min(settings.train.overfit or len(splits.train), len(splits.train))
    sequence = order.Order(splits.train, samples, settings.train.batch_size, plan, settings.run.seed)
    progress.steps_per_epoch = sequence.steps_per_epoch
    total_steps = settings.train.steps or settings.train.epochs * sequence.steps_per_epoch
    loss_sum = torch.zeros((), device=accelerator.device)
    if len(progress.loss_sums) == plan.processes:
        loss_sum += progress.loss_sums[accelerator.process_index]
    strategy.settle_buckets(accelerator, wrapped, lambda: splits.train.__getitems__(torch.arange(min(plan.micro, samples))))
    parts = (model_file, model, wrapped, optimizer, sequence, progress, total_steps, loss_sum)
    return Experiment(settings, run, plan, accelerator, splits, *parts)


def fit(e: Experiment, tracker: tracking.Tracker, on_eval: OnEval | None) -> None:
    """The loop. A step is a function of its number: learning rate, samples and random numbers follow from it."""
    train, progress, accelerator = e.settings.train, e.progress, e.accelerator
    device, rank = accelerator.device, accelerator.process_index
    loss_of = losses.build(e.settings.task, e.info, e.model_file)
    batches = iter(order.loader(e.order, rank, progress.step, e.total_steps, train.workers))
    saver = checkpoint.Saver(e.run, (accelerator, e.wrapped, e.model, e.optimizer), train.keep_last, e.order.steps_per_epoch, progress.step)
    agreement, clock = process.Agreement(), report.Clock(progress.step, train.batch_size, e.splits.train, e.model)
    e.wrapped.train()  # what transformers loads is in evaluation mode: without dropout, up to the first evaluation
    with (
        process.StopRequest() as request,
        report.Journals(e.run, progress.step, e.total_steps, tracker) as journals,
        report.profiler(e.run, train.profile) as profiler,
    ):
        try:
            while not e.finished:
                step = progress.step
                learning_rate = optim.lr_at(step, e.settings.optim, e.total_steps)
                optim.set_lr(e.optimizer, learning_rate)
                log_due, evaluation_due, save_due = (e.due(every, step + 1) for every in (train.log_every, train.eval_every, train.save_every))
                clip = train.clip or (math.inf if log_due else 0.0)  # infinity clips nothing, and tells the norm
                for micro_step in range(e.plan.accumulation):
                    batch = to_device(next(batches), device)
                    order.seed_everything(e.settings.run.seed, step, micro_step, rank)
                    with strategy.accumulating(accelerator, e.wrapped):
                        loss = losses.weighted(loss_of(e.wrapped(batch), batch, progress), batch["factor"])
                        strategy.backward(accelerator, loss)
                        gradient_norm = strategy.update(accelerator, e.wrapped, e.optimizer, clip)
                    e.loss_sum += loss.detach()
                progress.step += 1
                progress.loss_steps += e.plan.accumulation
                journals.tick()
                profiler.step()

                stop, writing = agreement.read()
                if log_due or evaluation_due or save_due or stop:
                    gather_losses(e)
                if log_due:
                    log_losses(e, journals, learning_rate, gradient_norm, clock)
                if evaluation_due:
                    scores = evaluate_now(e, journals, learning_rate, clock)
                    if on_eval:
                        on_eval(progress.step, scores)
                if save_due or stop or e.finished or progress.step in progress.pinned_steps():
                    saver.save(progress)
                elif not writing:
                    saver.commit()
                if stop:
                    saved = "and saved" if saver.commit() else "but not saved, the last whole checkpoint stays"
                    raise process.Stopped(f"stopped by a signal at step {progress.step} {saved}; the same command goes on")
                agreement.issue(request.asked, saver.busy)
            saver.commit()
        except process.Diverged:
            saver.commit()
            process.on_rank_zero(lambda: e.run and export.export_best(e.run, progress, train) and None)
            raise


def gather_losses(e: Experiment) -> None:
    """Read every rank's sum of losses. Raises Diverged on all ranks where one is not finite: before anything is saved."""
    e.progress.loss_sums = process.gather(float(e.loss_sum))
    if not all(map(math.isfinite, e.progress.loss_sums)):
        raise process.Diverged(f"the loss is not finite by step {e.progress.step}; try a smaller optim.lr or train.clip = 1.0")


def log_losses(e: Experiment, journals: report.Journals, learning_rate: float, norm: torch.Tensor | None, clock: report.Clock) -> None:
    """The mean loss since the last line, and the gradient norm of this step before clipping, into steps.jsonl."""
    progress = e.progress
    mean = sum(progress.loss_sums) / e.plan.processes / progress.loss_steps
    line = {"step": progress.step, "epoch": progress.step / e.order.steps_per_epoch, "lr": learning_rate, "loss": mean}
    journals.log(line | {"gradient_norm": None if norm is None else float(norm), "clock": clock.read(progress.step)})
    progress.loss_sums, progress.loss_steps = [], 0
    e.loss_sum.zero_()


def evaluate_now(e: Experiment, journals: report.Journals, learning_rate: float, clock: report.Clock) -> dict[str, float]:
    """Scores of the validation part, and of as many training rows beside. Returns the former."""
    task, progress = e.settings.task, e.progress
    line: dict[str, Any] = {"step": progress.step, "epoch": progress.step / e.order.steps_per_epoch, "lr": learning_rate}
    with clock.paused():
        # Made here, since torchmetrics takes longer to import than the first steps.
        e.scorer = e.scorer or Scorer(task, e.info, e.model_file, e.accelerator.device)
        rows = torch.randperm(e.order.samples, generator=torch.Generator().manual_seed(0))[: len(e.splits.valid)].sort().values
        # Twice the training's micro-batch: no activations are kept.
        line["train"] = evaluate(e.wrapped, e.splits.train, e.scorer, 2 * e.plan.micro, rows, progress)
        line["valid"] = evaluate(e.wrapped, e.splits.valid, e.scorer, 2 * e.plan.micro, None, progress)
    direction, score = metrics.best_rule(task, e.info, e.model_file)
    improved = progress.judge(line["valid"][score], direction, e.settings.train.min_delta, e.settings.train.keep_best)
    if improved:
        e.best_scores = line["valid"]
    journals.evaluation(line | {"clock": clock.read(progress.step)}, improved)
    clock.restart(progress.step)
    return line["valid"]


def conclude(e: Experiment, run: Path, tracker: tracking.Tracker) -> dict[str, Any]:
    """Export the best weights, score the test part from them as infer.py does, draw the pictures, write result.json."""
    from infer import Predictor

    source = process.on_rank_zero(lambda: str(export.export_best(run, e.progress, e.settings.train) or ""))
    if not source:
        raise OSError(f"{run}: no checkpoint could be written, so there are no weights to export")
    step = checkpoint.step_of(Path(source))
    predictor = Predictor(run / "best", e.accelerator.device)
    split = "valid" if e.splits.test is None else "test"
    scores, predictions, target = predictor.score(e.splits.valid if e.splits.test is None else e.splits.test)

    def write() -> dict[str, Any]:
        lines = report.read_lines(run / "metrics.jsonl")
        best = next((line["valid"] for line in lines if line["step"] == step), {})
        result = {"best": best, split: scores, "step": step, "clock": lines[-1]["clock"] if lines else {}}
        pictures.draw_curves(lines, metrics.best_rule(e.settings.task, e.info, e.model_file)[1], step, run / "curves.png")
        picture = pictures.draw_predictions(e.info, predictions, target, run)
        folder.write_text(run / "result.json", json.dumps(result, indent=1))
        table = ("predictions", *report.prediction_table(e.info, predictions, target))
        tracker.conclude(e.progress.step, result, [run / "curves.png", run / picture], table)
        page.write(run)
        if e.progress.step < e.total_steps:
            print(f"stopped early at step {e.progress.step}: {e.settings.train.patience} evaluations without an improvement")
        print(f"best at step {step}: {report.scores_text(best)}\n{split}: {report.scores_text(scores)}")
        print(f"pictures {run}/curves.png, {run}/{picture}, all on {run}/report.html\nweights {run}/best", flush=True)
        return result

    return process.on_rank_zero(write)


def main() -> None:
    files, overrides, _ = command_line(__doc__)
    train(parse(files, overrides))


if __name__ == "__main__":
    process.die_with_launcher()
    sys.exit(process.exit_status(main))
