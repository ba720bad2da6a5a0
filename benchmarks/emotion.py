"""Emotions by sound, by transcript, by both together (deep fusion) and by the vote of single runs (shallow fusion): test accuracy over seeds.

    python benchmarks/emotion.py [--seeds 5] [--folder runs/bench-emotion]

Speakers of the test part are never heard in training. A run that is there already is not trained again.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST, LOSS = 0.60, 0.03
VOTES = {"vote of audio and text": ("audio", "text"), "vote of audio and cross-modal": ("audio", "crossmodal")}
NAMES = {"audio": "audio", "text": "text", "crossmodal": "cross-modal"}


def python(*words: object) -> str:
    """What a script printed. Raises SystemExit with what it said where it fails."""
    ended = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return ended.stdout


def accuracies(folder: Path, seed: int) -> dict[str, float]:
    """Of the three runs of one seed, and of their votes."""
    found = {}
    for kind, name in NAMES.items():
        run = folder / f"{kind}-{seed}"
        more = [f"{key}.{side}={folder}/{side}-{seed}" for key, side in (("model", "audio"), ("model", "text"))]
        more += [f"data.tokenizer={folder}/text-{seed}/best"]
        python(ROOT / "train.py", "--config", ROOT / "conf" / f"emodb_{kind}.toml", f"run.dir={run}", f"run.seed={seed}",
               *(more if kind == "crossmodal" else []))  # fmt: skip
        found[name] = json.loads((run / "result.json").read_text())["test"]["accuracy"]
    for name, kinds in VOTES.items():
        said = python(ROOT / "infer.py", *(folder / f"{kind}-{seed}" for kind in kinds), "--split", "test")
        found[name] = float(re.search(r"accuracy ([\d.]+)", said).group(1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("PLAINLOOP_RUNS") or "runs", "bench-emotion"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [accuracies(options.folder.absolute(), seed) for seed in range(options.seeds)]
    print(f"{'accuracy on unseen speakers':32}{'mean':>8}{'deviation':>12}   each of {options.seeds} seeds")
    for name in rows[0]:
        values = [row[name] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:32}{statistics.mean(values):8.4f}{deviation:12.4f}   {'  '.join(f'{value:.4f}' for value in values)}")
    audio, both = (statistics.mean(row[name] for row in rows) for name in ("audio", "cross-modal"))
    held = audio >= LEAST and both >= audio - LOSS
    print(f"audio at least {LEAST}, cross-modal at most {LOSS} below it: {'yes' if held else 'NO'}")
    raise SystemExit(not held)


if __name__ == "__main__":
    main()
