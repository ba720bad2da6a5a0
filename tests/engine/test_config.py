"""Settings: overrides, merging, mistakes, the resolved file."""

import os
from pathlib import Path

import pytest
import tomli

from engine import config, settings
from engine.config import UserError

DIGITS = """
[data]
name = "bundled"
dataset = "digits"
[model]
name = "mlp"
"""


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """A function that writes a TOML under a name and gives its path."""
    monkeypatch.delenv("PLAINLOOP_DATA", raising=False)

    def write(text: str, name: str = "digits") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def parse(toml, *overrides: str, more: str = "") -> settings.Settings:
    return settings.parse([toml(DIGITS + more)], overrides)


def mistakes(toml, *overrides: str, more: str = "") -> list[str]:
    with pytest.raises(UserError) as raised:
        parse(toml, *overrides, more=more)
    return raised.value.lines


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),  # an integer where a float is wanted
        ("train.steps=1_000", 1000),
        ("train.compile=true", True),
        ('task.metrics=["f1", "auroc"]', ["f1", "auroc"]),
        ("task.best=max f1", "max f1"),  # text as it stands
        ("model.label=true", "true"),
        ("model.label=1e-3", "1e-3"),
        ("model.label=a=b", "a=b"),
        ('model.label="quoted"', '"quoted"'),
        ("run.dir=", ""),
        ("train.precision=bf16", "bf16"),
        ("run.dir=runs/a b", "runs/a b"),
        ("optim.options={ betas = [0.8, 0.9] }", {"betas": [0.8, 0.9]}),
        ("optim.options.eps=1e-6", {"eps": 1e-6}),
        ("strategy.deepspeed.zero_optimization={ stage = 3 }", {"zero_optimization": {"stage": 3}}),
        ("boost.params.objective=huber", {"objective": "huber"}),
        (" optim.lr =2e-4", 2e-4),
    ],
)
def test_an_override_is_toml_or_the_text_of_a_string_key(toml, override, value):
    section, key = override.partition("=")[0].strip().split(".")[:2]
    found = getattr(getattr(parse(toml, override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order_and_after_the_files(toml):
    assert parse(toml, "optim.lr=1", "optim.lr=2", more="[optim]\nlr = 3\n").optim.lr == 2


def test_a_name_may_come_after_the_keys_of_its_file(toml):
    values = ["data.train=true", "data.target=1", "data.name=table"]
    found = settings.parse([toml('[data]\nname = "bundled"\n[model]\nname = "mlp"\n')], values).data
    assert (found.train, found.target) == ("true", "1")


def test_later_files_win_key_by_key(toml):
    first = toml(DIGITS + "[optim]\nlr = 1.0\nweight_decay = 0.5\n[tune.space]\n'model.depth' = [1, 2]\n")
    second = toml("[optim]\nlr = 2.0\n[train]\nsteps = 7\n[tune.space]\n'optim.lr' = [1.0]\n", "second")
    found = settings.parse([first, second])
    assert (found.optim.lr, found.optim.weight_decay, found.train.steps) == (2.0, 0.5, 7)
    assert found.tune.space == {"optim.lr": [1.0]}  # a free table is one value


def test_free_tables_are_replaced_whole_and_entered_by_deeper_keys(toml):
    more = "[optim.options]\neps = 1e-6\namsgrad = true\n"
    assert parse(toml, "optim.options={ eps = 1.0 }", more=more).optim.options == {"eps": 1.0}
    assert parse(toml, "optim.options.eps=1.0", more=more).optim.options == {"eps": 1.0, "amsgrad": True}
    deeper = "[strategy.deepspeed.zero_optimization]\noverlap_comm = true\n"
    found = parse(toml, "strategy.deepspeed.zero_optimization.reduce_bucket_size=7", "strategy.deepspeed.wall_clock_breakdown=true", more=deeper)
    assert found.strategy.deepspeed == {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    assert parse(toml, "tune.space.optim.lr=[1.0]").tune.space == {"optim.lr": [1.0]}  # its names hold dots


def test_labels_and_root_have_defaults(toml, monkeypatch):
    found = parse(toml)
    assert (found.data.label, found.model.label, found.data.root) == ("digits", "mlp", os.getcwd())
    monkeypatch.setenv("PLAINLOOP_DATA", "/somewhere")
    assert parse(toml).data.root == "/somewhere"
    assert parse(toml, "data.root=/other").data.path("a.csv") == Path("/other/a.csv")
    assert parse(toml, "data.root=/other").data.path("/absolute/a.csv") == Path("/absolute/a.csv")
    table = '[data]\nname = "table"\ntrain = "a.csv"\ntarget = "y"\n[model]\nname = "mlp"\n'
    assert settings.parse([toml(table, "houses")]).data.label == "houses"


def test_all_mistakes_are_said_at_once_with_key_value_and_rule(toml):
    more = '[train]\nbatch_size = 0\nepoch = 3\nprecision = "fp8"\n[optim]\nlr = "fast"\n[trian]\nsteps = 1\n'
    lines = mistakes(toml, "data.dataset=iris", "model.widht=3", "run.seed=1.5", more=more)
    assert sorted(lines) == [
        "data.dataset = 'iris': must be 'digits', 'breast_cancer', 'wine' or 'diabetes'",
        "model.widht = 3: unknown key; did you mean width?",
        "optim.lr = 'fast': must be a valid number",
        "run.seed = 1.5: must be a valid integer",
        "train.batch_size = 0: must be greater than 0",
        "train.epoch = 3: unknown key; did you mean epochs?",
        "train.precision = 'fp8': must be 'fp32', 'bf16' or 'fp16'",
        "trian: unknown section; did you mean train?",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.name=bundeld", "data.name = 'bundeld': there is no data/bundeld.py; did you mean bundled?"),
        ("model.name=zzz", "model.name = 'zzz': there is no models/zzz.py; known: "),
        ("model.name=__init__", "model.name = '__init__': there is no models/__init__.py"),
        ("data.name=_files", "data.name = '_files': there is no data/_files.py"),
        ("OPTIM.lr=1", "OPTIM: unknown section; did you mean optim?"),
        ("lr=1", "'lr=1': an override is section.key=value"),
        ("optim.lr", "'optim.lr': an override is section.key=value"),
        ("optim.=1", "'optim.=1': an override is section.key=value"),
        ("optim.lr=", "optim.lr = '': must be a TOML value of type float"),
        ("train.steps=1e3", "train.steps = 1000.0: must be a valid integer"),
        ("train.steps=true", "train.steps = True: must be a valid integer"),
        ("optim.lr=inf", "optim.lr = inf: must be a finite number"),
        ("optim.warmup_ratio=1.1", "optim.warmup_ratio = 1.1: must be less than or equal to 1"),
        ("train.patience=-1", "train.patience = -1: must be greater than or equal to 0"),
        ("train.max_shard=5", "train.max_shard = '5': must be a size such as \"500MB\""),
        ("train.max_shard=0GB", "train.max_shard = '0GB': must be a size such as \"500MB\""),
        ("task.best=f1", 'task.best = \'f1\': must be "max <metric>" or "min <metric>"'),
        ("task.metrics=f1", 'task.metrics = \'f1\': must be a TOML value of type list[str], such as ["a", "b"]'),
        ("task.metrics=[1]", "task.metrics = 1: must be a valid string"),
        ("optim.options=3", "optim.options = 3: must be a valid dictionary"),
        ("run.seed=-1", "run.seed = -1: must be greater than or equal to 0"),
        ("model.width=0", "model.width = 0: must be greater than or equal to 1"),
    ],
)
def test_a_wrong_override_is_one_line(toml, override, line):
    (found,) = mistakes(toml, override)
    assert found.startswith(line)


@pytest.mark.parametrize("more", ["", "[optim]\nlr = 1.0\n"])
def test_a_plain_value_has_no_deeper_keys(toml, more):
    assert mistakes(toml, "optim.lr.x=3", more=more) == ["optim.lr = {'x': 3}: must be a valid number"]


def test_a_section_must_be_a_table(toml):
    with pytest.raises(UserError) as raised:
        settings.parse([toml("optim = 3\n" + DIGITS)])
    assert raised.value.lines == ["optim = 3: must be a section, such as [optim]"]
    with pytest.raises(UserError) as raised:
        settings.parse([toml("data = 3\n[model]\nname = 'mlp'\n")])
    assert raised.value.lines == [f"data.name: missing; it names a file of data/: {' / '.join(config.listing('data'))}"]


def test_missing_keys_are_named(toml):
    with pytest.raises(UserError, match=r"^data\.target: missing; column to predict$"):
        settings.parse([toml('[data]\nname = "table"\ntrain = "a.csv"\n[model]\nname = "mlp"\n')])


@pytest.mark.parametrize(
    ("text", "where"),
    [("[a]\nb = 1 2\n", "line 2, column 7"), ("a = 1\na = 2\n", "line 2, column 6"), ("[a\n", "line 1, column 3"), ("a = '", "end of document")],
)
def test_malformed_toml_gives_line_and_column(toml, text, where):
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML: .*" + where):
        config.read_toml(toml(text, "bad"))


def test_the_resolved_file_reads_back_to_equal_settings(toml, tmp_path):
    values = [
        'run.dir=a "quoted" \\ folder\nof two lines',
        "model.label=größe",
        "optim.options={ betas = [0.8, 0.9], eps = 1e-30, deep = { a = [{ b = 1 }] } }",
        'tune.space={ "optim.lr" = { low = 1e-5, high = 1e-2, log = true }, "model.depth" = [2, 3], "x" = [1, "a", true] }',
        "run.seed=9223372036854775807",
        "optim.lr=0.1000000000000000055",
    ]
    first = parse(toml, *values)
    (tmp_path / "resolved.toml").write_text(config.dump_toml(first.values()))
    again = settings.parse([tmp_path / "resolved.toml"])
    assert again == first
    assert config.dump_toml(again.values()) == config.dump_toml(first.values())


@pytest.mark.parametrize("path", sorted((config.ROOT / "conf").glob("*.toml")), ids=lambda path: path.stem)
def test_configs_of_the_repository_are_valid_and_read_back(path, tmp_path):
    first = settings.parse([path])
    (tmp_path / path.name).write_text(config.dump_toml(first.values()))
    assert settings.parse([tmp_path / path.name]) == first


def test_changes_are_validated(toml):
    found = settings.replaced(parse(toml), {"optim.lr": 0.5, "model.depth": 1, "boost.params.num_leaves": 8})
    assert (found.optim.lr, found.model.depth, found.boost.params) == (0.5, 1, {"num_leaves": 8})
    with pytest.raises(UserError, match=r"optim\.lr = -1: must be greater than 0"):
        settings.replaced(parse(toml), {"optim.lr": -1})


def test_every_key_has_a_meaning(toml):
    found = parse(toml)
    classes, _ = settings.classes(found.values())
    missing = [f"{name}.{key}" for name, section in classes.items() for key, field in section.model_fields.items() if not field.description]
    assert missing == []
    text = config.describe(classes)
    for name, section in classes.items():
        for key in section.model_fields:
            assert f"\n  {name}.{key}  (" in text


def test_the_free_keys_of_a_section_exist(toml):
    classes, _ = settings.classes(parse(toml).values())
    for section in classes.values():
        assert section.unchanged_result <= set(section.model_fields)


def test_suggestions_ignore_the_case():
    assert config.suggestion("adamw", ["Adam", "AdamW", "SGD"]) == "; did you mean AdamW?"
    assert config.suggestion("zzz", ["b", "a"]) == "; known: a, b"


@pytest.mark.parametrize(
    ("train", "processes", "plan"),
    [
        ({}, 1, (256, 1, 1)),
        ({}, 2, (128, 2, 1)),
        ({"micro_batch": 32}, 2, (32, 2, 4)),
        ({"batch_size": 3}, 3, (1, 3, 1)),
        ({"batch_size": 12, "micro_batch": 2}, 3, (2, 3, 2)),
    ],
)
def test_a_batch_is_cut_into_equal_parts(train, processes, plan):
    assert settings.plan_of(settings.Train(**train), processes) == settings.Plan(*plan)


@pytest.mark.parametrize(
    ("train", "processes", "near"),
    [({"batch_size": 64}, 3, 63), ({"batch_size": 2}, 3, 3), ({"batch_size": 64, "micro_batch": 24}, 2, 48), ({"batch_size": 1}, 2, 2)],
)
def test_what_does_not_divide_is_refused_with_what_does(train, processes, near):
    with pytest.raises(UserError, match=rf"train\.batch_size = {train['batch_size']}: must be a multiple of .* such as {near}$"):
        settings.plan_of(settings.Train(**train), processes)
    settings.plan_of(settings.Train(**train | {"batch_size": near}), processes)


def test_the_resolved_file_is_toml_without_nulls():
    assert tomli.loads(config.dump_toml({"a": {"b": None, "c": 1}})) == {"a": {"c": 1}}
