"""The multilayer perceptron: shapes, inputs, and that it learns."""

import pytest
import torch
from torch.nn import functional

from data import Info, bundled
from engine.config import UserError
from models.mlp import Config, Model


def batch(count: int, info: Info) -> dict[str, torch.Tensor]:
    tensors = {}
    if info.numeric:
        tensors["numeric"] = torch.randn(count, info.numeric)
    if info.categories:
        tensors["categorical"] = torch.stack([torch.randint(size, (count,)) for size in info.categories], dim=1)
    return tensors


@pytest.mark.parametrize("categories", [[], [3, 9]])
@pytest.mark.parametrize("numeric", [0, 4])
@pytest.mark.parametrize("outputs", [1, 5])
def test_output_shapes(numeric: int, categories: list[int], outputs: int) -> None:
    info = Info("multiclass" if outputs > 1 else "binary", outputs, numeric=numeric, categories=categories)
    if not numeric and not categories:
        with pytest.raises(UserError, match="neither"):
            Model(Config(name="mlp"), info)
        return
    output = Model(Config(name="mlp", width=8, depth=2), info)(batch(6, info))
    assert output.shape == ((6,) if outputs == 1 else (6, outputs)) and output.dtype == torch.float32


def test_every_category_has_an_embedding_of_its_own() -> None:
    info = Info("binary", 1, categories=[2, 3])
    model = Model(Config(name="mlp", width=8, depth=1), info).eval()
    every = torch.tensor([[first, second] for first in range(2) for second in range(3)])
    assert len(model({"categorical": every}).detach().unique()) == 6
    assert model.embedding.num_embeddings == 5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    info = Info("regression", 1, numeric=4, categories=[3])
    model = Model(Config(name="mlp", width=16, dropout=0.0), info).train()
    whole = batch(8, info)
    part = {name: value[:3] for name, value in whole.items()}
    assert torch.allclose(model(whole)[:3], model(part), atol=1e-6)


def test_weights_alone_restore_it() -> None:
    info = Info("binary", 1, numeric=2, categories=[3, 4])
    first, second = (Model(Config(name="mlp", width=8), info).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    given = batch(5, info)
    assert "starts" not in first.state_dict() and torch.equal(first(given), second(given))


def test_digits_are_learned() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    splits = bundled.load(bundled.Config(name="bundled", dataset="digits"))
    model = Model(Config(name="mlp", width=128, depth=2), splits.info)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(15):
        for positions in torch.randperm(len(splits.train)).split(64):
            given = splits.train.__getitems__(positions)
            optimizer.zero_grad()
            functional.cross_entropy(model(given), given["target"]).backward()
            optimizer.step()
    given = splits.test.__getitems__(torch.arange(len(splits.test)))
    with torch.no_grad():
        accuracy = (model.eval()(given).argmax(1) == given["target"]).float().mean()
    torch.set_num_threads(threads)
    assert accuracy > 0.95
