"""Who imports whom, and how long one waits for `--help`."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import commands

ROOT = commands.ROOT
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
OURS = {"models", "data", "engine", *(Path(name).stem for name in SCRIPTS)}
HEAVY = {"transformers", "deepspeed", "wandb", "optuna", "lightgbm", "xgboost", "torchmetrics"}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere in it, such as {"engine.config"}; `from data import table` gives "data.table"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            files = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if (ROOT / f"{name.replace('.', '/')}.py").exists() else str(node.module) for name in files}
    return {name for name in found if name.split(".")[0] in OURS}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", files("engine"), ids=lambda path: path.name)
def test_engine_imports_engine_alone(path):
    assert {name for name in imported(path) if name.split(".")[0] != "engine"} == set()


@pytest.mark.parametrize("path", files("models") + files("data"), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_models_and_data_import_the_settings_the_kinds_of_tasks_and_each_other(path):
    assert {name for name in imported(path) if name.split(".")[0] not in ("models", "data")} <= {"engine.config", "engine.metrics"}


def test_infer_imports_no_script():
    assert imported(ROOT / "infer.py").isdisjoint({"train", "tune", "boost"})


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "tune.py"])
def test_only_tune_imports_train_and_boost(script):
    assert imported(ROOT / script).isdisjoint({"train", "tune", "boost"})


def modules_after(code: str) -> tuple[set[str], str]:
    """Top-level modules that a fresh process has loaded, and what it printed."""
    report = "import atexit, sys; atexit.register(lambda: print('\\nloaded', *{name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", f"{report}\n{code}"]
    ended = subprocess.run(command, cwd=ROOT, env=commands.environment(), capture_output=True, text=True, check=True)
    text, _, names = ended.stdout.rpartition("\nloaded ")
    return set(names.split()), text


def test_infer_needs_neither_deepspeed_nor_accelerate():
    modules, _ = modules_after("import infer")
    assert modules.isdisjoint({"deepspeed", "accelerate"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_key_and_imports_nothing_heavy(script):
    code = f"import runpy; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    modules, text = modules_after(code)
    assert modules.isdisjoint(HEAVY)
    for key in ("run.seed", "data.dataset", "model.width", "train.epochs", "optim.lr", "strategy.name", "tune.trials", "boost.rounds"):
        assert f"  {key}  (" in text


def test_help_is_as_quick_as_importing_torch():
    def seconds(*words: str) -> float:
        """Of the processor, not of the clock: other work on the computer hardly adds to them. These commands do not wait."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=ROOT, env=commands.environment(), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Frozen as the scripts freeze them, else the sweeps of torch's objects when Python ends would be 0.3 s more to stay below.
    bare = "import gc, torch, pydantic; gc.freeze()"
    best = dict.fromkeys(("torch", *SCRIPTS), float("inf"))
    for _ in range(8):  # a busy computer adds to a time and never takes from it, so the least of several is the one to compare
        for name in best:
            best[name] = min(best[name], seconds("-c", bare) if name == "torch" else seconds(name, "--help"))
        slow = {name: taken for name, taken in best.items() if taken > best["torch"] + 0.5}
        if not slow:
            break
    assert slow == {}, best
