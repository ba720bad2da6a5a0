"""Weights for inference: streamed out of a checkpoint into plain safetensors, and loaded back strictly."""

import argparse
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from engine import checkpoint, config, process, settings, state
from engine.config import UserError
from engine.settings import byte_count
from engine.tensors import TensorWriter, nbytes

INPUTS = ("config.toml", "info.json", "preprocessing.json")
INDEX = "model.safetensors.index.json"


def consolidate(source: Path, output: Path, max_shard: int, dtype: torch.dtype | None = None, exported: Any = None) -> None:
    """Write a checkpoint's weights whole, in files of at most max_shard bytes: one tensor is in memory at a time.

    `exported(names)` is what a model makes of its own names: {name in the files: (names here, function of their tensors)}.
    """
    manifest = checkpoint.read_manifest(source)
    tensors = checkpoint.stored(source, manifest, ("model",))
    made = exported(list(tensors.places)) if exported else {name: ([name], lambda tensor: tensor) for name in tensors.places}
    specs = {}
    for name, (parts, _) in made.items():
        # The widest: the product of a frozen layer in 16 bits and its adapters in 32 would lose what they learned.
        kept, shape = functools.reduce(torch.promote_types, (tensors.spec(part)[0] for part in parts)), tensors.spec(parts[0])[1]
        specs[name] = (dtype if dtype and kept.is_floating_point else kept, shape)
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + nbytes(*spec) > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(*spec)
    # Tied weights are written once; their other names stand in the metadata.
    metadata = {"format": "pt", "aliases": json.dumps(manifest["aliases"])}
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = TensorWriter(output / file, {name: specs[name] for name in names}, metadata)
        for name in names:
            parts, function = made[name]
            writer.write(name, function(*map(tensors.full, parts)).to(specs[name][0]))
        writer.close()
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(nbytes(*spec) for spec in specs.values())
        (output / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def export(run: Path, source: Path, output: Path, max_shard: int, dtype: torch.dtype | None) -> Path:
    """All that infer.py needs, from one checkpoint of a run, in a folder that appears whole."""
    aside = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    chosen = settings.parse([run / "config.toml"]).model
    exported = getattr(config.module("models", chosen.name), "exported", None)
    consolidate(source, aside, max_shard, dtype, exported and functools.partial(exported, chosen))
    for path in [*(run / name for name in INPUTS), *(run / "files").glob("*")]:
        shutil.copy(path, aside / path.name)
    (aside / "step.json").write_text(json.dumps({"step": checkpoint.step_of(source)}))
    shutil.rmtree(output, ignore_errors=True)
    os.rename(aside, output)
    return output


def export_best(run: Path, progress: Any, train: Any) -> Path | None:
    """Point best/ at the export of the best checkpoint there is. None where no checkpoint is whole."""
    by_step = {checkpoint.step_of(path): path for path in checkpoint.folders(run)}
    pinned = [by_step[int(step)] for _, step in progress.pinned if int(step) in by_step]
    source = None
    for path in dict.fromkeys([*pinned, *by_step.values()]):
        if (reason := checkpoint.problem(path)) is None:
            source = path
            break
        process.say(f"skipped {path} for best/: {reason}")
    if source is None:
        return None
    name = f"best-{checkpoint.step_of(source)}"
    export(run, source, run / name, byte_count(train.max_shard), torch.bfloat16 if train.export == "bf16" else None)
    link = run / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    if not (run / "best").is_symlink():  # a copy of a run folder may have a folder in its place
        shutil.rmtree(run / "best", ignore_errors=True)
    os.replace(link, run / "best")
    for old in run.glob("best-*"):
        if old.name != name:
            shutil.rmtree(old)
    return source


def weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    return [folder / "model.safetensors"]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Strict, one tensor at a time. Raises UserError where names or shapes differ. The files' names lack `model.prefix`."""
    wanted = {**dict(model.named_parameters()), **state.buffers(model)}
    wanted = {name.removeprefix(getattr(model, "prefix", "")): tensor for name, tensor in wanted.items()}
    missing = set(wanted)
    with torch.no_grad():
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # safetensors raises its own, unrelated class for a torn file
                raise UserError(f"{path}: cannot be read: {error}") from None
            for name in file.keys():
                if name not in wanted or list(file.get_slice(name).get_shape()) != list(wanted[name].shape):
                    raise UserError(f"{path}: {name} does not fit the model of {folder}/config.toml; was models/ edited since, or an override given?")
                wanted[name].copy_(file.get_tensor(name))
                missing.discard(name)
    if missing:
        raise UserError(f"{folder}: {sorted(missing)[0]} is missing; was models/ edited since?")


def choose(run: Path, wanted: str) -> Path:
    """The checkpoint that `step=120` or `epoch=3` means. Raises UserError that lists what there is."""
    key, _, number = wanted.partition("=")
    if key not in ("step", "epoch") or not number.isdigit():
        raise UserError(f"--checkpoint {wanted}: must be step=NUMBER or epoch=NUMBER")
    found = checkpoint.folders(run)
    for path in found:
        parts = dict(part.split("=") for part in path.name.split("-"))
        if int(parts[key]) == int(number):
            reason = checkpoint.problem(path)
            if reason:
                raise UserError(f"{path}: {reason}; choose another checkpoint")
            return path
    raise UserError(f"--checkpoint {wanted}: not in {run}/checkpoints; there are: {', '.join(p.name for p in found) or 'none'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint", description="Consolidate a checkpoint's weights, without processes.")
    parser.add_argument("source", type=Path, help="a run folder (its newest whole checkpoint) or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--checkpoint", help="step=NUMBER or epoch=NUMBER of a run folder")
    parser.add_argument("--max-shard", default="5GB", help="largest weight file")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args(arguments)
    source = options.source
    if not (source / "manifest.json").exists():
        chosen = choose(source, options.checkpoint) if options.checkpoint else checkpoint.newest_whole(source)
        if chosen is None:
            raise UserError(f"{source}: neither a checkpoint nor a run folder with a whole one")
        source = chosen
    elif checkpoint.problem(source):
        raise UserError(f"{source}: {checkpoint.problem(source)}; choose another checkpoint")
    if options.output.exists():
        raise UserError(f"{options.output}: exists already; --output takes a new folder")
    try:
        size = byte_count(options.max_shard)
    except ValueError as error:
        raise UserError(f"--max-shard {options.max_shard}: {error}") from None
    run = source.resolve().parent.parent
    for name in INPUTS:  # an export without them could not be predicted with
        if not (run / name).is_file():
            raise UserError(f"{source}: {run}/{name} is missing; leave the checkpoint in its run folder")
    try:
        export(run, source, options.output, size, torch.bfloat16 if options.dtype == "bf16" else None)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written: {error.strerror or error}") from None
    print(f"{source} -> {options.output}")
