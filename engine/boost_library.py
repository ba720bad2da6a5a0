"""What the two boosting libraries have in common: how parameters reach them, and how they refuse some."""

import contextlib
import importlib
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.config import UserError
from engine.settings import Settings


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing of what a library writes to descriptor 2: before it raises, LightGBM puts the reason there, past every logger."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Library:
    """What the two have in common. Raises UserError where the package is missing."""

    package: str
    failure: str
    gpu: dict[str, str]
    a_column: set[str]
    """parameters of a value for each feature"""
    objectives: dict[str, tuple[str, ...]]
    """the usual one of each kind of task, and the others that give what the kind predicts; any is for numbers"""

    def __init__(self, info: Any, names: list[str]):
        try:
            self.module = importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(f'boost.library = "{self.package}": cannot be imported ({error}); pip install {self.package}') from None
        plain = [re.sub(r"\W", "_", name) for name in names]  # neither takes every character in a column's name
        self.names = plain if len(set(plain)) == len(plain) else [f"{name}_{place}" for place, name in enumerate(plain)]
        self.named = dict(zip(names, self.names, strict=True))
        self.info, self.error = info, operator.attrgetter(self.failure)(self.module)

    def params(self, settings: Settings, **own: Any) -> dict[str, Any]:
        if settings.boost.device == "gpu" and not torch.cuda.is_available():
            raise UserError('boost.device = "gpu": there is no GPU here; set it to "cpu"')
        classes = {"num_class": self.info.outputs} if self.info.kind == "multiclass" else {}
        values = {"objective": self.objectives[self.info.kind][0], "seed": settings.run.seed % 2**31, **classes, **own}
        values |= (self.gpu if settings.boost.device == "gpu" else {}) | settings.boost.params
        if self.info.labels and values["objective"] not in self.objectives[self.info.kind]:
            fitting = " or ".join(self.objectives[self.info.kind])
            raise UserError(f"boost.params.objective = {values['objective']!r}: gives no probabilities of a {self.info.kind} target; use {fitting}")
        for key in self.a_column & values.keys():
            given = values[key].split(",") if isinstance(values[key], str) else values[key]
            if not isinstance(given, dict) and (len(given) if isinstance(given, list) else 1) != len(self.names):  # LightGBM ends the process
                raise UserError(f"boost.params.{key} = {values[key]}: needs a value for each of the {len(self.names)} features")
        if values.get("sigmoid", 1) != 1:
            raise UserError(f"boost.params.sigmoid = {values['sigmoid']}: would make its raw scores other numbers than logits; take it out")
        for key in ("booster", "boosting", "boosting_type", "boost"):
            if values.get(key) == "dart" and settings.boost.patience:
                raise UserError(f'boost.params.{key} = "dart": later trees change earlier ones, so no round is the best; set boost.patience = 0')
        return values

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Where parameters meet the library before it trains: its Python has no error of its own for what it cannot read."""
        try:
            with silent():
                yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.error(str(error)) from error

    def reason(self, error: Exception) -> str:
        """What the library says is wrong, without the time and the place in its source."""
        return re.sub(r"^(\[.*?\] )?(\S+:\d+: )?| at /\S+, line \d+.*", "", str(error).strip().splitlines()[0])

    def refuse(self, unknown: list[str]) -> None:
        if unknown:
            raise UserError(f"boost.params.{unknown[0]}: {self.package} has no such parameter for this task; correct its name or take it out")

    def load(self, path: Path) -> Any:
        return self.module.Booster(model_file=path)
