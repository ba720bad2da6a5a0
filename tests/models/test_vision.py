"""Image classifiers: ours and pretrained ones."""

import importlib.util
from pathlib import Path

import pytest
import torch

import commands
from data import Info
from engine.config import UserError
from models.vision import Config, Model


def info(channels: int, size: int, outputs: int = 4) -> Info:
    return Info("multiclass", outputs, [str(label) for label in range(outputs)], more={"image": [channels, size, size]})


@pytest.mark.parametrize(("channels", "size", "outputs"), [(1, 8, 10), (3, 33, 1)])
def test_output_shapes(channels: int, size: int, outputs: int) -> None:
    model = Model(Config(name="vision", width=8), info(channels, size, outputs))
    output = model({"image": torch.rand(6, channels, size, size)})
    assert output.shape == ((6,) if outputs == 1 else (6, outputs))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = Model(Config(name="vision", width=8, dropout=0.0), info(1, 8)).train()
    image = torch.rand(6, 1, 8, 8)
    assert torch.allclose(model({"image": image})[:2], model({"image": image[:2]}), atol=1e-5)


def test_any_classifier_of_transformers(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ViTConfig, ViTForImageClassification

    small = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4)
    ViTForImageClassification(small).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    model = Model(Config(name="vision", pretrained=str(tmp_path)), info(1, 8)).eval()
    assert model({"image": torch.rand(2, 1, 8, 8)}).shape == (2, 4)
    assert model.mean == [0.1, 0.2, 0.3] and set(model.files) == {"config.json", "preprocessor_config.json"}
    ResNetConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match=r"model.pretrained = .*empty.*cannot be loaded"):
        Model(Config(name="vision", pretrained=str(tmp_path / "empty")), info(1, 8))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_named_where_it_is_missing() -> None:
    with pytest.raises(UserError, match="pip install timm"):
        Model(Config(name="vision", pretrained="timm:resnet18"), info(3, 32))


def test_images_from_training_to_prediction(tmp_path: Path) -> None:
    words = ("--config", commands.ROOT / "conf" / "digits_images.toml", "train.epochs=3", "model.stages=2", "run.dir=run")
    out = commands.succeed("train.py", *words, folder=tmp_path)
    accuracy = float(out.split("\ntest: ")[-1].split("accuracy ")[1].split()[0])
    assert accuracy > 0.4  # one in ten by chance
    assert f"accuracy {accuracy:.4g}" in commands.succeed("infer.py", "run", "--split", "test", folder=tmp_path)


@pytest.mark.slow
def test_best_of_a_pretrained_classifier_stands_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    small = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4)
    ViTForImageClassification(small).save_pretrained(tmp_path / "small")
    config = commands.ROOT / "conf" / "digits_images.toml"
    commands.succeed("train.py", "--config", config, "model.pretrained=small", "train.steps=4", "run.dir=run", folder=tmp_path)
    (tmp_path / "small").rename(tmp_path / "away")
    assert "accuracy" in commands.succeed("infer.py", "run", "--split", "test", folder=tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "best").config.num_labels == 10


@pytest.mark.slow
def test_the_config_as_it_stands(tmp_path: Path) -> None:
    out = commands.succeed("train.py", "--config", commands.ROOT / "conf" / "digits_images.toml", "run.dir=run", folder=tmp_path)
    assert float(out.split("\ntest: ")[-1].split("accuracy ")[1].split()[0]) >= 0.98
