"""What docs/ says to type is typed. docs/launching.md's lines for several servers run in tests/engine/test_processes.py."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import commands
import launch
from engine import checkpoint

LAUNCHING = (commands.ROOT / "docs/launching.md").read_text()
ONE_SERVER = re.findall(r"^(?:python|torchrun|accelerate) .* conf/digits\.toml.*$", LAUNCHING, re.MULTILINE)
# There is no SLURM here. These stand in for its commands, on one node: `srun` becomes the step itself, `scancel` signals it.
STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$STATE/requeued"; fi',
    "srun": 'echo $$ > "$STATE/step"; exec "$@"',
    "scancel": '[ "$*" = "--signal=USR1 7.0" ] && kill -USR1 "$(cat "$STATE/step")"',
    "hostname": "echo 127.0.0.1",
}


def with_ours_first(*folders: Path) -> str:
    return ":".join([*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]])


def test_there_are_lines_to_try():
    assert [line.split()[0] for line in ONE_SERVER] == ["python", "torchrun", "accelerate", "torchrun", "accelerate"]


@pytest.mark.slow
@pytest.mark.parametrize("line", ONE_SERVER)
def test_a_line_for_one_server(tmp_path, line):
    environment = commands.environment(PATH=with_ours_first(), PLAINLOOP_RUNS=str(tmp_path))
    command = f"{line} model.width=16 train.epochs=2"
    ended = subprocess.run(["bash", "-c", command], cwd=commands.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(list(tmp_path.glob("*/*/*/result.json"))) == 1


@pytest.mark.slow
def test_a_job_of_slurm_is_warned_saved_and_requeued(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in STANDINS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    environment = commands.environment(PATH=with_ours_first(tmp_path / "bin"), STATE=str(tmp_path), PROCESSES="2", **slurm)
    run = tmp_path / "run"

    def job(*words: str) -> launch.Running:
        command = ["bash", "docs/slurm.sh", "--config", "conf/digits.toml", f"run.dir={run}", "model.width=16", "train.save_every=20", *words]
        log = launch.new_log(run)
        with open(log, "w") as output:
            process = subprocess.Popen(command, cwd=commands.ROOT, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        launch.started.append(launch.Running(process, log))
        return launch.started[-1]

    first = job("train.steps=1_000_000", "train.eval_every=100_000")
    first.until(lambda: checkpoint.folders(run), 120)
    first.kill(signal.SIGUSR1)
    assert first.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "stopped by a signal at step" in first.text
    step = checkpoint.step_of(checkpoint.folders(run)[0])
    second = job(f"train.steps={step + 20}", "train.eval_every=100_000")
    assert second.wait() == 0
    assert f"at step {step}" in second.text
    assert (run / "result.json").exists()
