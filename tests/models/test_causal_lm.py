"""Causal language models: the loss of a block, perplexity, and a run from text files to from_pretrained and infer.py."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import commands
import launch
from data import Info
from engine.config import UserError
from models.causal_lm import Config, Model, perplexity

INFO = Info("language", 1, more={"vocabulary": 60, "pad": 0, "end": 3, "max_length": 16})
SETTINGS = """
data = { name = "corpus", train = ["*.txt"], tokenizer = "bpe", vocabulary = 200, block = 16 }
model = { name = "causal_lm", width = 32, layers = 2, heads = 2 }
train = { steps = 30, batch_size = 8, log_every = 10, eval_every = 15 }
optim = { lr = 3e-3 }
"""


def config(**keys: Any) -> Config:
    return Config(**{"name": "causal_lm", "width": 16, "layers": 1, "heads": 2, **keys})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_the_tokens_of_a_block(architecture):
    torch.manual_seed(0)
    model = Model(config(architecture=architecture), INFO)
    tokens, counts = torch.randint(60, (3, 17)), torch.tensor([16, 5, 1])
    losses = model({"tokens": tokens, "target": counts})
    logits = model.net(input_ids=tokens[:, :-1]).logits
    for row, count in enumerate(counts.tolist()):
        expected = torch.nn.functional.cross_entropy(logits[row, :count], tokens[row, 1 : count + 1])
        torch.testing.assert_close(losses[row], expected)
    changed = tokens.clone()
    changed[1, 6:] = 7  # what fills a short block counts for nothing
    torch.testing.assert_close(model({"tokens": changed, "target": counts})[1], losses[1])


def test_perplexity_is_of_all_tokens():
    metric = perplexity(INFO)
    metric.update(torch.tensor([2.0, 8.0]), torch.tensor([10, 30]))
    metric.update(torch.tensor([4.0]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx(math.exp((10 * math.log(2) + 30 * math.log(8) + math.log(4)) / 41))


def test_floating_point_operations_of_a_token():
    """GPT-2 small, 1,024 tokens: 124 M weights, 12 layers of 768."""
    info = Info("language", 1, more={"vocabulary": 50257, "pad": 0, "end": 3, "max_length": 1024})
    with torch.device("meta"):
        model = Model(config(architecture="gpt2", width=768, layers=12, heads=12), info)
    assert model.flops_per_token == 6 * 124_439_808 + 12 * 12 * 768 * 1024


def test_a_mistake_is_said():
    with pytest.raises(UserError, match=r"model\.width = 18: must be a multiple of 2 x model\.heads"):
        Model(config(width=18, heads=4), INFO)
    with pytest.raises(UserError, match="no running text"):
        Model(config(), Info("binary", 1, numeric=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    for name in ("design", "notes"):
        (folder / f"{name}.txt").write_text("".join(f"the {name} of line {line}, and of {line + 1}\n" for line in range(150)))
    (folder / "small.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def ended(folder) -> list[commands.Ended]:
    train = ["train.py", "--config", "small.toml"]
    return commands.many(
        [
            [*train, "run.dir=run"],
            ["infer.py", "run", "--split", "test"],
            ["infer.py", "run", "--input", "notes.txt", "--output", "blocks.csv"],
            [*train, "run.dir=tuned", "model.pretrained=run/best", "train.steps=10", "model.lora=2", "optim.lr=1e-4"],
        ],
        folder,
    )


def test_a_run_gives_perplexities(folder, ended):
    assert [end.status for end in ended] == [0, 0, 0, 0], "".join(end.text for end in ended)
    result = json.loads((folder / "run/result.json").read_text())
    assert 1 < result["test"]["perplexity"] < 40  # 200 tokens, all alike, would give 200
    assert result["test"]["perplexity"] == pytest.approx(math.exp(result["test"]["loss"]), rel=1e-4)
    assert f"perplexity {result['test']['perplexity']:.4g}" in ended[1].out
    blocks = pd.read_csv(folder / "blocks.csv")
    assert list(blocks.columns) == ["document", "block", "prediction"] and (blocks.prediction > 1).all() and len(blocks) > 20
    lines = [json.loads(line) for line in (folder / "run/steps.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["clock"]["tokens_per_second"] == pytest.approx(16 * line["clock"]["samples_per_second"], rel=1e-2)
        assert "flops_utilisation" not in line["clock"]  # the peak of this device is not known
    assert (folder / "run/predictions.png").exists()


def test_best_is_a_folder_of_transformers_and_training_goes_on_from_it(folder, ended):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "run/best").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/best")
    tokens = tokenizer((folder / "notes.txt").read_text(), return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [float(model(input_ids=tokens[:, start : start + 17], labels=tokens[:, start : start + 17]).loss) for start in (0, 16, 32)]
    assert pd.read_csv(folder / "blocks.csv").prediction[:3].tolist() == pytest.approx([math.exp(loss) for loss in losses], rel=1e-4)
    first = json.loads((folder / "tuned/metrics.jsonl").read_text().splitlines()[0])
    assert first["valid"]["loss"] <= json.loads((folder / "run/result.json").read_text())["best"]["loss"] + 0.05


@pytest.mark.slow
def test_any_strategy_trains_the_same(folder, ended, tmp_path):
    losses = []
    for strategy, processes in (("ddp", 1), ("ddp", 2), ("zero3-offload", 2)):
        run = tmp_path / f"{strategy}-{processes}"
        words = [f"strategy.name={strategy}", f"run.dir={run}", f"data.root={folder}"]
        launch.run("--config", folder / "small.toml", *words, log=tmp_path / f"{run.name}.log", processes=processes, folder=tmp_path)
        losses.append(json.loads((run / "result.json").read_text())["test"]["loss"])
    assert max(losses) - min(losses) < 1e-3
