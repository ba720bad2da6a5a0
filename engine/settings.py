"""The sections of the scripts themselves, and the root that joins them with the chosen model's and dataset's own."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import AfterValidator, Field, field_validator

from engine import config
from engine.config import Config, DataConfig, ModelConfig, UserError


def rule(holds: Callable[[Any], Any], said: str) -> AfterValidator:
    """What a value must be, where Field has no word for it."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(said)
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Best = Annotated[str, rule(re.compile(r"auto|(max|min)\s+\S+").fullmatch, 'must be "max <metric>" or "min <metric>", such as "max f1"')]
Size = Annotated[str, AfterValidator(lambda size: byte_count(size) and size)]
Folds = Annotated[Count, rule(lambda count: count != 1, "must be 2 or more, or 0 for the validation part")]
Space = Annotated[
    dict[str, Any],
    rule(lambda space: {*map(type, space.values())} <= {dict, list}, "each key needs a range, such as { low = 1, high = 3 }, or a list of choices"),
]


class Run(Config):
    unchanged_result: ClassVar[set[str]] = {"dir", "resume", "deterministic"}
    dir: str = ""
    """the exact run folder; empty: derived from the settings under $PLAINLOOP_RUNS or runs/"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of weights, sample order and dropout"""
    resume: str = "auto"
    """"auto" continues what the run folder holds, "never" refuses a folder that holds a run, else a path to a run or checkpoint to go on from"""
    tuned: bool = False
    """the settings come from a search: written into best.toml by tune.py, shown in the run folder's name"""
    deterministic: bool = False
    """only deterministic kernels: on a GPU, slower and bit-identical again; on a CPU they are anyway"""


class Task(Config):
    kind: str = "auto"
    """"binary", "multiclass", "regression", what a model's file brings, or "auto": what the data says"""
    loss: str = "auto"
    """a function of the model's file or of engine/losses.py; "auto": the usual one of the kind"""
    loss_options: dict[str, Any] = {}
    """keyword arguments of the loss, such as { label_smoothing = 0.1 }"""
    metrics: list[str] = []
    """names from the model's file or engine/metrics.py; empty: the usual ones of the kind"""
    best: Best = "auto"
    """which evaluation is the best: "max f1", "min rmse"; "auto": the usual one of the kind"""


class Train(Config):
    unchanged_result: ClassVar[set[str]] = {
        "epochs", "steps", "micro_batch", "patience", "min_delta", "log_every", "save_every", "keep_best", "keep_last",
        "max_shard", "export", "workers", "profile",
    }  # fmt: skip
    epochs: Annotated[int, Field(gt=0)] = 10
    """how often each training sample is seen"""
    steps: Count = 0
    """optimizer steps; wins over epochs when given"""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """samples per optimizer step over all processes and micro-steps"""
    micro_batch: Count = 0
    """samples per forward per process; 0: what one step needs. Accumulation follows: batch_size / (processes x micro_batch)"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward and backward passes; weights and moments stay in fp32"""
    clip: Annotated[float, Field(ge=0)] = 0.0
    """largest gradient norm; 0 = off"""
    compile: bool = False
    """torch.compile the model; its dropout masks differ from eager ones, so it changes the result"""
    patience: Count = 0
    """evaluations without an improvement before training stops; 0 = off"""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """smallest change of task.best that counts as an improvement"""
    log_every: Count = 0
    """optimizer steps between lines of steps.jsonl and of the tracker; 0 = each epoch"""
    eval_every: Count = 0
    """optimizer steps between evaluations; 0 = each epoch"""
    save_every: Count = 0
    """optimizer steps between checkpoints; 0 = each epoch. An improvement is saved as well"""
    keep_best: Annotated[int, Field(gt=0)] = 1
    """checkpoints of the best evaluations that are kept"""
    keep_last: Annotated[int, Field(gt=0)] = 1
    """newest checkpoints that are kept"""
    max_shard: Size = "5GB"
    """largest weight file of best/, such as "500MB"; a larger model is written as several with an index"""
    export: Literal["fp32", "bf16"] = "fp32"
    """precision of the weights in best/"""
    workers: Count = 0
    """processes that read data ahead, for each training process; 0 reads in the loop, the fastest where data is in memory"""
    overfit: Count = 0
    """train on the first N samples only: a model that cannot learn them by heart has a mistake in it; 0 = off"""
    profile: bool = False
    """record some steps with torch.profiler into the run folder"""


class Optim(Config):
    name: str = "auto"
    """"auto" (AdamW, the fastest build of it for the strategy and device), a class of torch.optim, "fused_adam", "cpu_adam",
    or a function of the model's file"""
    options: dict[str, Any] = {}
    """further arguments of the optimizer, such as { betas = [0.9, 0.95] }"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """learning rate at the end of the warm-up"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """of matrices; norms, biases and embeddings are never decayed"""
    warmup_ratio: Fraction = 0.0
    """share of all steps in which the learning rate rises from 0"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """course of the learning rate after the warm-up"""
    min_lr_ratio: Fraction = 0.0
    """where the schedule ends, as a share of lr"""


class Strategy(Config):
    unchanged_result: ClassVar[set[str]] = {"name", "deepspeed", "sharded_init"}
    name: Literal["ddp", "zero2", "zero2-offload", "zero3", "zero3-offload"] = "ddp"
    """how processes share the work: whole copies (ddp), or DeepSpeed ZeRO"""
    deepspeed: dict[str, Any] = {}
    """merged last into the DeepSpeed config"""
    sharded_init: bool = False
    """under zero3: build the model in shards, where it would not fit whole"""


class Track(Config):
    unchanged_result: ClassVar[set[str]] = {"to", "mode", "project", "entity", "tags", "alerts"}
    to: list[Literal["wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]] = []
    """where the run is recorded beside its folder: wandb, and through Accelerate tensorboard and the others"""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """of wandb; "auto": WANDB_MODE, else online where its credentials exist. "disabled" holds for all trackers"""
    project: str = ""
    """default: WANDB_PROJECT, else <model label>-<data label>-<script>"""
    entity: str = ""
    """team or user that owns the project; default: wandb's own"""
    tags: list[str] = []
    """words to find the run by"""
    alerts: bool = True
    """tell wandb, and the apprise URLs in the environment's PLAINLOOP_ALERTS, when the run finishes, diverges, fails or is stopped"""


class Tune(Config):
    unchanged_result: ClassVar[set[str]] = {"trials", "timeout", "workers", "storage"}
    target: Literal["train", "boost"] = "train"
    """which script is tuned"""
    trials: Annotated[int, Field(gt=0)] = 20
    """finished trials wanted"""
    timeout: Annotated[float, Field(ge=0)] = 0.0
    """seconds after which no trial is begun; 0 = off"""
    workers: Annotated[int, Field(gt=0)] = 1
    """processes, each on its own GPU or share of cores"""
    sampler: str = "TPESampler"
    """a class of optuna.samplers"""
    sampler_options: dict[str, Any] = {}
    """its arguments; the seed is run.seed unless given"""
    pruner: str = "MedianPruner"
    """a class of optuna.pruners"""
    pruner_options: dict[str, Any] = {}
    """its arguments"""
    method: Literal["search", "lightgbm-stepwise"] = "search"
    """the search over tune.space, or LightGBM's parameters one after another (optuna-integration)"""
    storage: str = ""
    """Optuna storage URL; empty: a journal in the study's folder"""
    space: Space = {}
    """what is searched: "optim.lr" = { low = 1e-5, high = 1e-2, log = true }, "model.depth" = [2, 3, 4]"""


class Boost(Config):
    unchanged_result: ClassVar[set[str]] = {"screen", "level"}
    library: Literal["lightgbm", "xgboost"] = "lightgbm"
    """which gradient boosting"""
    folds: Folds = 0
    """folds of cross-validation over the training and validation rows; 0: trained on the former, stopped by the latter"""
    split: Literal["auto", "stratified", "group", "time"] = "auto"
    """how rows come into folds: the same classes (or values) in each; whole groups of data.group; later rows of the file after
    earlier ones. "auto": by group where data.group is set, else stratified"""
    rounds: Annotated[int, Field(gt=0)] = 4000
    """most boosting rounds"""
    patience: Count = 200
    """rounds without an improvement of the library's own (or params' first) metric before boosting stops; 0 = off"""
    features: list[str] = []
    """columns to use; empty: all"""
    device: Literal["cpu", "gpu"] = "cpu"
    """where trees are grown"""
    screen: Literal["rank", "mean"] = "rank"
    """tests of `boost.py --screen`: by ranks (Mann-Whitney, Kruskal-Wallis, Spearman), or by means (t, analysis of variance, Pearson)"""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """largest corrected p-value of a column that passes the screen"""
    params: dict[str, Any] = {}
    """handed to the library as they are; XGBoost's monotone_constraints and interaction_constraints may name columns of the table"""

    @field_validator("params")
    @classmethod
    def has_no_key_of_its_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, names in PARAMS_ELSEWHERE.items():
            for name in value.keys() & set(names.split()):
                raise ValueError(f"{name} is set by {key}; take it out")
        return value


PARAMS_ELSEWHERE = {
    "boost.rounds": "num_iterations num_iteration n_iter num_tree num_trees num_round num_rounds nrounds num_boost_round n_estimators max_iter",
    "boost.patience": "early_stopping_round early_stopping_rounds early_stopping n_iter_no_change",
    "boost.device": "device device_type gpu_id",
    "run.seed": "seed random_seed random_state",
    "boost.params.objective": "objective_type app application loss",
    "data.categorical": "categorical_feature cat_feature categorical_column cat_column categorical_features feature_types",
    "boost.py": "verbosity verbose silent",
}
"""names that the libraries give to what has a key here"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one experiment. `data` and `model` are of the classes in the files that they name."""

    run: Run
    task: Task
    data: DataConfig
    model: ModelConfig
    train: Train
    optim: Optim
    strategy: Strategy
    track: Track
    tune: Tune
    boost: Boost

    def values(self) -> dict[str, dict[str, Any]]:
        return {field.name: getattr(self, field.name).model_dump() for field in dataclasses.fields(self)}


def classes(values: dict[str, Any]) -> tuple[dict[str, type[Config]], list[str]]:
    """The class of each section; those of data and model come from the files that they name. And a line a mistake."""
    found, errors = get_type_hints(Settings), []
    for section, folder in (("data", "data"), ("model", "models")):
        given = values.get(section, {})
        try:
            if not isinstance(given, dict) or "name" not in given:
                names = " / ".join(config.listing(folder))
                raise UserError(f"{section}.name: missing; it names a file of {folder}/: {names}")
            found[section] = config.module(folder, given["name"]).Config
        except UserError as error:
            errors += error.lines
            del found[section]
    return found, errors


def from_values(values: dict[str, Any], default_label: str = "") -> Settings:
    """Settings from plain values. Raises UserError with a line for each mistake in any section."""
    known, errors = classes(values)
    sections = {}
    for name in values.keys() - {field.name for field in dataclasses.fields(Settings)}:
        errors.append(f"{name}: unknown section{config.suggestion(name, known)}")
    for name, section in known.items():
        sections[name], mistakes = config.validate(name, section, values.get(name, {}))
        errors += mistakes
    if errors:
        raise UserError(*errors)
    data, model = sections["data"], sections["model"]
    root = os.path.abspath(data.root or os.environ.get("PLAINLOOP_DATA") or os.getcwd())
    pretrained = Path(getattr(model, "pretrained", "")).name
    tokenizer = {"tokenizer": model.pretrained} if pretrained and getattr(data, "tokenizer", "") == "auto" else {}
    sections["data"] = data.model_copy(update={"root": root, "label": data.label or default_label or data.name, **tokenizer})
    sections["model"] = model.model_copy(update={"label": model.label or pretrained or model.name})
    return Settings(**sections)


def replaced(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Settings with some "section.key" values changed, validated again. Deeper keys reach into free tables."""
    values = settings.values()
    for path, value in changes.items():
        section, _, key = path.partition(".")
        key, _, entry = key.partition(".")
        table = values.setdefault(section, {})
        table[key] = {**table.get(key, {}), entry: value} if entry else value
    return from_values(values)


def read(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Merged plain values of files and overrides, and the stem that names the data by default."""
    values: dict[str, Any] = {}
    for file in files:
        values = config.merge(values, config.read_toml(file))
    # Names come first: they decide which keys there are, and so which overrides take plain text.
    overrides = sorted(overrides, key=lambda text: not text.startswith(("data.name=", "model.name=")))
    for text in overrides:
        config.apply_override(values, text, classes(values)[0])
    return values, Path(files[0]).stem if files else ""


def parse(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Settings:
    """Settings of TOML files (later ones win) and `section.key=value` overrides. Raises UserError."""
    return from_values(*read(files, overrides))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def command_line(
    description: str, add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
) -> tuple[list[str | Path], list[str], argparse.Namespace]:
    """--config files, overrides and a script's own options. `--help` prints every key and leaves with status 0."""
    parser = Parser(description=description, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", metavar="FILE", help="TOML file; repeatable, later ones win")
    parser.add_argument("--help", "-h", action="store_true", help="print this and every key of that config, with type, default and meaning")
    add(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="one setting, as TOML")
    options = parser.parse_intermixed_args()
    files: list[str | Path] = options.config or [config.ROOT / "conf" / "digits.toml"]
    if options.help:
        values, _ = read(files, [word for word in options.overrides if "=" in word])
        try:
            print(parser.format_help(), config.describe(classes(values)[0]), sep="\n", flush=True)
        except BrokenPipeError:  # `--help | head`: nor shall Python find it broken when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    return files, options.overrides, options


def byte_count(text: str) -> int:
    """Bytes of "500MB" or "5GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError('must be a size such as "500MB" or "5GB"')
    return int(float(number) * units[unit])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one optimizer step is cut: batch_size = micro x processes x accumulation."""

    micro: int
    processes: int
    accumulation: int


def plan_of(train: Train, processes: int) -> Plan:
    """Raises UserError where the batch cannot be cut evenly."""
    micro = train.micro_batch or train.batch_size // processes
    if micro == 0 or train.batch_size % (micro * processes):
        cut = f"train.micro_batch ({micro}) x processes ({processes})" if train.micro_batch else f"the number of processes ({processes})"
        multiple = (train.micro_batch or 1) * processes
        near = max(1, round(train.batch_size / multiple)) * multiple
        raise UserError(f"train.batch_size = {train.batch_size}: must be a multiple of {cut}, such as {near}")
    return Plan(micro, processes, train.batch_size // (micro * processes))
