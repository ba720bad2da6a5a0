"""What a rank holds of weights and moments, read out and put back by parameter name, under every strategy.

Weights are named as in the model's state_dict, moments `optim.<key>.<parameter>`. Under ZeRO-3 each rank gives a flat piece of
ceil(elements / processes); under DDP and ZeRO-2 rank 0 gives whole tensors. So another number of processes, or another
strategy, is a matter of concatenating and cutting.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine import process
from engine.tensors import StoredTensors


@dataclass
class State:
    """This rank's tensors (views: copy before the next step), and what is not a tensor."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """true shapes of what is in flat pieces, one a rank"""
    scaler: dict[str, Any] | None = None
    """the fp16 loss scale"""


def moments_form(optimizer: Any) -> str:
    """What moments an optimizer keeps: one of the same form goes on with them. All Adams keep the same."""
    inner = optimizer.optimizer
    inner = inner if isinstance(inner, torch.optim.Optimizer) else inner.optimizer  # ZeRO's own is around it
    name = {"AdamW": "Adam", "FusedAdam": "Adam", "DeepSpeedCPUAdam": "Adam"}.get(type(inner).__name__, type(inner).__name__)
    return " with ".join([name, *(flag for flag in ("amsgrad", "centered", "momentum") if inner.defaults.get(flag))])


def zero_stage(model: Any) -> int:
    return model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else 0


def aliases(model: nn.Module) -> dict[str, str]:
    """Tied parameters: every further name -> the first."""
    first: dict[int, str] = {}
    pairs = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            pairs[name] = first[id(parameter)]
    return pairs


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What state_dict holds beside parameters, such as the running means of BatchNorm."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = dict(model.named_buffers())
    return {name: kept[name] for name in model.state_dict() if name not in parameters and name in kept}


def capture(accelerator: Any, wrapped: Any, model: nn.Module, optimizer: Any) -> State:
    """Collective: every rank calls it, after a whole optimizer step."""
    stage = zero_stage(wrapped)
    read = {0: capture_whole, 2: capture_zero2, 3: capture_zero3}[stage]
    state = read(model, optimizer)
    if process.rank() == 0:
        state.weights |= buffers(model)
    scaler = fp16_scaler(accelerator, wrapped)
    if scaler is not None:
        state.scaler = scaler.state_dict() if stage == 0 else numbers(vars(scaler))
    return state


def restore(accelerator: Any, wrapped: Any, model: nn.Module, optimizer: Any, stored: StoredTensors, scale: Any) -> None:
    """Put back what `capture` gave, before the first forward. Collective under ZeRO."""
    stage = zero_stage(wrapped)
    write = {0: restore_whole, 2: restore_zero2, 3: restore_zero3}[stage]
    with torch.no_grad():
        write(model, optimizer, stored)
        for name, buffer in buffers(model).items():
            buffer.copy_(stored.full(name))
    scaler = fp16_scaler(accelerator, wrapped)
    if scaler is not None and scale is not None:
        # torch and DeepSpeed call the scale by other names; the rest is each one's own.
        if stage == 0:
            scaler.load_state_dict(scale if "scale" in scale else scaler.state_dict() | {"scale": scale["cur_scale"]})
        else:
            vars(scaler).update(scale if "cur_scale" in scale else {"cur_scale": scale["scale"]})


def fp16_scaler(accelerator: Any, wrapped: Any) -> Any:
    if zero_stage(wrapped) == 0:
        return accelerator.scaler
    return wrapped.optimizer.loss_scaler if wrapped.fp16_enabled() else None


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float | bool)}


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


# Whole copies: one process and DDP


def capture_whole(model: nn.Module, optimizer: Any) -> State:
    state = State()
    if process.rank() > 0:
        return state
    state.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in trained(model):
        for key, value in optimizer.optimizer.state.get(parameter, {}).items():
            if value is not None:
                state.moments[f"optim.{key}.{name}"] = torch.as_tensor(value)
    return state


def restore_whole(model: nn.Module, optimizer: Any, stored: StoredTensors) -> None:
    inner, keys = optimizer.optimizer, moment_keys(stored)
    names = {}
    for name, parameter in model.named_parameters():
        parameter.copy_(stored.full(name))
        names[id(parameter)] = name
    given = inner.state_dict()
    for index, parameter in enumerate(parameter for group in inner.param_groups for parameter in group["params"]):
        full = {key: f"optim.{key}.{names[id(parameter)]}" for key in keys}
        given["state"][index] = {key: stored.full(name) for key, name in full.items() if name in stored.places}
    # The optimizer itself knows on which device and in which precision each of its tensors belongs.
    inner.load_state_dict(given)


def moment_keys(stored: StoredTensors) -> set[str]:
    return {name.split(".")[1] for name in stored.places if name.startswith("optim.")}


def scalar_moments(stored: StoredTensors) -> list[str]:
    """A step, or NAdam's product: one number for all elements. (A parameter's moments have more, but for those without a dimension.)"""
    more = {name.split(".")[1] for name in stored.places if name.startswith("optim.") and len(stored.spec(name)[1]) > 0}
    return [name for name in stored.places if name.startswith("optim.") and name.split(".")[1] not in more]


# ZeRO-2: whole weights on every rank, fp32 masters and moments in flat partitions that cut across parameters


def capture_zero2(model: nn.Module, optimizer: Any) -> State:
    """Rank 0 gets whole tensors. DeepSpeed's public access refuses this stage; its mapping of fragments serves."""
    zero = optimizer.optimizer
    state = State()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            state.weights[name] = parameter.detach()
            continue
        flat = flat_of(zero, parameter)
        state.weights[name] = gathered(parameter, flat)
        for key, value in moments_of(zero, flat).items():
            whole = value.clone() if value.dim() == 0 else gathered(parameter, value)
            state.moments[f"optim.{key}.{name}"] = whole
    return state if process.rank() == 0 else State()


def flat_of(zero: Any, parameter: nn.Parameter) -> torch.Tensor:
    for index, group in enumerate(zero.bit16_groups):
        if any(member is parameter for member in group):
            return zero.single_partition_of_fp32_groups[index]
    raise KeyError("a trained parameter without a ZeRO group")


def moments_of(zero: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    state = zero.optimizer.state[flat]
    return {key: value if torch.is_tensor(value) else torch.tensor(float(value)) for key, value in state.items()}


def gathered(parameter: nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
    """The whole fp32 tensor from every rank's fragment of `flat`. Adding zeros is exact."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping = parameter._hp_mapping
    if mapping is not None:
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole[there.start : there.start + there.numel] = flat.detach()[here.start : here.start + here.numel].to(whole.device)
    if process.world_size() > 1:
        dist.all_reduce(whole)
    return whole.reshape(parameter.shape)


def restore_zero2(model: nn.Module, optimizer: Any, stored: StoredTensors) -> None:
    zero = optimizer.optimizer
    seed_moments(zero.optimizer, zero.single_partition_of_fp32_groups, stored)
    for name, parameter in model.named_parameters():
        whole = stored.full(name)
        parameter.data.copy_(whole)
        if parameter.requires_grad:
            flat = flat_of(zero, parameter)
            put_fragment(parameter, flat, whole)
            for key, value in zero.optimizer.state[flat].items():
                if torch.is_tensor(value) and value.dim() and f"optim.{key}.{name}" in stored.places:  # not where it was frozen until now
                    put_fragment(parameter, value, stored.full(f"optim.{key}.{name}"))


def put_fragment(parameter: nn.Parameter, flat: torch.Tensor, whole: torch.Tensor) -> None:
    mapping = parameter._hp_mapping
    if mapping is not None:
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat.data[here.start : here.start + here.numel] = whole.reshape(-1)[there.start : there.start + there.numel].to(flat.device)


def seed_moments(inner: Any, flats: Any, stored: StoredTensors) -> None:
    """ZeRO's optimizers make their state at the first step; make it now, so that there is something to restore into."""
    scalars = {name.split(".")[1]: stored.full(name) for name in scalar_moments(stored)}
    whole_number = not type(inner).__module__.startswith("torch.")
    for flat in flats:
        # DeepSpeed's Adam indexes with its step, torch's fused kernels want a tensor beside the weights.
        state = {key: int(value) if whole_number else value.to(step_device(inner, flat), copy=True) for key, value in scalars.items()}
        inner.state[flat] = state | {key: torch.zeros_like(flat, requires_grad=False) for key in moment_keys(stored) - scalars.keys()}


def step_device(inner: Any, flat: torch.Tensor) -> torch.device:
    return flat.device if inner.defaults.get("fused") or inner.defaults.get("capturable") else torch.device("cpu")


# ZeRO-3: every rank holds a flat piece of every parameter


def capture_zero3(model: nn.Module, optimizer: Any) -> State:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    zero = optimizer.optimizer
    state = State()
    some = zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]]
    for name, parameter in model.named_parameters():
        master = safe_get_local_fp32_param(parameter) if parameter.requires_grad else parameter.ds_tensor
        state.weights[name] = master.detach().reshape(-1)
        state.shapes[name] = list(parameter.ds_shape)
        if not parameter.requires_grad:
            continue
        for key, value in some.items():
            full = f"optim.{key}.{name}"
            if torch.is_tensor(value) and value.dim():
                state.moments[full] = safe_get_local_optimizer_state(parameter, key).reshape(-1)
                state.shapes[full] = list(parameter.ds_shape)
            elif process.rank() == 0:
                state.moments[full] = torch.as_tensor(value, dtype=torch.float32)
    return state


def restore_zero3(model: nn.Module, optimizer: Any, stored: StoredTensors) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    zero = optimizer.optimizer
    rank, processes = process.rank(), process.world_size()
    seed_moments(zero.optimizer, zero.fp32_partitioned_groups_flat, stored)
    keys = moment_keys(stored) - {name.split(".")[1] for name in scalar_moments(stored)}
    for name, parameter in model.named_parameters():
        piece = stored.piece(name, rank, processes)
        # Without this line the first forward would use the weights of before, and nothing would say so.
        parameter.ds_tensor.data.copy_(piece)
        if parameter.ds_status.name == "AVAILABLE":
            parameter.data.copy_(stored.full(name))
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, piece)
            for key in (key for key in keys if f"optim.{key}.{name}" in stored.places):
                safe_set_local_optimizer_state(parameter, stored.piece(f"optim.{key}.{name}", rank, processes), key)
