"""Voting: what several runs say of the same rows, averaged; and what must be refused."""

import numpy as np
import pandas as pd
import pytest
import torch

import commands
import infer
from boost import boost
from engine import boost_data
from engine.boosting import BoostPredictor
from engine.config import UserError
from engine.settings import parse
from engine.vote import Vote
from test_boost import TARGETS, TOML, rows

DEEP = "[model]\nwidth = 16\ndepth = 1\n[train]\nepochs = 3\nbatch_size = 64\n[optim]\nlr = 0.01\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of each kind of task: lightgbm, xgboost over folds, and a deep one; and one of other rows."""
    folder = tmp_path_factory.mktemp("vote")
    rows(600, 0).to_csv(folder / "train.csv", index=False)
    rows(200, 1).to_csv(folder / "test.csv", index=False)
    rows(150, 2).to_csv(folder / "other.csv", index=False)
    (folder / "vote.toml").write_text(TOML)
    (folder / "deep.toml").write_text(DEEP)
    common, lines = ["--config", folder / "vote.toml", f"data.root={folder}"], []
    for kind, words in TARGETS.items():
        few = [*common, *words, "boost.rounds=20"]
        lines += [["boost.py", *few, f"run.dir={folder}/{kind}-lightgbm"]]
        lines += [["boost.py", *few, "boost.library=xgboost", "boost.folds=3", f"run.dir={folder}/{kind}-xgboost"]]
        lines += [["train.py", "--config", folder / "deep.toml", *common, *words, f"run.dir={folder}/{kind}-deep"]]
    lines += [["boost.py", *common, "data.test=other.csv", "boost.rounds=20", f"run.dir={folder}/other"]]
    lines += [["boost.py", *common, "boost.rounds=20", "data.split_seed=1", f"run.dir={folder}/shuffled"]]
    for name in ["binary-deep", "binary-lightgbm", "multiclass-deep", "regression-lightgbm"]:
        lines += [["infer.py", folder / name, "--input", folder / "test.csv", "--output", folder / f"{name}.csv"]]
    lines += [["infer.py", folder / "binary-deep", "--input", folder / "test.csv", "--output", folder / "logits.parquet", "--logits"]]
    for kind in ("binary", "multiclass"):
        for name, words in {"folds": [], "folds-logits": ["--logits"]}.items():
            lines += [["infer.py", folder / f"{kind}-xgboost", "--input", folder / "test.csv", "--output", folder / f"{kind}-{name}.parquet", *words]]
    for words, ended in zip(lines, commands.many(lines, folder), strict=True):
        assert ended.status == 0, (words, ended.text)
    return folder


def members(folder, *names):
    return [infer.open_run(folder / name, torch.device("cpu"), [], None) for name in names]


def predictions(folder, kind, name, logits=False):
    predictor = members(folder, f"{kind}-{name}")[0]
    return predictor.predict(predictor.split("test"), logits, None).astype(np.float64)


@pytest.mark.parametrize("kind", TARGETS)
def test_probabilities_are_averaged_with_the_weights(folder, kind):
    names = ["lightgbm", "xgboost", "deep"]
    vote = Vote(members(folder, *(f"{kind}-{name}" for name in names)), [0.5, 0.3, 0.2], "probability")
    scores, voted, target = vote.score(vote.split("test"))
    mixed = sum(weight * predictions(folder, kind, name) for weight, name in zip([0.5, 0.3, 0.2], names, strict=True))
    np.testing.assert_allclose(voted, mixed, rtol=1e-12)
    if kind == "regression":
        assert scores["rmse"] == pytest.approx(float(np.sqrt(np.mean((mixed - target) ** 2))), rel=1e-6)
    else:
        right = (mixed > 0.5) == target if mixed.ndim == 1 else mixed.argmax(1) == target
        assert scores["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_logits_are_averaged_where_wanted(folder, kind):
    vote = Vote(members(folder, f"{kind}-lightgbm", f"{kind}-deep"), [0.7, 0.3], "logit")
    mixed = torch.from_numpy(0.7 * predictions(folder, kind, "lightgbm", True) + 0.3 * predictions(folder, kind, "deep", True))
    voted = vote.predict(vote.split("test"), False, None)
    np.testing.assert_allclose(voted, mixed.sigmoid() if mixed.ndim == 1 else mixed.softmax(1), rtol=1e-9)


@pytest.mark.parametrize("kind", TARGETS)
def test_fitted_weights_are_the_best_convex_ones_of_the_validation_part(folder, kind, capsys):
    pair = [f"{kind}-lightgbm", f"{kind}-xgboost"]
    vote = Vote(members(folder, *pair), None, "probability")
    vote.fit()
    assert vote.weights.sum() == pytest.approx(1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("valid loss")]
    losses = [float(line.split()[2]) for line in said]
    assert losses[-1] <= min(losses[:-1]) + 1e-6
    # Of folds, what was held out counts: predictions of rows that all but one fold were trained on would flatter them.
    first, second = members(folder, *pair)
    truth = vote.targets(vote.split("valid"), 0)
    parts = [first.predict(first.split("valid"), False, None), second.held_out()]
    grid = [loss(weight * parts[0] + (1 - weight) * parts[1], truth, kind) for weight in np.linspace(0, 1, 101)]
    assert losses[-1] == pytest.approx(min(grid), rel=1e-3)


def loss(mixed, truth, kind):
    if kind == "regression":
        return np.mean((mixed - truth) ** 2)
    chosen = np.where(truth > 0.5, mixed, 1 - mixed) if mixed.ndim == 1 else mixed[np.arange(len(truth)), truth]
    return -np.log(chosen).mean()


def test_out_of_fold_predictions_are_of_boosters_that_did_not_see_the_row(folder):
    predictor = BoostPredictor(folder / "binary-xgboost")
    data = boost_data.prepare(predictor.settings)
    held = pd.read_parquet(folder / "binary-xgboost/oof.parquet").set_index("row")
    for number, (fit, rows_) in enumerate(boost_data.cut(predictor.settings, data)):
        assert not set(fit) & set(rows_)
        np.testing.assert_array_equal(held.loc[rows_, "fold"], number)
        expected = predictor.library.predict(predictor.boosters[number], data.matrix[rows_])
        np.testing.assert_array_equal(held.loc[rows_, "probability_yes"], expected)


@pytest.mark.parametrize("scale", [1e-5, 1e6])
def test_fitted_weights_do_not_depend_on_the_unit_of_the_target(folder, scale):
    def fitted(scale):
        vote = Vote(members(folder, "regression-lightgbm", "regression-xgboost"), None, "probability")
        targets, predicted = vote.targets, [member.predict for member in vote.members]
        held = vote.members[1].held_out
        vote.targets = lambda *some: targets(*some) * scale
        vote.members[0].predict = lambda *some: predicted[0](*some) * scale
        vote.members[1].held_out = lambda: held() * scale
        vote.fit()
        return vote.weights

    np.testing.assert_allclose(fitted(scale), fitted(1.0), atol=2e-3)


def test_weights_of_samples_count_in_a_vote(folder, tmp_path):
    alone, other = tmp_path / "alone", folder / "binary-lightgbm"
    words = ["data.weight=weight", 'data.drop=["three", "amount", "group"]', "boost.rounds=20", f"run.dir={alone}"]
    result = boost(parse([folder / "vote.toml"], [f"data.root={folder}", *words]))
    vote = Vote([infer.open_run(alone, torch.device("cpu"), [], None), *members(folder, other)], [1.0, 0.0], "probability")
    assert vote.score(vote.split("test"))[0]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-9)


def test_rows_are_told_by_their_ids(folder, tmp_path):
    """Ids such as 007, saved as CSV, in order and not."""
    for name, count in (("train", 600), ("test", 200)):
        made = pd.read_csv(folder / f"{name}.csv")
        made["key"] = [f"{number:06d}" for number in range(count)]
        made.to_csv(tmp_path / f"{name}.csv", index=False)
    settings = parse([folder / "vote.toml"], [f"data.root={tmp_path}", "data.id=key", "boost.rounds=10", f"run.dir={tmp_path / 'run'}"])
    boost(settings)
    run = infer.open_run(tmp_path / "run", torch.device("cpu"), [], None)
    infer.predict_file(run, tmp_path / "test.csv", tmp_path / "saved.csv", False)
    pd.read_csv(tmp_path / "saved.csv", dtype={"key": str})[::-1].to_csv(tmp_path / "swapped.csv", index=False)
    pd.read_csv(tmp_path / "saved.csv").drop(columns="key").to_csv(tmp_path / "bare.csv", index=False)
    for name, right in {"saved": True, "swapped": False, "bare": False}.items():
        vote = Vote([run, infer.open_run(tmp_path / f"{name}.csv", torch.device("cpu"), [], None)], None, "probability")
        for act in (lambda vote=vote: vote.split("test"), lambda vote=vote: list(vote.read(tmp_path / "test.csv", 64))):
            if right:
                act()
            else:
                with pytest.raises(UserError, match=r"order|same rows"):
                    act()
    vote = Vote([run, infer.open_run(tmp_path / "saved.csv", torch.device("cpu"), [], None)], None, "probability")
    with pytest.raises(UserError, match="cut off"):
        vote.split("valid")


@pytest.mark.parametrize("part", ["test", "valid"])
def test_another_file_of_the_same_targets_is_other_rows_unless_ids_say_the_same(folder, tmp_path, part):
    """Rows shuffled inside each class: all targets are alike, no row is."""
    for name, count in (("train", 600), ("test", 200)):
        pd.read_csv(folder / f"{name}.csv").assign(key=range(count)).to_csv(tmp_path / f"{name}.csv", index=False)
    table = pd.read_csv(tmp_path / "test.csv")
    order = np.arange(len(table))
    for label in ("yes", "no"):
        rows_ = np.flatnonzero(table["yes"] == label)
        order[rows_] = np.roll(rows_, 1)
    table.to_csv(tmp_path / "copy.csv", index=False)
    table.to_parquet(tmp_path / "same.parquet")
    table.iloc[order].to_csv(tmp_path / "moved.csv", index=False)
    words = [f"data.root={tmp_path}", "boost.rounds=5", 'data.drop=["three", "amount", "weight", "group"]']

    def run(name, file, *more):
        boost(parse([folder / "vote.toml"], [*words, f"data.{part}={file}", *more, f"run.dir={tmp_path / 'runs' / name}"]))
        return infer.open_run(tmp_path / "runs" / name, torch.device("cpu"), [], None)

    told = {name: run(name, name, "data.id=key") for name in ("test.csv", "same.parquet", "moved.csv")}
    drop = 'data.drop=["three", "amount", "weight", "group", "key"]'
    bare = {f"bare-{name}": run(f"bare-{name}", name, drop) for name in ("test.csv", "copy.csv", "same.parquet", "moved.csv")}
    for first, second in (("test.csv", "same.parquet"), ("bare-test.csv", "bare-copy.csv"), ("test.csv", "bare-test.csv")):
        assert Vote([(told | bare)[first], (told | bare)[second]], None, "probability").split(part)
    for first, second in (("test.csv", "moved.csv"), ("bare-test.csv", "bare-moved.csv"), ("bare-test.csv", "bare-same.parquet")):
        vote = Vote([(told | bare)[first], (told | bare)[second]], None, "probability")
        assert np.array_equal(*(vote.targets([member.split(part) for member in vote.members], place) for place in range(2)))
        with pytest.raises(UserError, match=r"rows are not the 200 .* data\.id"):
            vote.split(part)


def test_parts_cut_by_another_seed_are_other_rows_though_their_targets_are_alike(folder, tmp_path):
    pd.read_csv(folder / "train.csv").sort_values("yes").to_csv(tmp_path / "train.csv", index=False)
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / f"run{seed}")
        words = ["data.test=", f"data.split_seed={seed}", "boost.rounds=5", f"run.dir={runs[-1]}"]
        boost(parse([folder / "vote.toml"], [f"data.root={tmp_path}", *words]))
    vote = Vote([infer.open_run(run, torch.device("cpu"), [], None) for run in runs], None, "probability")
    with pytest.raises(UserError, match="valid rows are not"):
        vote.split("valid")


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_a_file_of_predictions_votes_as_its_run(folder, tmp_path, kind):
    def voted(*names):
        vote = Vote(members(folder, *names), [0.4, 0.6], "probability")
        infer.predict_file(vote, folder / "test.csv", tmp_path / "out.parquet", False)
        scores, _, _ = vote.score(vote.split("test"))
        return pd.read_parquet(tmp_path / "out.parquet"), scores

    table, scores = voted(f"{kind}-deep", f"{kind}-lightgbm")
    for name in [f"{kind}-deep.csv", *(["logits.parquet"] if kind == "binary" else [])]:
        from_file, same = voted(name, f"{kind}-lightgbm")
        pd.testing.assert_frame_equal(from_file, table, rtol=1e-5)
        assert same["accuracy"] == scores["accuracy"]


@pytest.mark.parametrize("average", ["probability", "logit"])
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_folds_are_one_prediction_saved_or_not_in_logits_or_not(folder, kind, average):
    def voted(name):
        vote = Vote(members(folder, f"{kind}-deep", name), [0.4, 0.6], average)
        return vote.predict(vote.split("test"), False, None)

    for name in ("folds", "folds-logits"):
        np.testing.assert_allclose(voted(f"{kind}-{name}.parquet"), voted(f"{kind}-xgboost"), rtol=1e-4)


def test_commands_and_mistakes(folder):
    one, two, three = folder / "binary-lightgbm", folder / "binary-xgboost", folder / "binary-deep"
    other = folder / "other"
    short = folder / "short.csv"
    pd.read_csv(folder / "binary-deep.csv").head(50).to_csv(short, index=False)
    swapped = folder / "swapped.csv"
    pd.read_csv(folder / "binary-deep.csv").iloc[::-1].to_csv(swapped, index=False)
    gaps = folder / "gaps.csv"
    pd.read_csv(folder / "binary-deep.csv").assign(probability_yes=np.nan).to_csv(gaps, index=False)
    test, output = ["--split", "test"], ["--input", folder / "test.csv", "--output", folder / "voted.csv"]
    good = [
        [one, two, three, "--fit-weights", *test],
        [one, two, "--weights", 0.25, 0.75, *output],
        [one, folder / "binary-deep.csv", "--average", "logit", "--logits", *output],
        [one, two, "--fit-weights"],
    ]
    bad = {
        (one, two, "--weights", 0.6, 0.6, *test): ("--weights 0.6 0.6", "sum to 1"),
        (one, two, "--weights", 1.5, -0.5, *test): ("--weights", "0 or more"),
        (one, two, "--weights", 1, *test): ("--weights", "1 for 2 runs"),
        (one, "--fit-weights", *test): ("--fit-weights", "several runs"),
        (one, "--average", "logit", *test): ("--average", "several runs"),
        (folder / "regression-lightgbm", folder / "regression-deep", "--average", "logit", *test): ("--average logit", "a number"),
        (one, two, "--fit-weights", "--weights", 0.5, 0.5, *test): ("--fit-weights", "--weights", "one of them"),
        (one, folder / "multiclass-deep", *test): ("multiclass-deep", "labels"),
        (one, folder / "regression-deep", *test): ("regression-deep", "labels"),
        (one, other, *test): ("other", "150 test rows", "200"),
        (one, folder / "shuffled", "--split", "valid"): ("shuffled", "valid rows", "another order"),
        (one, folder / "multiclass-deep.csv", *test): ("multiclass-deep.csv", "labels"),
        (one, folder / "regression-lightgbm.csv", *test): ("regression-lightgbm.csv", "labels"),
        (one, short, *test): ("short.csv", "50 test rows"),
        (one, short, *output): ("short.csv", "same rows"),
        (one, swapped, *test): ("swapped.csv", "another order"),
        (one, swapped, *output): ("swapped.csv", "'row'", "order"),
        (one, folder / "binary-deep.csv", "--fit-weights"): ("binary-deep.csv", "no validation part"),
        (folder / "binary-deep.csv", folder / "binary-lightgbm.csv", *test): ("one run folder",),
        (folder / "binary-deep.csv", *test): ("one run folder",),
        (one, folder / "test.csv", *test): ("test.csv", "'prediction'"),
        (one, gaps, *test): ("gaps.csv", "no number"),
        (one, folder / "binary-deep.csv", "--split", "valid"): ("binary-lightgbm", "cut off data.train"),
        (one, two, "--weights", "nan", 1, *test): ("--weights", "sum to 1"),
        (one, folder / "gone", *test): ("gone", "no such file or folder"),
        (one, two, "--checkpoint", "step=1", *test): ("--checkpoint", "one run"),
        (one, two, "--average", "median", *test): ("--average", "median"),
    }
    ended = commands.many([["infer.py", *words] for words in [*good, *bad]], folder)
    for words, end in zip(good, ended, strict=False):
        assert end.status == 0, (words, end.text)
    for (words, expected), end in zip(bad.items(), ended[len(good) :], strict=True):
        assert end.status == 2, (words, end.text)
        said = [line for line in end.errors.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, (words, end.errors)
        assert all(word in said[0] for word in expected), (words, said)
    assert "binary-deep.csv: its rows are told by their numbers alone" in ended[2].errors
    weights = next(line for line in ended[0].out.splitlines() if "--weights" in line).split()[-3:]
    assert sum(map(float, weights)) == pytest.approx(1)


def test_a_kind_that_votes_alone_is_refused(folder):
    run, other = members(folder, "binary-lightgbm", "binary-deep")
    run.info.kind = other.info.kind = "rating"
    with pytest.raises(UserError, match="is a rating task"):
        Vote([run, other], None, "probability")


def test_settings_of_every_recipe_are_valid():
    for path in sorted((commands.ROOT / "conf").glob("*.toml")):
        assert parse([path]).data.label
