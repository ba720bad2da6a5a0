"""How long one waits: from the start of the process to the first optimizer step, beside a bare script; and for --help.

    make bench-startup

Fresh processes in turns; the ratio is the median over pairs. Exit status 0 where the bars hold, else 1.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BAR_STEP, BAR_HELP = 1.3, 0.5

# Runs a script as `python SCRIPT …` would, and ends the process after the first step of any of torch's optimizers.
PROBE = """
import os, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
answer = sys.argv[1]
def stop(*_):
    with open(answer, "w") as file:
        file.write(repr(time.time()))
    os._exit(0)
register_optimizer_step_post_hook(stop)
del sys.argv[:2]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_table(path: Path, rows: int, columns: int) -> None:
    import numpy
    import pandas

    random_numbers = numpy.random.default_rng(0)
    values = random_numbers.normal(size=(rows, columns)).round(6)
    table = pandas.DataFrame(values, columns=[f"x{i}" for i in range(columns)])
    table["target"] = (values[:, :5].sum(1) + random_numbers.normal(size=rows) > 0).astype(int)
    table.to_csv(path, index=False)


def environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}


def seconds_to_first_step(*script: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "time")
        start = time.time()
        command = [sys.executable, "-c", PROBE, str(answer), *script]
        done = subprocess.run(command, check=False, cwd=folder, env=environment(), capture_output=True, text=True)
        if not answer.exists():
            raise RuntimeError(f"{' '.join(script)}: no optimizer step\n{done.stdout}{done.stderr}")
        return float(answer.read_text()) - start


def seconds_to_end(*arguments: str) -> float:
    start = time.time()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), check=True, capture_output=True)
    return time.time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="pairs that count; one more comes before them")
    parser.add_argument("--rows", type=int, default=20_000)
    options = parser.parse_args()
    step, bare, help_, imports = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        table, config = Path(folder, "table.csv"), Path(folder, "startup.toml")
        write_table(table, options.rows, columns=30)
        config.write_text(
            f'data = {{ name = "table", train = "{table}", target = "target" }}\n'
            'model = { name = "mlp", width = 256, depth = 3, dropout = 0.0 }\n'
            "train = { steps = 1 }\n"
        )
        train = str(ROOT / "train.py")
        for run in range(1 + options.runs):
            step.append(seconds_to_first_step(train, "--config", str(config), f"run.dir={folder}/run{run}"))
            bare.append(seconds_to_first_step(str(HERE / "bare_script.py"), str(table)))
            help_.append(seconds_to_end(train, "--help"))
            imports.append(seconds_to_end("-c", "import gc, torch, pydantic; gc.freeze()"))  # as the scripts freeze it
    # The first of each reads files that were not in the cache of the disk.
    ratio = statistics.median(ours / theirs for ours, theirs in zip(step[1:], bare[1:], strict=True))
    more = statistics.median(ours - theirs for ours, theirs in zip(help_[1:], imports[1:], strict=True))
    print(f"{options.rows} rows x 30, {options.runs} pairs of processes; medians in seconds, quartiles")
    for name, times in (
        ("to the first step, train.py", step),
        ("to the first step, bare script", bare),
        ("train.py --help", help_),
        ("import torch, pydantic", imports),
    ):
        low, middle, high = statistics.quantiles(times[1:], n=4)
        print(f"  {name:32}{middle:8.2f}{low:10.2f} {high:6.2f}")
    print(f"  first step: {ratio:.2f} x the bare script, at most {BAR_STEP}: {'holds' if ratio <= BAR_STEP else 'FAILS'}")
    print(f"  --help: {more:+.2f} s over the imports, at most +{BAR_HELP}: {'holds' if more <= BAR_HELP else 'FAILS'}")
    return 0 if ratio <= BAR_STEP and more <= BAR_HELP else 1


if __name__ == "__main__":
    sys.exit(main())
