"""Boosting: the libraries' own numbers, folds, runs that were killed, new files, wrong input."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from scipy import stats

import boost as script
import commands
import infer
from boost import boost
from data import table
from data.table import read
from engine import boost_data, boost_report, boosters, screen, tracking
from engine.boosting import BoostPredictor, probabilities
from engine.config import UserError, dump_toml
from engine.settings import parse

LIBRARIES = ["lightgbm", "xgboost"]
TOML = """
[data]
name = "table"
train = "train.csv"
test = "test.csv"
target = "yes"
drop = ["three", "amount", "weight", "group"]
[model]
name = "mlp"
[boost]
rounds = 40
patience = 10
"""
TARGETS = {
    "binary": [],
    "multiclass": ["data.target=three", 'data.drop=["yes", "amount", "weight", "group"]'],
    "regression": ["data.target=amount", 'data.drop=["yes", "three", "weight", "group"]'],
}


def rows(count, seed):
    """Numbers and categories with gaps, and three targets that depend on them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 3)).astype(np.float32)
    town = generator.choice(["Rome", "Oslo", "Bonn", "Kiel"], count)
    signal_ = x[:, 0] - x[:, 1] ** 2 + np.where(town == "Oslo", 1.5, 0) + generator.normal(0, 0.4, count)
    table = pd.DataFrame({"a": x[:, 0], "b b": x[:, 1], "noise": x[:, 2], "age": generator.integers(18, 80, count), "town": town})
    table.loc[generator.random(count) < 0.1, ["b b"]] = np.nan
    table.loc[generator.random(count) < 0.1, ["town"]] = None
    table["yes"] = np.where(signal_ > 0, "yes", "no")
    table["three"] = pd.cut(signal_, [-99, -1, 0.5, 99], labels=["low", "mid", "high"]).astype(str)
    table["amount"] = (10 + 3 * signal_).round(3)
    table["weight"] = generator.uniform(0.5, 2, count).round(2)
    table["group"] = generator.integers(0, 12, count)
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boost")
    rows(600, 0).to_csv(folder / "train.csv", index=False)
    rows(200, 1).to_csv(folder / "test.csv", index=False)
    (folder / "boost.toml").write_text(TOML)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PLAINLOOP_RUNS", str(tmp_path / "runs"))


def settings_of(folder, *overrides):
    return parse([folder / "boost.toml"], [f"data.root={folder}", *overrides])


def matrix_of(folder, settings, name="test.csv"):
    """A file as it is read for prediction."""
    predictor = BoostPredictor(Path(settings.run.dir))
    return next(predictor.read(folder / name, 10_000)).dataset, predictor


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_predictions_from_the_files_are_those_in_memory(folder, tmp_path, monkeypatch, library, kind):
    in_memory = []
    fit = script.fit
    monkeypatch.setattr(script, "fit", lambda *arguments: in_memory.append(fit(*arguments)) or in_memory[-1])
    settings = settings_of(folder, f"boost.library={library}", *TARGETS[kind], f"run.dir={tmp_path / 'run'}", "boost.folds=2")
    result = boost(settings)
    data = boost_data.prepare(settings)
    predictor = BoostPredictor(tmp_path / "run")
    for (booster, best), loaded in zip(in_memory, predictor.boosters, strict=True):
        for margin in (False, True):
            mine = predictor.library.predict(booster, data.matrix, margin)
            np.testing.assert_array_equal(mine, predictor.library.predict(loaded, data.matrix, margin))
        trees = loaded.num_trees() / loaded.num_model_per_iteration() if library == "lightgbm" else loaded.num_boosted_rounds()
        assert trees == best
    test = boost_data.Part(data, data.table.rows["test"])
    scores, predictions, _ = predictor.score(test)
    assert scores == result["test"]
    # Of two folds it is the mean, and its logits are those of the mean.
    each = [predictor.library.predict(booster, data.matrix[test.rows]) for booster in predictor.boosters]
    np.testing.assert_array_equal(predictions, np.mean(each, axis=0, dtype=np.float64))
    logits = predictor.predict(test, True, None)
    np.testing.assert_allclose(logits if kind == "regression" else probabilities(logits), predictions, rtol=1e-5)
    # A file read anew gives the same, and so does what infer.py writes of it.
    dataset, _ = matrix_of(folder, settings)
    np.testing.assert_array_equal(predictor.predict(dataset, False, None), predictions)
    infer.predict_file(predictor, folder / "test.csv", tmp_path / "out.parquet", False)
    written = pd.read_parquet(tmp_path / "out.parquet")
    name = {"binary": "probability_yes", "multiclass": "probability_high", "regression": "prediction"}[kind]
    np.testing.assert_array_equal(written[name], predictions if predictions.ndim == 1 else predictions[:, predictor.info.labels.index("high")])
    assert [fold["best_round"] for fold in result["folds"]] == [best for _, best in in_memory]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"oof.parquet", "importance.csv", "importance.png", "curves.png", "info.json"}


def test_the_best_round_and_weights_are_those_of_the_native_call(folder, tmp_path):
    extra = ["data.weight=weight", "data.balance=class_weights", 'data.drop=["three", "amount", "group"]']
    settings = settings_of(folder, *extra, f"run.dir={tmp_path / 'lightgbm'}")
    result = boost(settings)
    data = boost_data.prepare(settings)
    table = data.table
    train, valid = table.rows["train"], table.rows["valid"]
    counts = np.bincount(table.target[train])
    weights = (table.weights * (len(train) / (2 * counts)).astype(np.float32)[table.target])[train]
    whole = lightgbm.Dataset(data.matrix[train], table.target[train], weight=weights, categorical_feature=[4])
    held = whole.create_valid(data.matrix[valid], table.target[valid], table.weights[valid])
    stop = lightgbm.early_stopping(10, verbose=False)
    booster = lightgbm.train({"objective": "binary", "verbosity": -1, "seed": 0}, whole, 40, valid_sets=[held], callbacks=[stop])
    assert result["folds"][0]["best_round"] == booster.best_iteration
    np.testing.assert_array_equal(pd.read_parquet(tmp_path / "lightgbm" / "oof.parquet")["probability_yes"], booster.predict(data.matrix[valid]))

    settings = settings_of(folder, *extra, "boost.library=xgboost", f"run.dir={tmp_path / 'xgboost'}")
    result = boost(settings)
    types = {"feature_types": ["q"] * 4 + ["c"], "enable_categorical": True}
    fit = xgboost.QuantileDMatrix(data.matrix[train], table.target[train], weight=weights, **types)
    held = xgboost.QuantileDMatrix(data.matrix[valid], table.target[valid], weight=table.weights[valid], ref=fit, **types)
    options = {"early_stopping_rounds": 10, "verbose_eval": False, "evals": [(held, "valid")]}
    booster = xgboost.train({"objective": "binary:logistic", "seed": 0}, fit, 40, **options)
    assert result["folds"][0]["best_round"] == booster.best_iteration + 1
    mine = booster.predict(xgboost.DMatrix(data.matrix[valid], **types), iteration_range=(0, booster.best_iteration + 1))
    np.testing.assert_array_equal(pd.read_parquet(tmp_path / "xgboost" / "oof.parquet")["probability_yes"], mine)


KILLED = """
import os, signal, sys
import boost

call = boost.Watch.__call__

def killed(watch, rounds, *more):
    if watch.number == 2 and rounds == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    call(watch, rounds, *more)

boost.Watch.__call__ = killed
boost.main()
"""


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_killed_in_its_third_fold_ends_with_the_same_files(folder, tmp_path, library):
    words = [f"boost.library={library}", "boost.folds=5", "boost.patience=0"]
    words += ["boost.params={bagging_fraction=0.7,bagging_freq=1}" if library == "lightgbm" else "boost.params={subsample=0.7}"]
    command = [sys.executable, "-c", KILLED, "--config", str(folder / "boost.toml"), f"data.root={folder}", *words, f"run.dir={tmp_path / 'killed'}"]
    assert subprocess.run(command, env=commands.environment(), stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert {path.stem for path in (tmp_path / "killed/folds").glob("*.json")} == {"fold0", "fold1"}
    with pytest.raises(UserError, match="has not ended"):
        BoostPredictor(tmp_path / "killed")
    kept = (tmp_path / "killed/folds/fold0.json").stat().st_mtime_ns
    resumed = boost(settings_of(folder, *words, f"run.dir={tmp_path / 'killed'}"))
    assert (tmp_path / "killed/folds/fold0.json").stat().st_mtime_ns == kept
    straight = boost(settings_of(folder, *words, f"run.dir={tmp_path / 'straight'}"))
    suffix = boosters.LIBRARIES[library].suffix
    for name in ["oof.parquet", "importance.csv", *(f"folds/fold{number}{suffix}" for number in range(5))]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert {**resumed, "clock": None} == {**straight, "clock": None}


def test_a_run_killed_after_its_result_is_written_ends_as_others_do(folder, tmp_path):
    run = tmp_path / "run"
    killed = "import os, signal, boost\nboost.page.write = lambda run: os.kill(os.getpid(), signal.SIGKILL)\nboost.main()"
    command = [sys.executable, "-c", killed, "--config", str(folder / "boost.toml"), f"data.root={folder}", f"run.dir={run}"]
    assert subprocess.run(command, env=commands.environment(), stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    result = (run / "result.json").read_bytes()
    assert not tracking.ended(run)
    boost(settings_of(folder, f"run.dir={run}"))
    assert (run / "result.json").read_bytes() == result
    assert (run / "report.html").exists()
    assert tracking.ended(run)


def test_sigterm_ends_with_143_and_the_folds_done_are_kept(folder, tmp_path):
    words = [f"data.root={folder}", "boost.folds=2", "boost.rounds=3000", "boost.patience=0", f"run.dir={tmp_path / 'run'}"]
    command = [sys.executable, str(commands.ROOT / "boost.py"), "--config", str(folder / "boost.toml"), *words]
    running = subprocess.Popen(command, env=commands.environment(), stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if "fold 2 of 2  round 500" in line:
            running.terminate()
            break
    assert "stopped by a signal in fold 2 of 2; the same command goes on" in running.stdout.read()
    assert running.wait() == 143
    assert {path.name for path in (tmp_path / "run/folds").iterdir()} == {"fold0.txt", "fold0.json"}


def test_a_finished_run_is_left_and_another_config_refused(folder, tmp_path, capsys):
    settings = settings_of(folder, f"run.dir={tmp_path / 'run'}")
    first = boost(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*") if path.name not in (".lock", "config.toml")}
    assert boost(settings) == first
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    another = settings_of(folder, "boost.rounds=41", f"run.dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"boost\.rounds = 40 there, 41 here"):
        boost(another)
    for path in [tmp_path / "run/result.json", *(tmp_path / "run/folds").iterdir()]:
        path.unlink()
    (tmp_path / "run/folds/.tmp-fold0.txt").touch()  # killed while the first fold was written: nothing is lost with another config
    boost(another)


@pytest.mark.parametrize("library", LIBRARIES)
def test_new_files_are_read_as_the_training_file_was(folder, tmp_path, capsys, library):
    settings = settings_of(folder, f"boost.library={library}", f"run.dir={tmp_path / 'run'}")
    boost(settings)
    dataset, predictor = matrix_of(folder, settings)
    expected = predictor.predict(dataset, False, None)
    table = pd.read_csv(folder / "test.csv")

    def predictions(changed, name):
        changed.to_parquet(tmp_path / name) if name.endswith("parquet") else changed.to_csv(tmp_path / name, index=False)
        return predictor.predict(next(predictor.read(tmp_path / name, 10_000)).dataset, False, None)

    np.testing.assert_array_equal(predictions(table[table.columns[::-1]], "order.csv"), expected)
    np.testing.assert_array_equal(predictions(table.drop(columns=["yes", "weight"]).assign(more=1), "columns.csv"), expected)
    np.testing.assert_array_equal(predictions(table.astype({"age": np.float32, "town": "category"}), "types.parquet"), expected)
    np.testing.assert_array_equal(predictions(table.assign(age=table["age"].map("{}.0".format)), "text.csv"), expected)
    # A category that training never saw counts as missing, and is said.
    few = table.assign(town=np.where(table.index < 3, "Atlantis", table["town"]))
    few.to_csv(tmp_path / "few.csv", index=False)
    assert [chunk.unseen for chunk in predictor.read(tmp_path / "few.csv", 100)] == [{"town": 3}, {}]
    capsys.readouterr()
    infer.predict_file(predictor, tmp_path / "few.csv", tmp_path / "few.parquet", False)
    assert "column 'town': 3 of 200 values were not seen in training and count as missing" in capsys.readouterr().err
    np.testing.assert_array_equal(predictions(table.assign(town="Atlantis"), "unseen.csv"), predictions(table.assign(town=None), "gone.csv"))
    with pytest.raises(UserError, match="no column 'age'"):
        predictions(table.drop(columns="age"), "missing.csv")
    with pytest.raises(UserError, match=r"column 'age': 'old' is not a number"):
        predictions(table.assign(age="old"), "words.csv")


def test_chosen_features_are_all_that_a_run_needs(folder, tmp_path):
    assert "features=town+a" in tracking.run_folder(settings_of(folder, 'boost.features=["town", "a"]'), "boost").name
    settings = settings_of(folder, 'boost.features=["town", "a"]', f"run.dir={tmp_path / 'run'}")
    boost(settings)
    assert set(pd.read_csv(tmp_path / "run/importance.csv")["feature"]) == {"a", "town"}
    rows(20, 3)[["town", "a"]].to_csv(tmp_path / "two.csv", index=False)
    assert len(BoostPredictor(tmp_path / "run").read(tmp_path / "two.csv", 100).__next__().dataset) == 20


@pytest.mark.parametrize("library", LIBRARIES)
def test_importances_are_the_librarys_own(folder, tmp_path, library):
    settings = settings_of(folder, f"boost.library={library}", *TARGETS["multiclass"], f"run.dir={tmp_path / 'run'}")
    boost(settings)
    predictor, data = BoostPredictor(tmp_path / "run"), boost_data.prepare(settings)
    valid, table_ = data.matrix[data.table.rows["valid"]], pd.read_csv(tmp_path / "run/importance.csv", index_col="feature")
    assert len(valid) < boost_report.EXPLAINED
    (booster,) = predictor.boosters
    if library == "lightgbm":
        shares = booster.predict(valid, pred_contrib=True).reshape(len(valid), 3, -1)
        gain, split = booster.feature_importance("gain"), booster.feature_importance("split")
    else:
        shares = booster.predict(xgboost.DMatrix(valid, **predictor.library.columns), pred_contribs=True)
        gain, split = (booster.get_score(importance_type=kind) for kind in ("total_gain", "weight"))
        gain, split = ([found.get(name, 0) for name in booster.feature_names] for found in (gain, split))
    for column, expected in {"gain": gain, "split": split, "shap": np.abs(shares).mean(axis=(0, 1))[:-1]}.items():
        np.testing.assert_allclose(table_.loc[data.names, column], expected, rtol=1e-5)


@pytest.mark.parametrize(("library", "tree"), [("lightgbm", "linear_tree=true"), ("xgboost", "multi_strategy=multi_output_tree")])
def test_trees_that_have_no_shapley_values_have_the_other_importances(folder, tmp_path, library, tree):
    words = [f"boost.library={library}", f"boost.params.{tree}", 'boost.features=["a", "noise"]', *TARGETS["multiclass"]]
    boost(settings_of(folder, *words, f"run.dir={tmp_path / 'run'}"))
    table_ = pd.read_csv(tmp_path / "run/importance.csv", index_col="feature")
    assert table_["shap"].isna().all()
    assert (table_.loc["a", ["gain", "split"]] > 0).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_trial_writes_nothing_prepares_once_and_can_be_pruned(folder, tmp_path, library):
    settings = settings_of(folder, f"boost.library={library}", "boost.folds=0")
    table = read(settings.data)
    told = []
    result = boost(settings, table, lambda round_, score: told.append((round_, score)), trial=True)
    binned = next(iter(boost_data.prepare(settings, table).binned.values()))
    again = boost(settings_of(folder, f"boost.library={library}", "boost.params.max_depth=2"), table, None, trial=True)
    assert next(iter(boost_data.prepare(settings, table).binned.values())) is binned
    assert set(result) == {"best", "step"}
    assert result["best"] != again["best"]
    assert told
    assert all(round_ % boost_report.EVERY == 0 and 0.5 < score < 1 for round_, score in told)
    assert not (tmp_path / "runs").exists()

    class Pruned(Exception):
        pass

    def prune(*_):
        raise Pruned

    with pytest.raises(Pruned):
        boost(settings, table, prune, trial=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_trial_scores_its_last_look_at_the_trees_without_another_prediction(folder, monkeypatch, library):
    settings = settings_of(folder, f"boost.library={library}", "boost.folds=3", "boost.patience=0", "boost.rounds=40")
    table = read(settings.data)
    predicted = boost(settings, table, None, trial=True)
    monkeypatch.delattr(boosters.LIBRARIES[library], "predict")
    seen = boost(settings, table, lambda *_: None, trial=True)
    assert seen == {"step": 40, "best": pytest.approx(predicted["best"], rel=1e-6)}


def test_folds_keep_classes_groups_and_time(folder):
    def folds(*overrides):
        settings = settings_of(folder, "boost.folds=4", *overrides)
        data = boost_data.prepare(settings)
        return data.table, boost_data.cut(settings, data)

    table, cut = folds()
    held = np.concatenate([rows_ for _, rows_ in cut])
    assert sorted(held) == sorted([*table.rows["train"], *table.rows["valid"]])
    assert not set(held) & set(table.rows["test"])
    assert np.ptp([table.target[rows_].mean() for _, rows_ in cut]) < 0.02
    table, cut = folds(*TARGETS["regression"])
    assert np.ptp([table.target[rows_].mean() for _, rows_ in cut]) < 1
    table, cut = folds("data.group=group", 'data.drop=["three", "amount", "weight"]')
    assert all(not set(table.groups[fit]) & set(table.groups[held]) for fit, held in cut)
    _, cut = folds("boost.split=time")
    assert all(fit.max() < held.min() for fit, held in cut)


def test_folds_by_time_predict_what_can_be_predicted(folder, tmp_path):
    settings = settings_of(folder, "boost.folds=3", "boost.split=time", f"run.dir={tmp_path / 'run'}")
    boost(settings)
    out_of_fold = pd.read_parquet(tmp_path / "run/oof.parquet")
    assert 0 < len(out_of_fold) < 600
    assert (out_of_fold.groupby("fold")["row"].min().diff().dropna() > 0).all()
    with pytest.raises(UserError, match="no out-of-fold prediction"):
        BoostPredictor(tmp_path / "run").held_out()


@pytest.mark.parametrize("by", ["rank", "mean"])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_screen_keeps_what_tells_and_writes_a_config(folder, tmp_path, kind, by):
    words = [*TARGETS[kind], f"run.dir={tmp_path / 'run'}", f"boost.screen={by}"]
    passed = screen.screen(settings_of(folder, *words))
    assert {"a", "town"} <= set(passed) <= {"a", "town", "b b"}
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"screen.csv", "screen.png", "screen.toml"}
    # By SciPy, on the training rows as they stand in the file.
    data = boost_data.prepare(settings_of(folder, *words))
    train = pd.read_csv(folder / "train.csv").iloc[data.table.rows["train"]]
    target = {"binary": "yes", "multiclass": "three", "regression": "amount"}[kind]
    towns = train["town"].fillna("")
    known = train[train["b b"].notna()]
    groups = [known["b b"][known[target] == label] for label in data.table.info.labels]
    if kind == "regression":
        numbers = {"rank": stats.spearmanr, "mean": stats.pearsonr}[by](known["b b"], known[target])
        words_ = {"rank": stats.kruskal, "mean": stats.f_oneway}[by](*(part for _, part in train[target].groupby(towns)))
    else:
        tests = {"rank": (stats.mannwhitneyu, stats.kruskal), "mean": (functools.partial(stats.ttest_ind, equal_var=False), stats.f_oneway)}
        numbers = tests[by][len(groups) > 2](*groups)
        words_ = stats.chi2_contingency(pd.crosstab(towns, train[target]))
    table_ = pd.read_csv(tmp_path / "run/screen.csv", index_col="feature")
    assert table_.loc["b b", "p"] == pytest.approx(numbers.pvalue, rel=1e-6)
    assert table_.loc["town", "p"] == pytest.approx(words_.pvalue, rel=1e-6)
    np.testing.assert_allclose(table_["corrected_p"], stats.false_discovery_control(table_["p"]), rtol=1e-6)
    settings = parse([folder / "boost.toml", tmp_path / "run/screen.toml"], [f"data.root={folder}", *TARGETS[kind]])
    assert boost_data.prepare(settings).names == passed


@pytest.mark.parametrize("library", LIBRARIES)
def test_trials_of_other_folds_share_no_bins(folder, library):
    shared = None
    for folds in (3, 0, 2, 0):
        settings = settings_of(folder, f"boost.library={library}", f"boost.folds={folds}", "boost.patience=0")
        shared = shared or table.read(settings.data)
        assert boost(settings, shared, trial=True) == boost(settings, trial=True)


def test_what_is_written_is_the_best_round_where_some_rounds_grow_no_tree(tmp_path):
    generator, seen = np.random.default_rng(0), 0
    made = pd.DataFrame(generator.normal(size=(90, 3)), columns=list("abc"))
    made["y"] = np.where(made["a"] + generator.normal(0, 1.5, 90) > 0, "yes", "no")
    made.to_csv(tmp_path / "few.csv", index=False)
    data = {"name": "table", "train": "few.csv", "target": "y", "test_fraction": 0.0, "valid_fraction": 0.4}
    few = {"learning_rate": 0.3, "min_data_in_leaf": 12, "bagging_fraction": 0.6, "bagging_freq": 1}
    (tmp_path / "few.toml").write_text(dump_toml({"data": data, "model": {"name": "mlp"}, "boost": {"rounds": 60, "patience": 15, "params": few}}))
    for seed in range(6):
        run = tmp_path / f"run{seed}"
        result = boost(parse([tmp_path / "few.toml"], [f"data.root={tmp_path}", f"run.dir={run}", f"run.seed={seed}"]))
        record = json.loads((run / "folds/fold0.json").read_text())
        assert result["best"]["loss"] == pytest.approx(record["valid"][record["best_round"] - 1], rel=1e-6)
        seen += BoostPredictor(run).boosters[0].num_trees() < record["best_round"]
    assert seen  # else nothing was tested


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_town_that_only_held_out_rows_have_is_judged_as_it_will_be_predicted(folder, tmp_path, library):
    made = rows(600, 0)
    made.loc[[3, 77, 300], "town"] = ["Lima", "Quito", "Aachen"]
    made.to_csv(tmp_path / "train.csv", index=False)
    words = [f"data.root={tmp_path}", "data.test=", "boost.folds=3", f"boost.library={library}", f"run.dir={tmp_path / 'run'}"]
    result = boost(parse([folder / "boost.toml"], words))
    assert {"Lima", "Quito", "Aachen"} & {*json.loads((tmp_path / "run/preprocessing.json").read_text())["vocabularies"]["town"]}
    for number, fold in enumerate(result["folds"]):
        record = json.loads((tmp_path / f"run/folds/fold{number}.json").read_text())
        assert record["valid"][record["best_round"] - 1] == pytest.approx(fold["valid"]["loss"], rel=1e-6)


def test_rows_in_another_order_are_not_those_of_the_run_but_the_test_file_may_change(folder, tmp_path):
    """Same labels, vocabularies and mean: only the rows tell. Their numbers would pair a row with what was predicted for another."""
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = parse([folder / "boost.toml"], [f"data.root={tmp_path}", "boost.folds=3", f"run.dir={tmp_path / 'run'}"])
    result = boost(settings)
    rows(150, 8).to_csv(tmp_path / "test.csv", index=False)
    assert len(BoostPredictor(tmp_path / "run").split("test")) == 150
    (tmp_path / "run/result.json").unlink()  # as if killed before it was written
    assert boost(settings)["folds"] == result["folds"]
    pd.read_csv(tmp_path / "train.csv").sample(frac=1, random_state=0).to_csv(tmp_path / "train.csv", index=False)
    for part in ("valid", "test"):
        with pytest.raises(UserError, match=r"data\.train is not what this run learned from \(other rows\)"):
            BoostPredictor(tmp_path / "run").split(part)
    with pytest.raises(UserError, match=r"other rows"):
        BoostPredictor(tmp_path / "run").held_out()
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(UserError, match="fold 0 was boosted on other data"):
        boost(settings)


def test_runs_of_older_code_are_left_alone(folder, tmp_path, capsys):
    """Their folds have no mark of their rows, and their trackers none of their end."""
    run = tmp_path / "run"
    settings = settings_of(folder, f"run.dir={run}")
    first = boost(settings)
    for path, gone in [(run / "tracker.json", "ended"), (run / "folds/fold0.json", "rows")]:
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != gone}))
    (run / "report.html").unlink()
    assert boost(settings) == first
    assert "finished" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert len(BoostPredictor(run).split("valid")) > 0
    (run / "tracker.json").write_text("")
    with pytest.raises(UserError, match=r"tracker\.json: it is torn; delete it"):
        boost(settings)


@pytest.mark.parametrize("library", LIBRARIES)
def test_damaged_folds_and_other_data_are_refused(folder, tmp_path, library):
    (tmp_path / "train.csv").write_bytes((folder / "train.csv").read_bytes())
    settings = parse([folder / "boost.toml"], [f"data.root={tmp_path}", "data.test=", f"boost.library={library}", f"run.dir={tmp_path / 'run'}"])
    boost(settings)
    model = tmp_path / "run/folds" / f"fold0{boosters.LIBRARIES[library].suffix}"
    whole, learned = model.read_bytes(), (tmp_path / "run/preprocessing.json").read_bytes()
    model.write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"fold0.* is missing or damaged; delete .*result\.json"):
        BoostPredictor(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()  # as the message says; also as if killed while it concluded
    (tmp_path / "run/oof.parquet").unlink()
    boost(settings)
    assert model.read_bytes() == whole
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/oof.parquet").unlink()
    with pytest.raises(UserError, match="has not ended"):
        BoostPredictor(tmp_path / "run").held_out()
    other = rows(600, 9)
    other.loc[5, "town"] = "Aachen"
    other.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(UserError, match="other data"):
        boost(settings)
    assert (tmp_path / "run/preprocessing.json").read_bytes() == learned
    with pytest.raises(UserError, match=r"data\.train is not what this run learned from \(other vocabularies\)"):
        BoostPredictor(tmp_path / "run").split("valid")


def test_other_sample_weights_are_other_data(folder):
    settings = settings_of(folder, "data.weight=weight", 'data.drop=["three", "amount", "group"]')
    data = boost_data.prepare(settings)
    (fold,), before = boost_data.cut(settings, data), data.checksum
    mark = data.mark(fold)
    data.table.weights[7] += 1
    del data.checksum
    assert before != data.checksum
    assert mark != data.mark(fold)


def test_names_of_columns_may_hold_anything(folder, tmp_path):
    made = rows(600, 0).rename(columns={"a": "cost_$_per_$", "noise": "b_b", "age": "b_b_1"})
    made.to_csv(tmp_path / "train.csv", index=False)
    for library in LIBRARIES:
        run = tmp_path / library
        boost(parse([folder / "boost.toml"], [f"data.root={tmp_path}", "data.test=", f"boost.library={library}", f"run.dir={run}"]))
        assert (run / "importance.png").exists()


def test_a_metric_of_the_model_file_counts_here_too(folder, monkeypatch):
    from torchmetrics.classification import BinarySpecificity

    from models import mlp

    monkeypatch.setattr(mlp, "specificity", lambda info: BinarySpecificity(), raising=False)
    assert 0 < boost(settings_of(folder, 'task.metrics=["specificity"]'), trial=True)["best"]["specificity"] <= 1


MISTAKES = {
    'boost.features=["agee"]': ("'agee'", "did you mean age?"),
    "boost.folds=1": ("boost.folds = 1", "2 or more"),
    "boost.folds=500": ("boost.folds = 500", "smallest class"),
    "boost.folds=3 boost.split=group": ("boost.split", "data.group"),
    "boost.folds=20 data.group=group": ("boost.folds = 20", "12 groups"),
    "boost.folds=3 data.balance=undersample": ("data.balance", "class_weights"),
    "boost.params.loss=l1": ("loss", "boost.params.objective"),
    "boost.params.verbosity=-1": ("verbosity",),
    "boost.params.objective=regression": ("boost.params.objective", "no probabilities"),
    "boost.params.monotone_constraints=[1]": ("monotone_constraints", "5 features"),
    "boost.library=xgboost boost.params.booster=dart": ("dart", "boost.patience"),
    "boost.params.boosting_type=dart": ("boosting_type", "dart", "boost.patience"),
    "boost.library=xgboost boost.params.booster=gblinear": ("gblinear", "no trees"),
    "boost.params.max_depth={a=1}": ("lightgbm refuses", "max_depth"),
    "boost.library=xgboost boost.params.monotone_constraints=[1]": ("monotone_constraints", "5 features"),
    "boost.library=xgboost boost.params.monotone_constraints={zzz=1}": ("monotone_constraints", "'zzz'", "known"),
    "boost.library=xgboost boost.params.interaction_constraints=[0,1]": ("interaction_constraints", "lists"),
    "boost.params.monotone_constraints=[[1],[1,0]]": ("monotone_constraints", "5 features"),
    'boost.library=xgboost boost.params.interaction_constraints=[["a","agee"]]': ("interaction_constraints", "did you mean age?"),
    "boost.library=xgboost boost.params.max_bin=many": ("xgboost refuses", "many"),
    "boost.split=time": ("boost.split", "boost.folds"),
    "boost.folds=3 boost.split=time data.test=": ("boost.split", "data.test_fraction = 0"),
    "data.target=three data.drop=[] boost.params.objective=multiclassova": ("boost.params.objective", "no probabilities"),
    "boost.library=xgboost boost.params.disable_default_eval_metric=1": ("eval_metric",),
    "boost.library=xgboost boost.params.objective=binary:logitraw": ("boost.params.objective", "no probabilities"),
    "data.id=row": ("data.id = 'row'",),
    "boost.params={bagging_fraction=0.7,subsample=0.5}": ("boost.params.subsample", "bagging_fraction", "take one"),
    "boost.params.categorical_feature=[1]": ("categorical_feature", "data.categorical"),
    "boost.params.sigmoid=2": ("boost.params.sigmoid", "logits"),
    "boost.library=xgboost data.target=amount data.drop=[] boost.params={objective='reg:quantileerror',quantile_alpha=[0.1,0.9]}": ("one number",),
    "boost.params.num_leafs=7": ("boost.params.num_leafs", "no such parameter"),
    "boost.params.learning_rate=ten": ("lightgbm refuses", "ten, where a number is needed"),
    "boost.params.num_leaves=1": ("lightgbm refuses", "num_leaves"),
    "boost.params.metric=foo": ("boost.params.metric", "'foo'"),
    "boost.params.n_estimators=7": ("n_estimators", "boost.rounds"),
    "boost.library=xgboost boost.params.max_depht=7": ("boost.params.max_depht", "no such parameter"),
    "boost.library=xgboost boost.params.max_depth=-1": ("xgboost refuses", "max_depth"),
    "boost.library=catboost": ("boost.library", "'catboost'"),
    "boost.device=gpu": ("boost.device", "no GPU"),
    'task.metrics=["acuracy"]': ("task.metrics", "did you mean accuracy?"),
    "data.train=gone.csv": ("data.train", "no such file"),
    "data.target=nothing": ("data.target", "no such column"),
}


def test_each_mistake_is_one_line_and_status_2(folder):
    common = ["boost.py", "--config", folder / "boost.toml", f"data.root={folder}"]
    drop = 'data.drop=["three", "amount", "weight"]'
    lines = [[*common, *mistake.split(" "), *([drop] if "data.group" in mistake else [])] for mistake in MISTAKES]
    for (mistake, words), ended in zip(MISTAKES.items(), commands.many(lines, folder), strict=True):
        assert ended.status == 2, (mistake, ended.text)
        said = ended.errors.splitlines()
        assert len(said) == 1 and said[0].startswith("error: "), (mistake, ended.errors)
        assert all(word in said[0] for word in words), (mistake, said)
        assert "Traceback" not in ended.text


def test_parameters_reach_xgboost_and_constraints_may_name_columns(folder, tmp_path):
    def trial(**params):
        (tmp_path / "params.toml").write_text(dump_toml({"boost": {"library": "xgboost", "patience": 5, "params": params}}))
        words = [f"data.root={folder}", 'boost.features=["a", "b b", "noise", "age"]']
        return boost(parse([folder / "boost.toml", tmp_path / "params.toml"], words), trial=True)

    plain = trial()
    by_place = trial(monotone_constraints=[0, -1, 0, 0])
    assert by_place == trial(monotone_constraints={"b b": -1}) == trial(monotone_constraints="(0,-1,0,0)") != plain
    assert trial(interaction_constraints=[["a", "b b"], ["noise", "age"]]) == trial(interaction_constraints=[[0, 1], [2, 3]]) != plain
    assert trial(eval_metric="error@0.5") == trial(eval_metric=["error", "auc"])  # the library has its own name for it
    assert plain not in (trial(tree_method="approx"), trial(tree_method="exact"))  # which take no bins


@pytest.mark.parametrize(("library", "named"), [("lightgbm", {"device_type": "gpu"}), ("xgboost", {"device": "cuda"})])
def test_one_key_asks_for_the_gpu(folder, monkeypatch, library, named):
    """What the library is asked for; no GPU does it here."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings = settings_of(folder, f"boost.library={library}", "boost.device=gpu")
    data = boost_data.prepare(settings)
    assert named.items() <= boosters.LIBRARIES[library](data.table.info, data.names).params(settings).items()


def test_a_library_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(UserError, match="pip install xgboost"):
        boost(settings_of(folder, "boost.library=xgboost"), trial=True)


def test_a_bundled_set_can_be_boosted(tmp_path):
    (tmp_path / "wine.toml").write_text('[data]\nname = "bundled"\ndataset = "wine"\n[model]\nname = "mlp"\n[boost]\nrounds = 30\nfolds = 3\n')
    result = boost(parse([tmp_path / "wine.toml"], [f"run.dir={tmp_path / 'run'}"]))
    assert result["test"]["accuracy"] > 0.9
    assert result["spread"]["accuracy"] >= 0


@pytest.mark.slow
@pytest.mark.skipif("PLAINLOOP_DATA" not in os.environ, reason="PLAINLOOP_DATA is not set: it names the folder of the public data sets")
def test_california_at_lightgbm_defaults_is_the_published_number(tmp_path):
    result = boost(parse([commands.ROOT / "conf/california_lightgbm_default.toml"], [f"run.dir={tmp_path / 'run'}"]))
    assert result["folds"][0]["best_round"] == 970
    assert result["test"]["rmse"] == pytest.approx(0.44945659, abs=1e-8)
    assert json.loads((tmp_path / "run/result.json").read_text())["test"] == result["test"]
