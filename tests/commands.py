"""Command lines for tests: a script in a process of its own, under a launcher, or many in one process.

A script's imports cost seconds. So most mistakes are tried one after another in one process, through the scripts' own
`exit_status(main)`, with both output streams caught at their file descriptors.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node")
ACCELERATE = ("-m", "accelerate.commands.launch")


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    errors: str

    @property
    def text(self) -> str:
        return self.out + self.errors


def environment(**more: str) -> dict[str, str]:
    """The tests' own environment without what would change a result: a launcher's variables, the user's folders."""
    ours = ("PLAINLOOP_", "ACCELERATE_", "MASTER_", "TORCHELASTIC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        kept.pop(key, None)
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more


def run(script: str, *words: object, folder: Path, launcher: Sequence[str] = (), root: Path = ROOT, **more: str) -> Ended:
    """`python [launcher] script words`, in a folder."""
    command = [sys.executable, *launcher, str(root / script), *map(str, words)]
    variables = environment(**more) | {"PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def succeed(script: str, *words: object, folder: Path, launcher: Sequence[str] = (), root: Path = ROOT, **more: str) -> str:
    """As `run`, for a command that must succeed. What it printed."""
    ended = run(script, *words, folder=folder, launcher=launcher, root=root, **more)
    assert ended.status == 0, ended.text
    return ended.out


def many(commands: Sequence[Sequence[object]], folder: Path, root: Path = ROOT) -> list[Ended]:
    """[script, word, …] of each command, in one process; a leading "NAME=value" is put into its environment."""
    text = json.dumps([[str(word) for word in words] for words in commands])
    variables = environment(PYTHONPATH=str(root))
    ended = subprocess.run([sys.executable, __file__], cwd=folder, env=variables, input=text, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return [Ended(**values) for values in json.loads(ended.stdout)]


@contextmanager
def caught(descriptor: int) -> Iterator[list[str]]:
    """What is written to a file descriptor meanwhile, as the one element of a list."""
    text: list[str] = []
    kept = os.dup(descriptor)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept, descriptor)
            os.close(kept)
            file.seek(0)
            text.append(file.read())


def one(words: list[str]) -> dict[str, object]:
    """A command as the shell would see it."""
    before = dict(os.environ)
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        os.environ[key] = value
    sys.argv = [str(Path(os.environ["PYTHONPATH"], words[0])), *words[1:]]
    with caught(1) as out, caught(2) as errors:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    os.environ.clear()
    os.environ.update(before)
    return {"status": status, "out": out[0], "errors": errors[0]}


if __name__ == "__main__":
    print(json.dumps([one(words) for words in json.load(sys.stdin)]))
