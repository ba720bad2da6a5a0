"""Names: one rule for run folders and for the tracker, from the settings alone."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from engine.settings import Settings

RESULT_SECTIONS = {"train": ("run", "task", "data", "model", "train", "optim"), "boost": ("run", "task", "data", "boost")}
LONGEST = 120


def result_values(values: dict[str, Any], settings: Settings, script: str) -> dict[str, Any]:
    """Those settings that make another experiment, as {"section.key": value}."""
    kept = {}
    for section in RESULT_SECTIONS[script]:
        free = type(getattr(settings, section)).unchanged_result
        kept |= {f"{section}.{key}": value for key, value in values.get(section, {}).items() if key not in free and value is not None}
    return kept


def project(settings: Settings, script: str) -> str:
    return settings.track.project or f"{model_label(settings, script)}-{settings.data.label}-{script}"


def model_label(settings: Settings, script: str) -> str:
    return settings.boost.library if script == "boost" else settings.model.label


def detail(settings: Settings, script: str = "train") -> str:
    """<hyper-parameters>-<hash>: what tells two runs apart at a glance, and six letters that always do."""
    text = json.dumps(result_values(settings.values(), settings, script), sort_keys=True, default=str)
    letters = hashlib.sha256(text.encode()).hexdigest()[:6]
    words = boost_words(settings) if script == "boost" else train_words(settings)
    return f"{'-'.join(words)[: LONGEST - 7].replace('/', '_')}-{letters}"


def train_words(settings: Settings) -> list[str]:
    model = {key: value for key, value in settings.model.model_dump().items() if key not in ("name", "label", "pretrained")}
    words = [f"{key}={value}" for key, value in model.items() if isinstance(value, int | str) and value != ""]
    return [*words, settings.train.precision, f"batch={settings.train.batch_size}", f"lr={settings.optim.lr:g}"]


def boost_words(settings: Settings) -> list[str]:
    boost = settings.boost
    params = {key: value for key, value in boost.params.items() if isinstance(value, int | str)}
    chosen = [f"features={len(boost.features)}"] if boost.features else []
    return [f"folds={boost.folds}", *chosen, *(f"{key}={value}" for key, value in params.items())]


def run_folder(settings: Settings, script: str = "train") -> Path:
    """run.dir, else <runs>/<model>-<data>/<strategy>[-tuned]/<detail>-<hash>."""
    if settings.run.dir:
        return Path(settings.run.dir)
    kind = (settings.strategy.name if script == "train" else script) + ("-tuned" if settings.run.tuned else "")
    first = f"{model_label(settings, script)}-{settings.data.label}".replace("/", "_")
    return Path(os.environ.get("PLAINLOOP_RUNS") or "runs", first, kind, detail(settings, script))
