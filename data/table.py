"""Tables: CSV, TSV or Parquet, one file split by fraction or a file for each part.

Two layers. `read` gives raw columns, as gradient boosting wants them; `load` scales their numbers for a deep model. What is learned
from the training rows (vocabularies, scales, label names) is kept as JSON, so that `read_rows` turns a new file into the same tensors.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data import Info, Rows, Splits, _scale
from data._dataset import TableDataset, part_dataset
from data._samples import Files, Parts, Samples, batch_target, new_rows, read_samples
from engine.config import UserError

ROW_NUMBERS = re.compile(r"Unnamed: \d+|__index_level_\d+__")  # names that pandas gives to its index


class Preparation(Parts):
    numeric_transform: Literal["standard", "quantile", "none"] = "standard"
    """scale of numbers: mean 0 and deviation 1; a normal distribution by quantiles; as they are"""


class Config(Files, Preparation):
    drop: list[str] = []
    """columns that are no features"""
    categorical: list[str] = []
    """columns of categories, read as text ("007" stays "007"); besides these, every column that holds a text is one"""
    numeric: list[str] = []
    """columns that must hold numbers; besides these, every column of which all values are numbers or missing is one"""


@dataclass
class Table(Samples):
    """Raw columns of all n rows."""

    numeric: np.ndarray  # float32 [n, k], NaN where missing
    categorical: np.ndarray  # int32 [n, c]: 0 where missing or unseen in training, else the position in the training vocabulary + 1
    ids: Any  # pyarrow.ChunkedArray [n]: the id column as texts, or None
    preprocessing: dict[str, Any]  # JSON: what was learned from the training rows
    notes: list[str]


def load(config: Config, kind: str = "auto") -> Splits:
    """Tensors for a deep model. `kind` is task.kind. Raises UserError for what is wrong with the files."""
    return tensors(read(config, kind), config)


def read(config: Config, kind: str = "auto") -> Table:
    """The raw columns. `kind` is "binary", "multiclass", "regression", or "auto": told from the target."""
    return assemble(config.sources(), config, kind)


def assemble(sources: dict[str, Any], config: Config, kind: str = "auto") -> Table:
    """The table of opened files (data._files.Source), of which "train" may be the only one."""
    from data import _columns

    notes: list[str] = []
    names = choose(sources, config, notes)
    samples = read_samples(sources, config, kind, notes)
    ids = _columns.plain_texts(_columns.of(sources, config.id)) if config.id else None
    numeric, categorical, learned = read_features(sources, names, config, samples, notes)
    categories = [len(words) + 1 for words in learned["vocabularies"].values()]
    info = dataclasses.replace(samples.info, numeric=len(learned["numeric"]), categories=categories)
    preprocessing = {"target": config.target, "id": config.id, **learned}
    return Table(
        **vars(samples) | {"info": info},
        numeric=numeric,
        categorical=categorical,
        ids=ids,
        preprocessing=preprocessing,
        notes=notes,
    )


def choose(sources: dict[str, Any], config: Config, notes: list[str]) -> list[str]:
    """Columns that may be features, in the training file's order. Raises UserError for settings that name no column."""
    source = sources["train"]
    roles = {key: [getattr(config, key)] for key in ("target", "id", "group", "weight") if getattr(config, key)}
    named = roles | {"drop": config.drop, "categorical": config.categorical, "numeric": config.numeric}
    for key, name in ((key, name) for key, names in named.items() for name in names):
        source.require(key, name)
        if (name == config.target and key != "target") or (key == "categorical" and name in config.numeric):
            what = "is the target" if name == config.target else "stands in data.numeric too"
            raise UserError(f"data.{key} = {name!r}: {what}; take it out of one of the two")
    indices = {name for file in sources.values() for name in file.names if ROW_NUMBERS.fullmatch(name)}.difference(*named.values())
    notes += [f"dropped: {name} has no name of its own and is most likely row numbers" for name in sorted(indices)]
    ignored = indices.union(config.drop)
    for part, other in sources.items():
        for name in sorted({*source.names}.symmetric_difference(other.names) - ignored):
            has = "has no" if name in source.names else "has a"
            remedy = "give the files the same columns, or name it in data.drop"
            raise UserError(f"data.{part} = {str(other.path)!r}: {has} column {name!r}, unlike data.train; {remedy}")
    return [name for name in source.names if name not in ignored.union(*roles.values())]


def read_features(
    sources: dict[str, Any], names: list[str], config: Config, samples: Samples, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """float32 [n, k], int32 [n, c], and which columns these are, with the words that the training rows hold.

    Leaves out columns that are constant over the training rows. Raises UserError for one without a value there, or if none is left.
    """
    from data import _columns

    forced = dict.fromkeys(config.categorical, "text") | dict.fromkeys(config.numeric, "number")
    # Wide enough for all, since what a column holds is known once it is read; so numbers are in memory once.
    rows, train = len(samples.target), samples.rows["train"]
    numeric, categorical = np.empty((rows, len(names)), np.float32), np.empty((rows, len(names)), np.int32)
    learned: dict[str, Any] = {"numeric": [], "missing": [], "categorical": [], "vocabularies": {}}
    for name in names:
        values, words = _columns.read(sources, name, forced.get(name, ""))
        if words is None:
            values = values.astype(np.float32)
            known = values[train][~np.isnan(values[train])]
            found, missing = sorted({known.min(), known.max()} if len(known) else ()), len(known) < len(train)
        else:
            used = np.bincount(values[train], minlength=len(words) + 1)
            found, missing = [word for word, count in zip(words, used[1:], strict=True) if count], used[0] > 0
        if not found:
            raise UserError(f"data.train: column {name!r} is missing in every training row; name it in data.drop")
        if len(found) == 1 and not missing:
            notes.append(f"dropped: {name} is {found[0]} in every training row")
        elif words is None:
            numeric[:, len(learned["numeric"])] = values
            learned["numeric"].append(name)
            learned["missing"] += [name] if missing else []
        else:
            categorical[:, len(learned["vocabularies"])] = _columns.renumber(words, found)[values]
            learned["categorical"].append(name)
            learned["vocabularies"][name] = found
            if len(found) > max(100, len(train) // 2):
                notes.append(f"{name} has {len(found):,} categories in {len(train):,} training rows; if it names rows, set data.id or data.drop")
    if not learned["numeric"] and not learned["categorical"]:
        raise UserError(f"{sources['train'].path}: no feature is left beside the target {config.target!r}; see data.drop")
    numeric, categorical = numeric[:, : len(learned["numeric"])], categorical[:, : len(learned["categorical"])]
    notes += column_notes(numeric, categorical, train, learned)
    return np.ascontiguousarray(numeric), np.ascontiguousarray(categorical), learned


def column_notes(numeric: np.ndarray, categorical: np.ndarray, train: np.ndarray, learned: dict[str, Any], most: int = 20) -> list[str]:
    """What each column was taken for, by the training rows; of many columns the first ones."""

    def line(key: str, sizes: list[str], gaps: Callable[[int], np.ndarray]) -> list[str]:
        shown = []
        for place, (name, size) in enumerate(list(zip(learned[key], sizes, strict=True))[:most]):
            missing = np.count_nonzero(gaps(place))
            about = ", ".join(filter(None, [size, f"{missing:,} missing" if missing else ""]))
            shown.append((repr(name) if {" ", ","} & {*name} else name) + (f" ({about})" if about else ""))
        return [f"{key} {len(sizes)}: {', '.join(shown)}{', …' if len(sizes) > most else ''}"] if shown else []

    words = [f"{len(vocabulary):,} values" for vocabulary in learned["vocabularies"].values()]
    notes = line("numeric", [""] * numeric.shape[1], lambda place: np.isnan(numeric[train, place]))
    return notes + line("categorical", words, lambda place: categorical[train, place] == 0)


def tensors(table: Table, config: Preparation) -> Splits:
    """Scale the table's numbers in place, put its target into a batch's form, and hand out its parts."""
    train, info = table.rows["train"], table.info
    preprocessing = {**table.preprocessing, "scales": _scale.learn(table.numeric, train, config.numeric_transform, config.split_seed)}
    columns = batch_columns(table.numeric, table.categorical, preprocessing)
    if "numeric" in columns:
        numeric = columns["numeric"].numpy()
        more = {"quantiles": _scale.bin_edges(numeric, train)} if config.numeric_transform == "quantile" else {}
        info = dataclasses.replace(info, numeric=numeric.shape[1], more=more)
    columns["target"] = batch_target(table.target, info)
    parts = {part: part_dataset(columns, rows, table.part_weights(part, config.balance)) for part, rows in table.rows.items()}
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, preprocessing, table.notes)


def batch_columns(numeric: np.ndarray, categorical: np.ndarray, preprocessing: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of raw features; numbers are scaled in place where there are scales (a boosted model has none)."""
    if "scales" in preprocessing:
        missing = [preprocessing["numeric"].index(name) for name in preprocessing["missing"]]
        numeric = _scale.apply(numeric, missing, preprocessing["scales"])
    return {name: torch.from_numpy(array) for name, array in (("numeric", numeric), ("categorical", categorical)) if array.shape[1]}


def read_rows(path: str | Path, config: Parts, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A file to predict, in chunks of at most `chunk_rows` rows: columns in any order, extra ones ignored, target optional.

    By the preprocessing of `Splits` the numbers are scaled; by that of `Table`, which has no scales, they stay raw.
    Raises UserError for a missing column, a text where training had numbers, or a label unknown to the run.
    """
    from data import _columns

    source = config.open(path)
    numeric, vocabularies, target, identity = (preprocessing[key] for key in ("numeric", "vocabularies", "target", "id"))
    for rows, _, truth, ids in new_rows(source, [*numeric, *vocabularies], target, identity, info, chunk_rows):
        given = {name: (rows.column(name), f"{path}: column {name!r}") for name in rows.column_names}
        numbers = np.array([_columns.numbers(*given[name]) for name in numeric], np.float32)
        texts = np.array([_columns.texts([given[name]], words)[0] for name, words in vocabularies.items()], np.int32)
        unseen = {name: count for name, codes in zip(vocabularies, texts, strict=True) if (count := int((codes < 0).sum()))}
        columns = batch_columns(*(array.reshape(-1, len(rows)).T.copy() for array in (numbers, texts.clip(0))), preprocessing)
        yield Rows(TableDataset(columns if truth is None else columns | {"target": batch_target(truth, info)}), ids, truth is not None, unseen)
