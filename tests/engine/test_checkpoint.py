"""A checkpoint is whole or not loaded, whatever was done to it; and a run ends as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import launch
from commands import ROOT
from engine import checkpoint, export, settings
from soak import KINDS, Kind, differences, soak, whole

ONE, DDP, ZERO3 = KINDS
ZERO2 = Kind("zero2 x 2", 2, "zero2")
KEEP = "train.keep_last=2"


def stopped_and_straight(kind: Kind, folder: Path) -> tuple[Path, Path]:
    """A run stopped in its 19th step, with the whole checkpoints of steps 15 and 19, and one that went on to its end."""
    straight, stopped = folder / "straight", folder / "stopped"
    kind.start(straight, KEEP).succeed()
    running = kind.start(stopped, KEEP, KILL="step/18/0/rank", KILLS=str(folder / "kills"), SIGNAL="SIGTERM")
    assert running.wait() != 0
    assert "stopped by a signal at step 19 and saved" in running.text
    return stopped, straight


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Path]:
    return stopped_and_straight(ONE, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, Path]:
    return stopped_and_straight(ZERO3, tmp_path_factory.mktemp("sharded"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def delete(path: Path) -> None:
    path.unlink()


def put_foreign_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def link_out(folder: Path) -> None:
    """The same bytes, but outside of the folder."""
    outside = folder.parent.parent / "outside.safetensors"
    os.rename(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


def lead_out(folder: Path) -> None:
    """A manifest, rightly signed, whose path leaves the folder."""
    manifest = checkpoint.read_manifest(folder)
    del manifest["digest"]
    manifest["files"]["../../outside.safetensors"] = manifest["files"].pop("model.safetensors")
    os.rename(folder / "model.safetensors", folder.parent.parent / "outside.safetensors")
    checkpoint.write_manifest(folder, manifest)


def replace_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def resumes_as_straight(kind: Kind, stopped: Path, straight: Path, run: Path, damage: Callable[[Path], None], named: str) -> None:
    """After the damage to its newest checkpoint a run says what it skips, goes on from the one before and ends like the straight one."""
    shutil.copytree(stopped, run, symlinks=True)
    newest = whole(run)
    damage(newest)
    text = kind.start(run, KEEP).succeed()
    skipped = [line for line in text.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == 1
    assert str(newest) in skipped[0]
    assert named in skipped[0]
    assert f"resumed {newest.parent}/epoch=000-step=00000015 at step 15" in text
    assert differences(run, straight) == []


@pytest.mark.parametrize("damage", [flip, cut, delete])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optim.safetensors"])
def test_damaged_file(one, tmp_path, name, damage):
    resumes_as_straight(ONE, *one, tmp_path / "run", lambda folder: damage(folder / name), name)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut, delete])
@pytest.mark.parametrize("name", ["manifest.json", *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optim") for rank in (0, 1))])
def test_damaged_file_of_a_rank(sharded, tmp_path, name, damage):
    resumes_as_straight(ZERO3, *sharded, tmp_path / "run", lambda folder: damage(folder / name), name)


@pytest.mark.parametrize(
    ("damage", "named"),
    [(put_foreign_file, "notes.txt"), (link_out, "model.safetensors"), (lead_out, "outside.safetensors"), (replace_manifest, "manifest.json")],
)
def test_foreign(one, tmp_path, damage, named):
    resumes_as_straight(ONE, *one, tmp_path / "run", damage, named)


def test_two_ranks_use_the_same_one(sharded, tmp_path):
    resumes_as_straight(ZERO3, *sharded, tmp_path / "run", lambda folder: flip(folder / "optim-00001-of-00002.safetensors"), "optim-00001")


def test_empty_folder_and_a_file_named_as_one(one, tmp_path):
    stopped, straight = one
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "checkpoints" / "epoch=001-step=00000020").mkdir()
    (run / "checkpoints" / "epoch=001-step=00000021").touch()
    text = ONE.start(run, KEEP).succeed()
    assert all(f"skipped {run}/checkpoints/epoch=001-step=000000{step}: manifest.json" in text for step in (20, 21))
    assert "epoch=001-step=00000019 at step 19" in text
    (run / "checkpoints" / "epoch=001-step=00000021").unlink()
    assert differences(run, straight) == []


def test_nothing_whole_starts_again_and_says_so(one, tmp_path):
    stopped, straight = one
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for folder in (run / "checkpoints").iterdir():
        delete(folder / "manifest.json")
    text = ONE.start(run, KEEP).succeed()
    assert text.count("skipped ") == len(checkpoint.folders(stopped))
    assert "resumed" not in text
    assert differences(run, straight) == []


def test_a_skipped_one_does_not_push_out_whole_ones(one, tmp_path):
    """It is newer than all that are written until its step comes again."""
    stopped, straight = one
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    flip(whole(run) / "model.safetensors")
    text = ""
    for step in (17, 19):  # of each two steps the second sees the signal and saves
        last = ONE.start(run, "train.keep_last=1", KILL="step/1/0/rank", KILLS=str(tmp_path / "kills"), SIGNAL="SIGTERM")
        assert last.wait() == 143
        text = last.text
        assert f"at step {step} and saved" in text
    assert "resumed" in text.rpartition("epoch=000-step=00000017")[0]
    ONE.start(run, KEEP).succeed()
    assert differences(run, straight) == []


@pytest.mark.parametrize("kind", [DDP, pytest.param(ZERO3, marks=pytest.mark.slow)], ids=lambda kind: kind.strategy)
def test_full_disk_by_a_limit(tmp_path, kind):
    kind.start(tmp_path / "straight").succeed()
    text = kind.start(tmp_path / "run", AT_STEPS="8/17", LARGEST="2000").succeed()
    assert "warning: saving step 10: [Errno 27] File too large; training goes on" in text
    assert "warning: saving step 15" in text
    assert differences(tmp_path / "run", tmp_path / "straight") == []


def test_full_disk_leaves_the_last_whole_one(tmp_path):
    run = tmp_path / "run"
    killed = DDP.start(run, AT_STEPS="8/100", LARGEST="2000", KILL="step/17/0/launcher", KILLS=str(tmp_path / "kills"))
    assert killed.wait() == -9
    assert "warning: saving step 10" in killed.text
    (last,) = checkpoint.folders(run)
    assert checkpoint.step_of(last) in (5, 7)
    assert checkpoint.problem(last) is None
    assert f"resumed {last}" in DDP.start(run).succeed()
    DDP.start(tmp_path / "straight").succeed()
    assert differences(run, tmp_path / "straight") == []


def test_full_disk(tmp_path):
    """A small tmpfs that something else fills up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        long = ("train.steps=80", "train.log_every=1")  # enough lines to need another page
        text = ONE.start(disk, *long, AT_STEPS="8/60", FULL=str(disk)).succeed()
        ONE.start(tmp_path / "straight", *long).succeed()
        assert "warning: saving step 10: [Errno 28] No space left on device" in text
        assert differences(disk, tmp_path / "straight") == []
    finally:
        launch.end_all()
        subprocess.run(["umount", disk], check=True)


def test_nothing_to_unpickle(one, sharded, tmp_path):
    """Every file of checkpoints/ and best/ is JSON, TOML, or safetensors to the last byte."""
    ZERO2.start(tmp_path / "zero2").succeed()
    folders = [folder for run in (*one, *sharded, tmp_path / "zero2") for folder in (run / "checkpoints", run / "best")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            size = int.from_bytes(content[:8], "little")
            entries = json.loads(content[8 : 8 + size])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            assert len(content) == 8 + size + max(ends)
        else:
            {".json": json.loads, ".toml": tomli.loads}[path.suffix](content.decode())


def test_resume_from_another_run(one, tmp_path):
    """run.resume takes a run folder or one of its checkpoints; history and weights go on from there."""
    stopped, straight = one
    for number, source in enumerate([stopped, checkpoint.folders(stopped)[1]]):
        run = tmp_path / f"run{number}"
        text = ONE.start(run, f"run.resume={source}").succeed()
        assert f"at step {(19, 15)[number]}" in text
        assert differences(run, straight) == []
        assert "finished at step 24" in ONE.start(run, f"run.resume={source}").succeed()


def test_a_run_that_is_there_is_not_replaced_by_another(one, tmp_path):
    """run.resume begins a run; in a folder that holds one it is refused, unless it is the command that began it."""
    stopped, straight = one
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for source in (straight, tmp_path / "nowhere"):
        running = ONE.start(run, f"run.resume={source}")
        assert running.wait() == 2
        assert f"run.resume = '{source}' begins another" in running.text
    assert "resumed" in ONE.start(run, f"run.resume={run}").succeed()
    assert differences(run, straight) == []


def test_another_model_is_refused_and_another_optimizer_begins_its_moments(one, tmp_path):
    stopped, _ = one
    run = tmp_path / "run"
    running = ONE.start(run, f"run.resume={stopped}", "model.width=8")
    assert running.wait() == 2
    assert "of another model" in running.text
    assert "is [16] there, [8] here" in running.text
    # The corrected command is not in the way of the wrong one.
    text = ONE.start(run, f"run.resume={stopped}", "optim.name=SGD", "optim.options.momentum=0.9").succeed()
    assert "the moments of Adam are left behind: the optimizer is now SGD with momentum" in text
    assert "at step 19" in text
    other = tmp_path / "other"
    assert "moments of SGD with momentum" in ONE.start(other, f"run.resume={run}", "train.steps=30").succeed()


def test_where_the_best_one_is_damaged_another_is_exported(one, tmp_path, capsys):
    _, straight = one
    run = tmp_path / "run"
    shutil.copytree(straight, run, symlinks=True)
    pinned, *rest = checkpoint.folders(run)
    flip(pinned / "model.safetensors")
    progress = checkpoint.Progress(pinned=[[1.0, checkpoint.step_of(pinned)]])
    assert export.export_best(run, progress, settings.parse([run / "config.toml"]).train) == rest[0]
    assert f"skipped {pinned} for best/: model.safetensors was altered" in capsys.readouterr().out
    assert json.loads((run / "best" / "step.json").read_text())["step"] == checkpoint.step_of(rest[0])


def test_masters_are_what_is_exported(tmp_path):
    """Under bf16 the gathered weights are rounded; what is saved and consolidated are the fp32 masters."""
    run, masters = tmp_path / "run", tmp_path / "masters"
    masters.mkdir()
    ZERO3.start(run, "train.precision=bf16", "train.keep_last=9", MASTERS=str(masters)).succeed()
    found = checkpoint.folders(run)
    assert len(found) > 5
    for folder in found:
        output = tmp_path / folder.name
        output.mkdir()
        export.consolidate(folder, output, 3000)
        index = json.loads((output / export.INDEX).read_text())["weight_map"]
        assert len(set(index.values())) > 1
        wanted = load_file(masters / f"{checkpoint.step_of(folder)}.safetensors")
        assert index.keys() == wanted.keys()
        for name, tensor in wanted.items():
            with safe_open(output / index[name], "pt") as file:
                assert torch.equal(file.get_tensor(name), tensor)
                assert not torch.equal(tensor.bfloat16().float(), tensor)
    command = [sys.executable, "-m", "engine.checkpoint", run, "--output", tmp_path / "whole"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == wanted.keys()


def test_three_kills(tmp_path):
    count = soak(3, 0, tmp_path)
    assert count.differences == []
    assert count.kills == 3
    assert count.resumed > 0


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    count = soak(20, 1, tmp_path, cold_every=4)
    assert count.differences == []
    assert count.kills == 20
    assert count.resumed > 10
