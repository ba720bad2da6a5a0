"""The README's examples run in a copy of the repository, and what its commands name exists."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest

import commands
from engine import config, settings

README = (commands.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ((?:models|data|conf)/\w+\.\w+)")


def examples() -> dict[str, str]:
    """Files of the README: blocks whose first line is a comment with a path; blocks of one path are joined."""
    files: dict[str, str] = {}
    for language, text in BLOCKS:
        path = FILE.match(text)
        if language in ("python", "toml") and path:
            files[path[1]] = files.get(path[1], "") + text.partition("\n")[2] + "\n\n"
    return files


def shell_commands() -> list[list[str]]:
    """Words of every command in a sh block, without comments, loops and what is piped."""
    lines = [re.sub(r"\$\{?data\}?", "adult", line.strip()) for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"(\w+=\S+ )*(make|python|torchrun|accelerate) ", line)]
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] for words in found]


def script_commands() -> list[list[str]]:
    """[script, word, …] of every command that runs a script of ours."""
    found = []
    for words in shell_commands():
        place = next((place for place, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)), None)
        if place is not None:
            found.append(words[place:])
    return found


def test_there_is_something_to_test():
    assert list(examples()) == ["conf/mine.toml", "models/gated.py", "data/arrays.py", "conf/tumours.toml"]
    assert len(script_commands()) > 15
    assert README.index("make train") < README.index("make test") < 200  # the two commands come first


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_commands_name_what_exists(words, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (commands.ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if words[0] == "make":
            assert word == "make" or word in targets or word.startswith("PYTHON=")
        if re.fullmatch(r"\w+\.py", word):
            assert (commands.ROOT / word).exists()
        if word.endswith(".toml") and not word.startswith("runs/"):
            assert (commands.ROOT / word).exists() or word in examples()


@pytest.mark.parametrize("words", script_commands(), ids=" ".join)
def test_overrides_and_options_are_known(words):
    files = [commands.ROOT / word for word in words if word.endswith(".toml") and word not in examples() and not word.startswith("runs/")]
    overrides = [word.replace("$lr", "1e-3") for word in words if "=" in word and "/" not in word.partition("=")[0] and "step=" not in word]
    settings.parse(files or [commands.ROOT / "conf/digits.toml"], overrides)
    text = (commands.ROOT / words[0]).read_text() + (commands.ROOT / "engine/settings.py").read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in text


def test_the_tree_names_every_script_and_file():
    tree = next(text for language, text in BLOCKS if language == "" and "train.py" in text)
    folder, found = "", set()
    for line in tree.splitlines():
        for name in re.findall(r"(?:^|  )(\w+(?:\.py|/))(?=  |$)", line):
            folder = folder if line.startswith(" ") else ""
            found.add(folder + name)
            folder = name if name.endswith("/") else folder
    missing = [name for name in found if not (commands.ROOT / name).exists()]
    assert missing == []
    present = {
        path.relative_to(commands.ROOT).as_posix() for pattern in ("*.py", "engine/*.py", "models/*.py") for path in commands.ROOT.glob(pattern)
    }
    assert {name for name in present if "/_" not in name} - found == set()


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`((?:run|data|model|task|train|optim|strategy|track)\.(?!py\b)\w+)\b", README))))
def test_keys_in_the_text_exist(key):
    section, name = key.split(".")
    folder = {"data": "data", "model": "models"}.get(section)
    classes = [config.module(folder, file).Config for file in config.listing(folder)] if folder else [get_type_hints(settings.Settings)[section]]
    assert any(name in known.model_fields for known in classes)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as git would copy it, with the README's files."""
    copy = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=commands.ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "benchmarks/")) and (commands.ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(commands.ROOT / name, copy / name)
    for name, text in examples().items():
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    return copy


def test_the_examples_are_written_as_the_repository_is(copy):
    files = [name for name in examples() if name.endswith(".py")]
    # The parts of one file bring their imports with them.
    ended = subprocess.run(
        ["ruff", "check", "--ignore", "E402,I001", *files], cwd=copy, env=path_with_ours(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


def path_with_ours() -> dict[str, str]:
    """The environment with our Python first, as after `. .venv/bin/activate`."""
    import os
    import sys

    return commands.environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_the_examples_train_evaluate_and_predict_with_no_other_edit(copy):
    block = next(text for language, text in BLOCKS if language == "sh" and "conf/tumours.toml" in text)
    environment = path_with_ours() | {"PYTHONPATH": ""}
    ended = subprocess.run(["bash", "-euc", block], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((copy / "runs/tumours/result.json").read_text())
    assert set(result["test"]) == {"loss", "accuracy", "specificity"}
    assert result["test"]["accuracy"] > 0.9
    assert result["best"]["specificity"] == max(json.loads(line)["valid"]["specificity"] for line in open(copy / "runs/tumours/metrics.jsonl"))
    said = " ".join(f"{name} {value:.4g}" for name, value in result["test"].items())
    assert f"test: {said}" in re.sub(" +", " ", ended.stdout)  # infer.py --split test says what result.json holds
    written = pd.read_csv(copy / "predictions.csv")
    assert list(written) == ["row", "prediction", "probability_0", "probability_1"]
    assert list(written.row) == list(range(569))


def test_the_settings_of_the_examples_are_in_help_and_checked(copy):
    said = commands.succeed("train.py", "--config", "conf/tumours.toml", "--help", folder=copy, root=copy)
    assert "  model.width  (int, 64)\n      units of the hidden layer\n" in said
    assert "  data.file  (str, required)\n      .npz file with x and y\n" in said
    wrong = {
        "task.loss_options.gama=1": "task.loss_options.gama: focal has no such option; did you mean gamma?",
        "optim.options.beta=1": "optim.options.beta: Lion has no such argument; did you mean betas?",
        "data.file=gone.npz": "gone.npz: cannot be read as .npz",
        "task.loss=focall": "no such loss",
    }
    lines = [["train.py", "--config", "conf/tumours.toml", f"run.dir=wrong/{number}", override] for number, override in enumerate(wrong)]
    for line, ended in zip(wrong.values(), commands.many(lines, copy, copy), strict=True):
        assert (ended.status, ended.errors.count("\n")) == (2, 1), ended.text
        assert line in ended.errors


@pytest.mark.slow
def test_the_loops_train_test_and_compare(copy):
    block = next(text for language, text in BLOCKS if language == "sh" and "for lr in" in text)
    environment = path_with_ours() | {"PYTHONPATH": ""}
    ended = subprocess.run(["bash", "-euc", block], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ranking = [line.split(maxsplit=1) for line in ended.stdout.splitlines()[-3:]]
    assert len({run for _, run in ranking}) == 3
    assert [float(score) for score, _ in ranking] == sorted((float(score) for score, _ in ranking), reverse=True)
    assert all((copy / run / "result.json").exists() for _, run in ranking)
    assert ended.stdout.count("\ntest: loss ") == 6


@pytest.mark.slow
def test_a_table_of_ones_own_is_searched_and_trained_as_written(copy):
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"house": range(300), "area": generator.normal(size=300), "town": generator.choice(["a", "b"], 300)})
    table.assign(price=3 * table["area"] + (table["town"] == "a")).to_csv(copy / "mine.csv", index=False)
    search = next(words for words in script_commands() if words[0] == "tune.py" and "conf/mine.toml" in words)
    again = next(words for words in script_commands() if "runs/study/best.toml" in words)
    commands.succeed(*search, "tune.trials=2", "train.epochs=2", folder=copy, root=copy)
    commands.succeed(*again, "train.epochs=2", "run.dir=runs/again", folder=copy, root=copy)
    assert json.loads((copy / "runs/again/result.json").read_text())["test"]["rmse"] > 0


def test_a_toml_for_a_table_of_ones_own_is_valid(copy):
    found = settings.parse([copy / "conf/mine.toml"])
    assert (found.data.target, found.data.id) == ("price", "house")
    assert found.data.label == "mine"
    assert "arrays" not in config.listing("data")
