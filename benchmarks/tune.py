"""A search of boosted models on Adult, beside plain Optuna written by hand; and two workers beside one.

    make bench-tune
    python benchmarks/tune.py --rounds 300

The hand-written search reads the same rows and uses the same sampler, pruner and seed. It must draw the same values and find the
same accuracy in each trial. Times are of whole commands, imports included, each contender in processes of its own, one after
another in an order drawn anew; processor time of all its processes is printed beside. Exit status 0 where the bars hold, else 1.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SLOWEST, LEAST_GAIN = 1.1, 1.7
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


def by_hand(rounds: int, trials: int, out: str) -> None:
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

        booster = lightgbm.train(fixed | drawn, train, rounds, valid_sets=[valid], callbacks=[after])
        return float(((booster.predict(x[judge]) > 0.5) == y[judge]).mean())

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler, pruner = optuna.samplers.TPESampler(seed=0), optuna.pruners.MedianPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=trials)
    study.trials_dataframe().to_csv(out, index=False)


def seconds(words: list[str], threads: int = 1) -> tuple[float, float]:
    """Of a command in all, and of the processors with all that it started."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def same_values(ours: pd.DataFrame, theirs: pd.DataFrame) -> bool:
    """The same draws, the same ends, and accuracies that are the same count of rows (float32 here, float64 there)."""
    names = ["learning_rate", "num_leaves", "feature_fraction"]
    draws = (ours[[f"boost.params.{name}" for name in names]].values == theirs[[f"params_{name}" for name in names]].values).all()
    return bool(draws and (ours["state"] == theirs["state"]).all() and ((ours["value"] - theirs["value"]).abs().max() < 1e-6))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of boosting")
    parser.add_argument("--by-hand", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.by_hand:
        by_hand(options.rounds, 30, options.by_hand)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tune.toml").write_text(CONFIG.replace("ROUNDS", str(options.rounds)))
        search = ["tune.py", "--config", "conf/adult.toml", "--config", str(folder / "tune.toml")]
        contenders = {
            "by hand, 30 trials": ["benchmarks/tune.py", "--rounds", str(options.rounds), "--by-hand", str(folder / "hand.csv")],
            "tune.py, 30 trials": [*search, "tune.trials=30", f"run.dir={folder / 'same'}"],
            "one worker, 40 trials": [*search, "tune.trials=40", f"run.dir={folder / 'one'}"],
            "two workers, 40 trials": [*search, "tune.trials=40", "tune.workers=2", f"run.dir={folder / 'two'}"],
        }
        order = random.sample(list(contenders), len(contenders))
        wall, cpu = {}, {}
        for contender in order:
            wall[contender], cpu[contender] = seconds(contenders[contender])
            print(f"{contender:24} {wall[contender]:7.1f} s, processors {cpu[contender]:7.1f} s", flush=True)
        same = same_values(pd.read_csv(folder / "same" / "trials.csv"), pd.read_csv(folder / "hand.csv"))
    hand, ours, one, two = (wall[contender] for contender in contenders)
    print(f"the same values in each trial: {'yes' if same else 'no'}")
    print(f"time beside the hand-written search: {ours / hand:.2f} (at most {SLOWEST})")
    print(f"two workers beside one: {one / two:.2f} x as fast (at least {LEAST_GAIN})")
    return int(not same or ours / hand > SLOWEST or one / two < LEAST_GAIN)


if __name__ == "__main__":
    sys.exit(main())
