"""TabM: k multilayer perceptrons that share most of their weights, trained side by side and averaged.

Gorishniy et al., "TabM: Advancing Tabular Deep Learning with Parameter-Efficient Ensembling", arXiv 2410.24210; numerical
embeddings from Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", arXiv 2203.05556. The layers
are the authors' own, from their packages `tabm` and `rtdl_num_embeddings`.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import ModelConfig, UserError


class Config(ModelConfig):
    architecture: Literal["tabm", "tabm-mini", "tabm-packed"] = "tabm"
    """what members share: all but small adapters in every layer, all but one adapter at the start, or nothing"""
    members: int = Field(32, ge=1)
    """perceptrons in the ensemble (k)"""
    depth: int = Field(3, ge=1)
    """number of blocks"""
    width: int = Field(512, ge=1)
    """units of a block"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """share of a block's outputs set to zero in training"""
    numbers: Literal["plain", "piecewise", "periodic"] = "piecewise"
    """embeddings of numbers: none, piecewise-linear between quantiles, or periodic"""
    embedding: int = Field(16, ge=1)
    """size of a number's embedding"""
    bins: int = Field(48, ge=2, le=256)
    """most pieces of a piecewise-linear embedding"""
    frequencies: int = Field(48, ge=1)
    """waves of a periodic embedding"""
    sigma: float = Field(0.01, gt=0)
    """deviation of a periodic embedding's first frequencies"""


class Model(nn.Module):
    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        try:
            import rtdl_num_embeddings  # noqa: F401
            from tabm import TabM
        except ImportError as error:
            raise UserError(f'model.name = "tabm": needs the packages of requirements-extra.txt: pip install {error.name}') from None
        if not info.numeric and not info.categories:
            raise UserError('model.name = "tabm": the data has neither numbers nor categories; choose a model made for it')
        self.kind = info.kind
        embeddings = number_embeddings(config, info) if info.numeric else None
        shape = {"n_blocks": config.depth, "d_block": config.width, "dropout": config.dropout, "k": config.members, "arch_type": config.architecture}
        columns = {"n_num_features": info.numeric, "num_embeddings": embeddings, "cat_cardinalities": info.categories}
        self.net = TabM.make(**columns, **shape, d_out=info.outputs)
        # As in the authors' recipe: neither biases, which have a row for each member here, nor the frequencies of periodic
        # embeddings, nor the linear part of piecewise ones.
        plain = ("net.num_module.periodic.", "net.num_module.linear0.")
        self.not_decayed = {name for name, _ in self.named_parameters() if name.endswith(".bias") or name.startswith(plain)}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Training: every member's output, [b, members] or [b, members, classes]. Else one logit or value a row, as other models."""
        output = self.net(batch.get("numeric"), batch["categorical"].long() if "categorical" in batch else None)
        output = output.squeeze(-1) if output.shape[-1] == 1 else output
        return output if self.training else averaged(output.float(), self.kind)


def averaged(output: Tensor, kind: str) -> Tensor:
    """The logits of the members' mean probability, or the mean of their values: [b, members, ...] -> [b, ...]."""
    if kind == "regression":
        return output.mean(1)
    if kind == "multiclass":
        return output.log_softmax(-1).logsumexp(1) - torch.tensor(float(output.shape[1])).log()
    # logit(mean p) = log sum p - log sum (1 - p), in logarithms, since p rounds to 0 or 1 long before its logarithm does
    return F.logsigmoid(output).logsumexp(1) - F.logsigmoid(-output).logsumexp(1)


def number_embeddings(config: Config, info: Info) -> nn.Module | None:
    if config.numbers == "plain":
        return None
    import rtdl_num_embeddings as embeddings

    if config.numbers == "periodic":
        return embeddings.PeriodicEmbeddings(
            info.numeric, config.embedding, n_frequencies=config.frequencies, frequency_init_scale=config.sigma, lite=True
        )
    if "quantiles" not in info.more:
        raise UserError('model.numbers = "piecewise": needs the quantiles of the data; set data.numeric_transform = "quantile"')
    shares = torch.linspace(0, 1, config.bins + 1, dtype=torch.float64)
    edges = [torch.tensor(column, dtype=torch.float64).quantile(shares).float().unique() for column in info.more["quantiles"]]
    edges = [column if len(column) > 1 else torch.cat([column, column + 1]) for column in edges]  # of one value and gaps
    return embeddings.PiecewiseLinearEmbeddings(edges, config.embedding, activation=False, version="B")


# Members are trained each for itself: a sample's loss is the mean of its members' losses. These stand for the losses of the
# same names in engine/losses.py; in evaluation there is one output a row, and they are the same.


def bce(output: Tensor, batch: dict[str, Tensor], progress: Any, *, label_smoothing: float = 0.0) -> Tensor:
    target = batch["target"] * (1 - label_smoothing) + 0.5 * label_smoothing
    return mean_of_members(F.binary_cross_entropy_with_logits(output.float(), spread(target, output), reduction="none"))


def cross_entropy(output: Tensor, batch: dict[str, Tensor], progress: Any, *, label_smoothing: float = 0.0) -> Tensor:
    if output.dim() == 2:
        return F.cross_entropy(output.float(), batch["target"], reduction="none", label_smoothing=label_smoothing)
    target = batch["target"][:, None].expand(output.shape[:2])
    flat = output.float().flatten(0, 1)
    return F.cross_entropy(flat, target.flatten(), reduction="none", label_smoothing=label_smoothing).view(target.shape).mean(1)


def mse(output: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:
    return mean_of_members(F.mse_loss(output.float(), spread(batch["target"], output), reduction="none"))


def huber(output: Tensor, batch: dict[str, Tensor], progress: Any, *, delta: float = 1.0) -> Tensor:
    return mean_of_members(F.huber_loss(output.float(), spread(batch["target"], output), reduction="none", delta=delta))


def l1(output: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:
    return mean_of_members(F.l1_loss(output.float(), spread(batch["target"], output), reduction="none"))


def spread(target: Tensor, output: Tensor) -> Tensor:
    return target[:, None].expand_as(output) if output.dim() > 1 else target


def mean_of_members(values: Tensor) -> Tensor:
    return values.mean(1) if values.dim() > 1 else values
