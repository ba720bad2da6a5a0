"""Optimizers by name, what is not decayed, and the learning rate as a function of the step."""

import inspect
import math
import os
import shutil
import sys
from typing import Any

import torch
from torch import nn

from engine import process
from engine.config import UserError, suggestion
from engine.settings import Optim, Settings


def lr_at(step: int, optim: Optim, total_steps: int) -> float:
    """Learning rate of a step, counted from 0. The warm-up's last step is the first with the full rate."""
    warmup = round(optim.warmup_ratio * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    share = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * share)) if optim.schedule == "cosine" else 1 - share
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * fall)


def set_lr(optimizer: Any, lr: float) -> None:
    """A group's own "lr_scale" (a frozen-then-thawed encoder, say) multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; norms, biases and embeddings without. Frozen parameters are in neither."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    plain = set(getattr(model, "not_decayed", ()))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("model: it has no parameter to train; unfreeze some layers")
    decayed = [p for name, p in trained if dimensions(p) >= 2 and id(p) not in embeddings and name not in plain]
    chosen = {id(p) for p in decayed}
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def dimensions(parameter: nn.Parameter) -> int:
    # A parameter of a model that was built in shards is flat and empty here; its true shape stands beside.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build(model: nn.Module, settings: Settings, model_file: Any) -> torch.optim.Optimizer:
    """The optimizer of the settings. Raises UserError for an unknown name or option."""
    name, optim = settings.optim.name, settings.optim
    groups = parameter_groups(model, optim.weight_decay)
    if callable(own := getattr(model_file, name, None)):
        return own(groups, lr=optim.lr, **checked(own, optim.options))
    zero, offload = settings.strategy.name != "ddp", settings.strategy.name.endswith("offload")
    cuda = torch.cuda.is_available()
    if name == "auto":
        # Fused AdamW on a CPU, offloaded or not: the fastest of the three measured there, and it needs no compiler.
        name = "cpu_adam" if cuda and offload else "fused_adam" if cuda and zero else "AdamW"
        if name != "AdamW" and (missing := missing_programs(name)):
            process.say(f'optim.name = "auto": {" and ".join(missing)} not found, which compile {name}; AdamW of torch is taken')
            name = "AdamW"
        fused = {"fused": True} if name == "AdamW" and "fused" not in optim.options else {}
    else:
        fused = {}
    if name in ("cpu_adam", "fused_adam"):
        factory = deepspeed_optimizer(name)
    else:
        factory = torch_optimizer(name)
    options = fused | checked(factory, optim.options)
    if "weight_decay" not in inspect.signature(factory).parameters:
        groups = [{"params": group["params"]} for group in groups]
    try:
        return factory(groups, lr=optim.lr, **options)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(f"optim.name = {optim.name!r}, optim.options = {optim.options}: refused: {error}") from None


def torch_optimizer(name: str) -> Any:
    known = {key for key, value in vars(torch.optim).items() if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)}
    # LBFGS calls the model again and again within one step; SparseAdam takes only sparse gradients, which no linear layer gives.
    known -= {"Optimizer", "LBFGS", "SparseAdam"}
    if name not in known:
        raise UserError(f"optim.name = {name!r}: no such optimizer{suggestion(name, known | {'auto', 'fused_adam', 'cpu_adam'})}")
    return getattr(torch.optim, name)


def missing_programs(name: str) -> list[str]:
    """What compiles DeepSpeed's optimizers and is not here. ninja lies beside this Python where it was installed for it."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    programs = [os.environ.get("CXX", "g++"), "ninja", *([os.path.join(CUDA_HOME or "", "bin", "nvcc")] if name == "fused_adam" else [])]
    return [os.path.basename(program) for program in programs if shutil.which(program, path=beside) is None]


def deepspeed_optimizer(name: str) -> Any:
    """DeepSpeed's compiled Adam for the CPU or the GPU, built at its first use (about a minute)."""
    if missing := missing_programs(name):
        raise UserError(f'optim.name = "{name}": {" and ".join(missing)} not found, which compile it; install or use "AdamW"')
    process.say(f"{name} is compiled at its first use, into {os.environ.get('TORCH_EXTENSIONS_DIR', 'the cache of torch')}")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return DeepSpeedCPUAdam if name == "cpu_adam" else FusedAdam


def checked(factory: Any, options: dict[str, Any]) -> dict[str, Any]:
    known = set(inspect.signature(factory).parameters) - {"params", "lr", "weight_decay", "model_params"}
    for key in options:
        if key not in known:
            raise UserError(f"optim.options.{key}: {factory.__name__} has no such argument{suggestion(key, known)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
