"""A search of boosted models on Adult, beside plain Optuna written by hand; and two workers beside one.

    make bench-tune

The hand-written search reads the same rows and uses the same sampler, pruner and seed. It must draw the same values and find the
same accuracy in each trial. Times are of whole commands, imports included. Two commands are alive at once and take turns of a
second: all processes of the other one are stopped meanwhile, so that a computer that is slow for a while is so for both. Exit
status 0 where the bars hold, else 1.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent
SLOWEST, LEAST_GAIN = 1.1, 1.7
ROUNDS = 2000
"""of boosting; to start and to draw the pictures takes ten seconds, however long a search is"""
CONFIG = """
[tune]
target = "boost"
[boost]
rounds = ROUNDS
patience = 0
[tune.space]
"boost.params.learning_rate" = { low = 0.01, high = 0.3, log = true }
"boost.params.num_leaves" = { low = 8, high = 128, log = true }
"boost.params.feature_fraction" = { low = 0.4, high = 1.0 }
"""
EVEN = """
[tune]
pruner = "NopPruner"
[boost]
rounds = 2500
[tune.space]
"boost.params.learning_rate" = { low = 0.01, high = 0.3, log = true }
"""
"""Two workers draw other values than one does: so trials of equal length, and none is pruned; long beside the start"""


def by_hand(trials: int, out: str) -> None:
    """What one would write without this repository; its table alone is read by it, since the rows must be the same."""
    sys.path.insert(0, str(ROOT))
    import lightgbm
    import numpy as np
    import optuna

    from data import table
    from engine.settings import parse

    settings = parse([ROOT / "conf" / "adult.toml"])
    read = table.read(settings.data, settings.task.kind)
    codes = read.categorical.astype(np.float32) - 1
    codes[codes < 0] = np.nan
    x, y, numeric = np.concatenate([read.numeric, codes], axis=1), read.target, read.numeric.shape[1]
    fixed = {
        "objective": "binary",
        "metric": ["binary_logloss", "binary_error"],
        "seed": 0,
        "verbosity": -1,
        "deterministic": True,
        "force_row_wise": True,
    }
    learn, judge = read.rows["train"], read.rows["valid"]
    train = lightgbm.Dataset(x[learn], y[learn], categorical_feature=list(range(numeric, x.shape[1])), params=fixed)
    valid = train.create_valid(x[judge], y[judge])

    def objective(trial: optuna.Trial) -> float:
        drawn = {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "num_leaves": trial.suggest_int("num_leaves", 8, 128, log=True),
            "feature_fraction": trial.suggest_float("feature_fraction", 0.4, 1.0),
        }

        def after(env: lightgbm.callback.CallbackEnv) -> None:
            if (env.iteration + 1) % 20 == 0:
                trial.report(1 - env.evaluation_result_list[1][2], env.iteration + 1)
                if trial.should_prune():
                    raise optuna.TrialPruned

        booster = lightgbm.train(fixed | drawn, train, ROUNDS, valid_sets=[valid], callbacks=[after])
        return float(((booster.predict(x[judge]) > 0.5) == y[judge]).mean())

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler, pruner = optuna.samplers.TPESampler(seed=0), optuna.pruners.MedianPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=trials)
    study.trials_dataframe().to_csv(out, index=False)


class Command:
    """A command with all that it starts, which runs in its turns only."""

    def __init__(self, words: list[str]):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.said, self.seconds = tempfile.TemporaryFile("w+"), 0.0
        self.process = psutil.Popen(
            [sys.executable, *words], env=environment, cwd=ROOT, stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def turn(self, longest: float = 1.0) -> bool:
        """Run for a while; whether it goes on."""
        begun = time.perf_counter()
        self.signal(signal.SIGCONT)
        with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
            self.process.wait(longest)
        self.seconds += time.perf_counter() - begun
        if self.process.returncode:
            self.said.seek(0)
            raise SystemExit(self.said.read())
        if self.process.returncode is None:
            self.signal(signal.SIGSTOP)
        return self.process.returncode is None


def seconds(*commands: list[str]) -> list[float]:
    """Of each command, without the turns of the others."""
    started = [Command(words) for words in commands]
    going = list(started)
    try:
        while going:
            going = [command for command in going if command.turn()]
    finally:
        for command in going:
            command.signal(signal.SIGKILL)
    return [command.seconds for command in started]


def same_values(ours: pd.DataFrame, theirs: pd.DataFrame) -> bool:
    """The same draws, the same ends, and accuracies that are the same count of rows (float32 here, float64 there)."""
    names = ["learning_rate", "num_leaves", "feature_fraction"]
    draws = (ours[[f"boost.params.{name}" for name in names]].values == theirs[[f"params_{name}" for name in names]].values).all()
    return bool(draws and (ours["state"] == theirs["state"]).all() and ((ours["value"] - theirs["value"]).abs().max() < 1e-6))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-hand", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.by_hand:
        by_hand(30, options.by_hand)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tune.toml").write_text(CONFIG.replace("ROUNDS", str(ROUNDS)))
        (folder / "even.toml").write_text(EVEN)
        search = ["tune.py", "--config", "conf/adult.toml", "--config", str(folder / "tune.toml")]
        even = [*search, "--config", str(folder / "even.toml"), "tune.trials=40"]
        ours, hand = seconds([*search, "tune.trials=30", f"run.dir={folder / 'same'}"], ["benchmarks/tune.py", "--by-hand", str(folder / "hand.csv")])
        same = same_values(pd.read_csv(folder / "same" / "trials.csv"), pd.read_csv(folder / "hand.csv"))
        print(f"30 trials: tune.py {ours:.1f} s, by hand {hand:.1f} s; the same values in each trial: {'yes' if same else 'no'}")
        print(f"time beside the hand-written search: {ours / hand:.3f} (at most {SLOWEST})", flush=True)
        one, two = seconds([*even, f"run.dir={folder / 'one'}"], [*even, "tune.workers=2", f"run.dir={folder / 'two'}"])
    print(f"40 trials: one worker {one:.1f} s, two workers {two:.1f} s, each worker with one core")
    print(f"two workers beside one: {one / two:.2f} x as fast (at least {LEAST_GAIN})")
    return int(not same or ours / hand > SLOWEST or one / two < LEAST_GAIN)


if __name__ == "__main__":
    sys.exit(main())
