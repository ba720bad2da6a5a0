"""What any model of transformers can do here: be found by name or folder, frozen in part, adapted by LoRA, and exported for from_pretrained."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import ModelConfig, UserError

PREFIX = "net."
"""of the weights' names here; the files of best/ have transformers' own names"""


class Pretrained(ModelConfig):
    pretrained: str = ""
    """a transformers model, by name or folder; empty: from scratch, by the sizes"""
    freeze: int = Field(0, ge=-1)
    """layers that are not trained, counted from the input, embeddings included; -1: all but the head"""
    lora: int = Field(0, ge=0)
    """rank of low-rank adapters (LoRA), trained in place of the model's own weights and added to them in best/; 0 = off"""
    gradient_checkpointing: bool = False
    """compute activations twice rather than keep them: less memory, a third slower"""
    attention: str = "sdpa"
    """"sdpa", "eager", "flash_attention_2" or what else transformers takes"""


def build(auto: str, config: Pretrained, info: Info, scratch: Any = None, **changes: Any) -> nn.Module:
    """A model of the class `auto` of transformers, such as "AutoModelForSequenceClassification", in fp32.

    For inference it has the shape in info.folder, else that and the weights of config.pretrained, or of `scratch` (a transformers
    config) at random. `changes` are of its transformers config. Raises UserError.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # a table of the head's new weights, from every process
    transformers.utils.logging.disable_progress_bar()
    how = {"attn_implementation": config.attention, "dtype": torch.float32}
    factory = getattr(transformers, auto)
    try:
        if info.folder or not config.pretrained:
            shape = transformers.AutoConfig.from_pretrained(info.folder) if info.folder else scratch
            net = factory.from_config(shape, **how)
        else:
            net, found = factory.from_pretrained(config.pretrained, **how, **changes, ignore_mismatched_sizes=True, output_loading_info=True)
            check(config, net, found)
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"model.pretrained = {config.pretrained!r}: cannot be loaded: {said}; give the name or folder of a model") from None
    if config.gradient_checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze:
        freeze(net, config)
    if config.lora and not info.folder:
        adapt(net, config)
    return net


def check(config: Pretrained, net: nn.Module, found: dict[str, Any]) -> None:
    """Only a head may be new."""
    body = f"{net.base_model_prefix}."
    wrong = sorted(name for name in [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])] if name.startswith(body))
    # A masked language model is saved without the pooler that a classifier has.
    if wrong := [name for name in wrong if "pooler" not in name]:
        raise UserError(f"model.pretrained = {config.pretrained!r}: lacks {wrong[0]} and {len(wrong) - 1} more weights; is it of another kind?")


def freeze(net: nn.Module, config: Pretrained) -> None:
    body = getattr(net, net.base_model_prefix)
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == net.config.num_hidden_layers]
    if config.freeze > net.config.num_hidden_layers or (config.freeze > 0 and not stacks):
        raise UserError(f"model.freeze = {config.freeze}: the model has {net.config.num_hidden_layers} layers; -1 freezes all of them")
    last = None if config.freeze < 0 else list(stacks[0][config.freeze - 1].parameters())[-1]
    for parameter in body.parameters():
        parameter.requires_grad_(False)
        if parameter is last:
            return


def adapt(net: nn.Module, config: Pretrained) -> None:
    """Adapters beside the linear layers below the head. All else is frozen but a head that is new."""
    try:
        import peft
    except ImportError:
        raise UserError("model.lora: needs the packages of requirements-extra.txt: pip install peft") from None
    from transformers.pytorch_utils import Conv1D

    body = f"{net.base_model_prefix}."
    layers = [(name, module) for name, module in net.named_modules() if name.startswith(body) and isinstance(module, nn.Linear | Conv1D)]
    # A square matrix does not tell which way round it is kept, which `merged` must know.
    linear = [name for name, module in layers if isinstance(module, nn.Linear) or len({*module.weight.shape}) == 2]
    peft.inject_adapter_in_model(peft.LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=linear), net)
    for name, parameter in net.named_parameters():
        if not name.startswith(body) and net.get_output_embeddings() is None:
            parameter.requires_grad_(True)


Recipes = dict[str, tuple[list[str], Callable[..., Tensor]]]


def exported(config: Pretrained, names: list[str]) -> Recipes:
    """Weights as transformers has them: their names without PREFIX, adapters added to the layers that they adapt."""
    recipes: Recipes = {}
    for name in names:
        stem, layer, end = name.partition("base_layer.")
        adapters = [f"{stem}lora_{letter}.default.weight" for letter in "BA"]
        if layer and end == "weight" and adapters[0] in names:
            recipes[f"{stem}{end}".removeprefix(PREFIX)] = ([name, *adapters], merged)
        elif ".lora_" not in name:
            recipes[f"{stem}{end}".removeprefix(PREFIX)] = ([name], lambda tensor: tensor)
    return recipes


def merged(weight: Tensor, second: Tensor, first: Tensor) -> Tensor:
    """weight + 2 BA. GPT-2 keeps its matrices the other way round."""
    change = 2.0 * (second @ first)
    return weight + (change if change.shape == weight.shape else change.T)
