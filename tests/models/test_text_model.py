"""Texts: the encoder from scratch, transformers models by folder, and best/ as transformers' own folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import commands
import launch
from data import Info
from engine.config import UserError
from models.text import Config, Model, hashed

INFO = Info("multiclass", 3, labels=["a", "b", "c"], more={"vocabulary": 50, "pad": 0, "end": None, "max_length": 32})


def batch(sizes: list[int], width: int = 16) -> dict[str, torch.Tensor]:
    mask = torch.arange(width) < torch.tensor(sizes)[:, None]
    return {"tokens": torch.randint(4, 50, mask.shape) * mask, "mask": mask}


def config(**keys: Any) -> Config:
    return Config(**{"name": "text", "width": 16, "layers": 1, "heads": 2, "buckets": 64, "dropout": 0.0, **keys})


# From scratch


@pytest.mark.parametrize(("layers", "ngrams"), [(0, 1), (0, 3), (2, 1), (1, 4)])
def test_a_text_does_not_depend_on_its_padding_or_its_batch(layers, ngrams):
    torch.manual_seed(0)
    model = Model(config(layers=layers, ngrams=ngrams), INFO)
    given = batch([3, 16, 9])
    output = model(given)
    assert output.shape == (3, 3) and output.dtype == torch.float32
    alone = model({name: value[:1, :8] for name, value in given.items()})
    torch.testing.assert_close(alone, output[:1], atol=1e-6, rtol=1e-5)


def test_texts_are_padded_to_eights_beyond_the_longest():
    model = Model(config(), Info("multiclass", 3, labels=["a", "b", "c"], more={**INFO.more, "max_length": 20}))
    assert model(batch([20, 3], width=24)).shape == (2, 3)


def test_one_output_has_no_second_dimension():
    assert Model(config(), Info("binary", 1, labels=["a", "b"], more=INFO.more))(batch([3, 4])).shape == (2,)


def test_ngrams_are_those_that_end_at_a_token():
    tokens = torch.tensor([[5, 6, 7, 8], [9, 6, 7, 8]])
    found = hashed(tokens, 4, 2**40)
    assert found.shape == (2, 4, 3) and (found >= 0).all()
    assert torch.equal(found[0, 2:, 0], found[1, 2:, 0])  # (6, 7), (7, 8)
    assert found[0, 3, 1] == found[1, 3, 1]  # (6, 7, 8)
    assert found[0, 3, 2] != found[1, 3, 2] and found[0, 1, 0] != found[1, 1, 0]
    assert len(found.unique()) == 24 - 3  # what they share
    assert (hashed(tokens, 4, 16) < 16).all()


def test_ngrams_are_left_out_in_training_only():
    model = Model(config(ngram_dropout=0.5), INFO)
    given = batch([8, 8])
    assert not torch.equal(model(given), model(given))
    model.eval()
    assert torch.equal(model(given), model(given))


@pytest.mark.parametrize(
    ("keys", "info", "words"),
    [
        ({"heads": 3}, INFO, "model.heads = 3: must divide model.width = 16"),
        ({}, Info("binary", 1, numeric=3), "the data has no texts"),
        ({"pretrained": "/no/such/model"}, INFO, "model.pretrained = '/no/such/model': cannot be loaded"),
    ],
)
def test_a_mistake_is_said(keys, info, words):
    with pytest.raises(UserError, match=words):
        Model(config(**keys), info)


# By folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small BERT with its tokenizer, a GPT-2, and reviews of films."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    from data import _tokenizer

    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words, labels = ["좋아요", "재미있다", "별로", "지루하다", "best", "worst"], [1, 1, 0, 0, 1, 0]
    rows = [generator.integers(6, size=generator.integers(1, 12)) for _ in range(300)]
    table = pd.DataFrame({"review": [" ".join(words[one] for one in row) for row in rows], "y": [["bad", "good"][labels[row[-1]]] for row in rows]})
    table.to_csv(folder / "reviews.csv", index=False)
    settings = _tokenizer.Tokenizing(name="text", tokenizer="bpe", vocabulary=90)
    tokenizer = _tokenizer.learn(settings, [table.review.tolist()])
    described = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **_tokenizer.SPECIAL})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 40}
    torch.manual_seed(0)
    for name, model in {
        "bert": BertModel(BertConfig(vocab_size=90, **sizes)),
        "gpt2": GPT2Model(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=40)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(described)
    (folder / "reviews.toml").write_text(
        """
        data = { name = "text", train = "reviews.csv", text = "review", target = "y", max_length = 40 }
        model = { name = "text", layers = 1, width = 16, heads = 2, buckets = 512 }
        train = { steps = 12, batch_size = 16, eval_every = 6 }
        optim = { lr = 1e-3 }
        """
    )
    return folder


KINDS = {
    "scratch": ["model.dropout=0.0"],
    "bert": ["model.pretrained=bert", "model.freeze=1", "model.gradient_checkpointing=true", "train.max_shard=20KB"],
    "bert_lora": ["model.pretrained=bert", "model.lora=4", "optim.lr=1e-2"],
    "gpt2_lora": ["model.pretrained=gpt2", "model.lora=4", "optim.lr=1e-2", "data.tokenizer=bert"],
}


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, commands.Ended]:
    lines = {name: ["train.py", "--config", "reviews.toml", f"run.dir={name}", *words] for name, words in KINDS.items()}
    lines |= {f"infer {name}": ["infer.py", name, "--input", "reviews.csv", "--output", f"{name}.csv", "--logits"] for name in KINDS}
    lines |= {f"score {name}": ["infer.py", name, "--split", "test"] for name in KINDS}
    return dict(zip(lines, commands.many(list(lines.values()), folder), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_infer_gives_its_scores(folder, ended, kind):
    for step in (kind, f"infer {kind}", f"score {kind}"):
        assert ended[step].status == 0, ended[step].text
    result = json.loads((folder / kind / "result.json").read_text())
    assert f"accuracy {result['test']['accuracy']:.4g}" in ended[f"score {kind}"].out


def test_the_recipe_takes_a_pretrained_folder(folder):
    (folder / "nsmc").mkdir()
    table = pd.read_csv(folder / "reviews.csv")
    for part in ("train", "valid"):
        named = pd.DataFrame({"id": range(len(table)), "document": table.review, "label": (table.y == "good").astype(int)})
        named.to_csv(folder / "nsmc" / f"{part}.tsv", sep="\t", index=False)
    words = ["model.pretrained=bert", "data.max_length=40", "train.epochs=1", "train.batch_size=32", "optim.lr=1e-3", f"data.root={folder}"]
    ended = commands.succeed("train.py", "--config", commands.ROOT / "conf/nsmc.toml", *words, "run.dir=nsmc-run", folder=folder)
    assert "test: loss" in ended
    described = json.loads((folder / "nsmc-run/best/config.json").read_text())
    assert described["vocab_size"] == 90 and described["model_type"] == "bert"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scratch"])
def test_best_is_a_folder_of_transformers(folder, ended, kind):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    best = folder / kind / "best"
    model, found = AutoModelForSequenceClassification.from_pretrained(best, output_loading_info=True)
    assert not any(found.values())
    tokenizer = AutoTokenizer.from_pretrained(best)
    predictions, reviews = pd.read_csv(folder / f"{kind}.csv"), pd.read_csv(folder / "reviews.csv").review.tolist()
    with torch.no_grad():
        logits = model.eval()(**tokenizer(reviews, padding=True, truncation=True, max_length=40, return_tensors="pt")).logits.squeeze(1)
    np.testing.assert_allclose(logits.numpy(), predictions.logit_good, atol=2e-5)
    assert predictions.logit_good.std() > 1e-4
    assert model.config.id2label == {0: "good"}
    assert (best / "model.safetensors.index.json").exists() == (kind == "bert")


def test_frozen_layers_stay_and_the_others_do_not(folder, ended):
    from transformers import AutoModelForSequenceClassification

    before = dict(AutoModelForSequenceClassification.from_pretrained(folder / "bert").named_parameters())
    for kind, frozen in {"bert": ("bert.embeddings.", "bert.encoder.layer.0."), "bert_lora": ("bert.embeddings.",)}.items():
        after = AutoModelForSequenceClassification.from_pretrained(folder / kind / "best").named_parameters()
        same = {name for name, value in after if torch.equal(value, before[name])}
        assert {name for name in before if name.startswith(frozen)} <= same
        assert not [name for name in same if ".1." in name and "dense.weight" in name]
    assert "trained)" in ended["bert"].out


@pytest.mark.parametrize(
    ("keys", "more", "words"),
    [
        ({}, {"vocabulary": 91}, "data.tokenizer: has 91 tokens, model.pretrained 90"),
        ({}, {"max_length": 41}, "data.max_length = 41: model.pretrained takes at most 40"),
        ({"freeze": 3}, {}, "model.freeze = 3: the model has 2 layers"),
    ],
)
def test_a_pretrained_model_must_fit(folder, keys, more, words):
    with pytest.raises(UserError, match=words):
        Model(config(pretrained=str(folder / "bert"), **keys), Info("binary", 1, labels=["a", "b"], more=INFO.more | more))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "bert_lora"])
def test_any_strategy_trains_the_same(folder, ended, tmp_path, kind):
    scores = []
    for strategy, processes in (("ddp", 1), ("ddp", 2), ("zero3-offload", 2)):
        run = tmp_path / f"{strategy}-{processes}"
        words = [*KINDS[kind], f"strategy.name={strategy}", "model.label=small", f"run.dir={run}", "optim.lr=1e-4", f"data.root={folder}"]
        words = [word.replace("pretrained=bert", f"pretrained={folder}/bert") for word in words]
        settings = folder / "reviews.toml"
        launch.run("--config", settings, *words, log=tmp_path / f"{run.name}.log", processes=processes, folder=tmp_path)
        scores.append(json.loads((run / "result.json").read_text())["test"]["loss"])
    assert abs(scores[1] - scores[0]) < 0.02 and abs(scores[2] - scores[1]) < 1e-4  # dropout differs with the number of processes
