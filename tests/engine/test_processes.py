"""Signals, deaths of ranks, launchers and hosts: nothing is lost, nothing runs on alone, and the same command goes on."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
from engine import checkpoint
from soak import KINDS, Kind, differences

ONE, DDP, ZERO3 = KINDS
FOUR = Kind("ddp x 4", 4, "ddp")
ENDLESS = ("train.steps=1000000", "train.eval_every=1000000")
OTHERS_END = 40
"""seconds within which a run ends after the death of one rank: torchrun gives the others 30"""
ORPHANS_END = 120
"""and in which ranks end whose launcher died while they imported: they wait half a minute for its store"""


def saved(run: Path) -> bool:
    return bool(checkpoint.folders(run))


def finish(kind: Kind, run: Path) -> None:
    """Two more steps, which must give what a straight run of as many steps gives."""
    step = checkpoint.step_of(checkpoint.folders(run)[0])
    few = (f"train.steps={step + 2}", "train.eval_every=1000000")
    assert f"at step {step}" in kind.start(run, *few).succeed()
    kind.start(run.with_name("straight"), *few).succeed()
    assert differences(run, run.with_name("straight")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_python(tmp_path, number):
    run = tmp_path / "run"
    running = ONE.start(run, *ENDLESS, cold=number == signal.SIGTERM)
    running.until(lambda: saved(run))
    running.kill(number)
    assert running.wait() == 143
    step = checkpoint.step_of(checkpoint.folders(run)[0])
    assert f"stopped by a signal at step {step} and saved; the same command goes on" in running.text
    finish(ONE, run)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "to"),
    [(DDP, "launcher"), (ZERO3, "rank"), pytest.param(DDP, "rank", marks=SLOW), pytest.param(ZERO3, "launcher", marks=SLOW)],
    ids=lambda value: getattr(value, "strategy", value),
)
def test_sigterm_under_a_launcher(tmp_path, kind, to):
    run = tmp_path / "run"
    running = kind.start(run, *ENDLESS)
    running.until(lambda: saved(run))
    os.kill(running.pid if to == "launcher" else running.ranks()[1], signal.SIGTERM)
    assert running.wait() == 1  # torchrun makes this of any status
    assert f"at step {checkpoint.step_of(checkpoint.folders(run)[0])} and saved" in running.text
    finish(kind, run)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "every process"])
def test_a_signal_to_all_leaves_the_reading_processes_to_their_rank(tmp_path, to):
    """torchrun hands a signal on to the process groups of its ranks, SLURM sends it to every process."""
    run = tmp_path / "run"
    running = DDP.start(run, *ENDLESS, "train.workers=2", cold=True)
    running.until(lambda: saved(run))
    for pid in [*launch.descendants(running.pid)] if to == "every process" else []:
        launch.send(pid, signal.SIGTERM)
    running.kill(signal.SIGTERM)
    assert running.wait() == 1
    assert f"at step {checkpoint.step_of(checkpoint.folders(run)[0])} and saved" in running.text
    assert "DataLoader" not in running.text
    finish(DDP, run)


def test_before_the_first_step_a_signal_ends_it(tmp_path):
    running = ONE.start(tmp_path / "run", *ENDLESS)
    running.until(lambda: (tmp_path / "run" / "config.toml").exists())
    running.kill(signal.SIGTERM)
    assert running.wait() in (-signal.SIGTERM, 143)
    assert "Traceback" not in running.text


@pytest.mark.parametrize("kind", [DDP, ZERO3], ids=lambda kind: kind.strategy)
def test_the_others_end_after_the_death_of_one(tmp_path, kind):
    running = kind.start(tmp_path / "run", *ENDLESS)
    running.until(lambda: saved(tmp_path / "run"))
    ranks = running.ranks()
    assert len(ranks) == 2
    begun = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    running.wait(OTHERS_END)
    assert not any(map(launch.alive, ranks))
    print(f"{kind.name}: ended {time.monotonic() - begun:.1f} s after the death of rank 1")


@pytest.mark.parametrize("kind", [DDP, ZERO3], ids=lambda kind: kind.strategy)
def test_ranks_die_with_their_launcher(tmp_path, kind):
    running = kind.start(tmp_path / "run", *ENDLESS)
    running.until(lambda: saved(tmp_path / "run"))
    ranks = running.ranks()
    assert len(ranks) == 2
    running.kill()
    running.wait()
    assert launch.eventually(lambda: not any(map(launch.alive, ranks)), 5)


def test_reading_processes_die_with_their_rank(tmp_path):
    """They hold the lock of the run folder too."""
    running = ONE.start(tmp_path / "run", *ENDLESS, "train.workers=2")
    running.until(lambda: saved(tmp_path / "run"))
    readers = running.ranks()
    assert len(readers) >= 2
    running.kill()
    running.wait()
    assert launch.eventually(lambda: not any(map(launch.alive, readers)), 2)


@pytest.mark.slow
def test_ranks_die_with_torchrun(tmp_path):
    """The command itself; also where the launcher dies while the ranks still import."""
    running = DDP.start(tmp_path / "run", *ENDLESS, cold=True)
    running.until(lambda: saved(tmp_path / "run"))
    ranks = running.ranks()
    running.kill()
    assert launch.eventually(lambda: not any(map(launch.alive, ranks)), 5)
    early = DDP.start(tmp_path / "early", *ENDLESS, cold=True)
    early.until(lambda: len(early.ranks()) == 2)
    ranks = early.ranks()
    early.kill()
    assert launch.eventually(lambda: not any(map(launch.alive, ranks)), ORPHANS_END), early.text


@pytest.mark.parametrize("kind", [DDP, pytest.param(ZERO3, marks=pytest.mark.slow)], ids=lambda kind: kind.strategy)
def test_torchrun_restarts_and_the_run_resumes_by_itself(tmp_path, kind):
    kind.start(tmp_path / "straight").succeed()
    run = tmp_path / "run"
    text = kind.start(run, launcher=("--max-restarts", "2"), KILL="step/14/1/rank", KILLS=str(tmp_path / "kills")).succeed()
    assert (tmp_path / "kills").read_text() == "step/14/1/rank\n"
    assert re.search(r"resumed .* at step (7|10)\n", text)
    assert differences(run, tmp_path / "straight") == []


@pytest.mark.slow
def test_four_ranks_after_a_kill(tmp_path):
    """With three or more ranks DDP's buckets decide the order of summation."""
    FOUR.start(tmp_path / "straight").succeed()
    run = tmp_path / "run"
    for point in ("step/12/2/rank", "gather/2/1/launcher"):
        assert FOUR.start(run, KILL=point, KILLS=str(tmp_path / "kills")).wait() != 0
    assert (tmp_path / "kills").read_text().count("\n") == 2
    assert "resumed" in FOUR.start(run).succeed()
    assert differences(run, tmp_path / "straight") == []


def test_one_owner(tmp_path):
    """A second process on the same run folder is told who has it; under a launcher all its ranks leave with that line."""
    run = tmp_path / "run"
    owner = ONE.start(run, *ENDLESS)
    owner.until(lambda: saved(run))
    second = ONE.start(run, *ENDLESS)
    assert second.wait() == 2
    assert f"{run}: locked by process {owner.pid} on {os.uname().nodename}" in second.text
    assert "Traceback" not in second.text
    assert owner.poll() is None
    words = [*launch.TINY, *ENDLESS, launch.halves(2), f"run.dir={run}"]
    both = launch.start(*words, log=tmp_path / "both.log", processes=2)
    assert both.wait() == 1
    assert both.text.count(f"locked by process {owner.pid}") == 1
    owner.kill(signal.SIGTERM)
    assert owner.wait() == 143


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a pair of virtual cards: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command")
    names = [f"plain{os.getpid() % 10000}{letter}" for letter in "ab"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespace can be made: {made.stderr.strip()}")
    try:
        setup = [f"netns add {names[1]}", f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
        for place, name in enumerate(names, start=1):
            setup += [f"-n {name} addr add 10.77.0.{place}/24 dev veth0", f"-n {name} link set veth0 up", f"-n {name} link set lo up"]
        for line in setup:
            subprocess.run(["ip", *line.split()], check=True)
        yield names
    finally:
        launch.end_all()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def on_host(names: list[str], place: int, run: Path, kind: Kind, *before: str) -> launch.Running:
    """docs/launching.md's line on one of two hosts, one rank each. `before` are words in front of the command.

    A host that comes back waits in vain for the address of torchrun's shared store, so each start has a store of its own.
    """
    text = (launch.ROOT / "docs/launching.md").read_text()
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
    lines = [line for line in re.findall("^torchrun --nnodes 2 .*", text, re.MULTILINE) if ("zero3-offload" in line) == (kind is ZERO3)]
    launcher = lines[place].partition(" train.py ")[0].removeprefix("torchrun ")
    for there, here in {"10.0.0.": "10.77.0.", "--nproc_per_node 8": "--nproc_per_node 1", "run1": run.name}.items():
        launcher = launcher.replace(there, here)
    launcher = launcher.replace(" --local_addr", ",join_timeout=120,last_call_timeout=1 --max-restarts 3 --local_addr")
    words = [*launch.TINY, "train.steps=600", "train.save_every=20", "train.eval_every=300", launch.halves(2)]
    return launch.start(
        *words, f"strategy.name={kind.strategy}", f"run.dir={run}",
        log=launch.new_log(run.with_name(f"{run.name}-host{place}")), launcher=launcher.split(), cold=True,
        before=("ip", "netns", "exec", names[place], *before), GLOO_SOCKET_IFNAME="veth0",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DDP, ZERO3], ids=lambda kind: kind.strategy)
def test_two_hosts(tmp_path, hosts, kind):
    """They end like one host with two processes, also where one of them dies and comes back."""
    long = ("train.steps=600", "train.save_every=20", "train.eval_every=300")
    kind.start(tmp_path / "straight", *long).succeed()
    run = tmp_path / "run"
    first, second = on_host(hosts, 0, run, kind), on_host(hosts, 1, run, kind)
    second.until(lambda: saved(run), 120)
    for pid in [*launch.descendants(second.pid), second.pid]:
        launch.send(pid, signal.SIGKILL)
    second.wait()
    step = checkpoint.step_of(checkpoint.folders(run)[0])
    assert step < 600
    again = on_host(hosts, 1, run, kind)
    first.succeed(240)
    again.succeed()
    assert "resumed " in first.text + again.text
    assert differences(run, tmp_path / "straight") == []


@pytest.mark.slow
def test_hosts_that_do_not_share_the_run_folder(tmp_path, hosts):
    """The second host has another disk in the place of the first one's."""
    run, other = tmp_path / "disk" / "run", tmp_path / "other"
    run.parent.mkdir()
    other.mkdir()
    script = f'mount --bind {other} {run.parent} && exec "$@"'
    ends = [on_host(hosts, 0, run, DDP), on_host(hosts, 1, run, DDP, "unshare", "--mount", "sh", "-c", script, "sh")]
    ends[0].until("does not see this run folder; put run.dir on a disk that all hosts share", 120)
    assert not saved(run)
