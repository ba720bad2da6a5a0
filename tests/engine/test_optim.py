"""The learning rate at its edges, what is decayed, and every optimizer by name."""

import inspect
import math
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import commands
from data import Info
from engine import optim, settings
from engine.config import ROOT, UserError
from models import mlp

EMPTY = types.SimpleNamespace(__name__="models.empty")


def rates(total: int, **keys: object) -> list[float]:
    return [optim.lr_at(step, settings.Optim(lr=2.0, **keys), total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_rises_in_equal_steps_to_the_full_rate(schedule):
    found = rates(40, schedule=schedule, warmup_ratio=0.25)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert found[10] == 2.0  # and the schedule starts from there


def test_constant_stays():
    assert rates(5) == [2.0] * 5


def test_cosine_falls_from_the_full_rate_to_the_smallest_at_the_last_step():
    found = rates(101, schedule="cosine", min_lr_ratio=0.1)
    assert (found[0], found[100]) == (2.0, pytest.approx(0.2))
    assert found[50] == pytest.approx(1.1)
    assert found[25] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert found == sorted(found, reverse=True)


def test_linear_falls_in_equal_steps_to_the_smallest_at_the_last_step():
    found = rates(13, schedule="linear", warmup_ratio=0.25, min_lr_ratio=0.5)
    assert found[3:] == pytest.approx([2.0 - step / 9 for step in range(10)])


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_shortest_runs_have_a_rate(total, schedule, warmup):
    found = rates(total, schedule=schedule, warmup_ratio=warmup)
    assert all(0 <= rate <= 2 for rate in found)
    assert max(found) == 2.0


def test_beyond_the_end_the_rate_stays_at_the_smallest():
    keys = settings.Optim(lr=1.0, schedule="linear", min_lr_ratio=0.2)
    assert optim.lr_at(500, keys, 100) == pytest.approx(0.2)


def test_a_group_may_scale_the_rate():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.1}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=1.0)
    optim.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]


class Parts(nn.Module):
    not_decayed = ("token",)

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embedding = nn.Embedding(3, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.embedding.weight


def test_norms_biases_and_embeddings_are_not_decayed():
    model = Parts()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = optim.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    rest = ["attention.in_proj_bias", "attention.out_proj.bias", "embedding.weight", "linear.bias", "norm.bias", "norm.weight", "token"]
    assert sorted(names[id(p)] for p in plain["params"]) == rest


def test_a_step_without_gradients_shrinks_matrices_alone():
    model = mlp.Model(mlp.Config(name="mlp", width=4, depth=1, dropout=0.0), Info("binary", 1, ["a", "b"], numeric=2, categories=[3]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = built(model, "AdamW", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] * 0.95 if name in ("blocks.0.weight", "head.weight") else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="no parameter to train"):
        optim.parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


def built(model: nn.Module, name: str, model_file: object = EMPTY, **keys: object) -> torch.optim.Optimizer:
    values = settings.parse([ROOT / "conf/digits.toml"])
    return optim.build(model, settings.replaced(values, {"optim.name": name} | {f"optim.{key}": value for key, value in keys.items()}), model_file)


def test_auto_is_adamw_fused():
    optimizer = built(nn.Linear(2, 2), "auto", weight_decay=0.3)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is True
    assert built(nn.Linear(2, 2), "auto", options={"fused": False}).defaults["fused"] is False


def test_options_reach_the_optimizer_and_lists_become_tuples():
    assert built(nn.Linear(2, 2), "AdamW", options={"betas": [0.5, 0.6], "amsgrad": True}).param_groups[0]["betas"] == (0.5, 0.6)


def test_the_models_file_comes_first():
    def Adam(groups, lr, momentum=0.0):
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)

    model_file = types.SimpleNamespace(__name__="models.own", Adam=Adam)
    optimizer = built(nn.Linear(2, 2), "Adam", model_file, options={"momentum": 0.5})
    assert (type(optimizer), optimizer.param_groups[0]["momentum"]) == (torch.optim.SGD, 0.5)
    with pytest.raises(UserError, match=r"optim\.options\.momentun: Adam has no such argument; did you mean momentum\?"):
        built(nn.Linear(2, 2), "Adam", model_file, options={"momentun": 0.5})


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("adamw", {}, r"optim\.name = 'adamw': no such optimizer; did you mean AdamW\?"),
        ("Optimizer", {}, r"optim\.name = 'Optimizer': no such optimizer"),
        ("lr_scheduler", {}, r"optim\.name = 'lr_scheduler': no such optimizer"),
        ("SGD", {"nesterov": True}, r"optim\.name = 'SGD', optim\.options = {'nesterov': True}: refused: Nesterov momentum requires"),
        ("AdamW", {"fused": True, "foreach": True}, r"optim\.name = 'AdamW', .*cannot be"),
        ("AdamW", {"eps": "small"}, r"optim\.name = 'AdamW', .*'small'"),
        ("AdamW", {"lr": 1.0}, r"optim\.options\.lr: AdamW has no such argument"),
    ],
)
def test_what_does_not_fit_is_one_line(name, options, line):
    with pytest.raises(UserError, match=line) as raised:
        built(nn.Linear(2, 2), name, options=options)
    assert len(raised.value.lines) == 1


CLASSES = sorted(name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer))
REFUSED = {"LBFGS", "Muon", "Optimizer", "SparseAdam"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_optim_steps_or_is_refused_in_one_line(name):
    torch.manual_seed(0)
    model = mlp.Model(mlp.Config(name="mlp", width=4, depth=1, dropout=0.0), Info("binary", 1, ["a", "b"], numeric=2, categories=[3]))
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"optim\.name = '{name}'") as raised:
            built(model, name)
        assert len(raised.value.lines) == 1
        return
    optimizer = built(model, name, lr=0.05)
    losses = []
    for _ in range(8):
        loss = (model({"numeric": torch.ones(2, 2), "categorical": torch.tensor([[0], [2]])}) - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each optimizer: six steps at once, and three steps, then three more."""
    folder = tmp_path_factory.mktemp("optimizers")
    short = ["model.width=8", "model.depth=1", "data.dataset=wine", "train.batch_size=32", "train.eval_every=6"]
    runs = [(name, run, steps) for name in CLASSES for run, steps in (("whole", 6), ("cut", 3), ("cut", 6))]
    lines = [["train.py", *short, f"optim.name={name}", f"run.dir={name}/{run}", f"train.steps={steps}"] for name, run, steps in runs]
    ended = commands.many(lines, folder)
    return folder, {name: ended[3 * place : 3 * place + 3] for place, name in enumerate(CLASSES)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_optim_trains_and_resumes_or_is_refused_in_one_line(trained, name):
    folder, ended = trained[0], trained[1][name]
    if name in REFUSED:
        assert [end.status for end in ended] == [2, 2, 2]
        assert ended[0].errors.startswith(f"error: optim.name = {name!r}")
        assert ended[0].errors.count("\n") == 1
        return
    assert [end.status for end in ended] == [0, 0, 0], "".join(end.text for end in ended)
    whole, cut = (sorted((folder / name / run / "checkpoints").glob("*-step=00000006/*.safetensors")) for run in ("whole", "cut"))
    assert [path.name for path in whole] == [path.name for path in cut]
    for one, other in zip(whole, cut, strict=True):
        tensors, others = load_file(one), load_file(other)
        assert all(torch.equal(tensors[key], others[key]) for key in tensors.keys() | others.keys())
