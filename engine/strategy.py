"""From settings to an Accelerator: devices, processes, precision, DDP or DeepSpeed ZeRO. The TOML decides, not the launcher."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from engine import process, state
from engine.config import UserError
from engine.evaluate import to_device
from engine.settings import Plan, Settings

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start(settings: Settings, plan: Plan) -> Any:
    """The Accelerator of these settings, the same under `python`, `accelerate launch` and `torchrun`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    # A search calls this again and again in one process; Accelerate would refuse another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()

    cuda = torch.cuda.is_available()
    if settings.train.precision == "fp16" and not cuda:
        raise UserError('train.precision = "fp16": needs a GPU; use "bf16" or "fp32"')
    overrule_launcher(settings)
    if plan.processes > 1 and not torch.distributed.is_initialized():
        process.join("nccl" if cuda else "gloo")
    common = {"mixed_precision": MIXED[settings.train.precision], "gradient_accumulation_steps": plan.accumulation}
    if uses_zero(settings):
        from accelerate.utils import DeepSpeedPlugin

        prepare_environment()
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(settings, plan))
        # Without a backend by name every rank on a CPU believes that it is alone; `cpu=True` would switch DeepSpeed off.
        backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend], **common)
    else:
        # `cpu=True`, since with a gloo backend alone Accelerate starts the processes and forgets the DDP wrapper.
        accelerator = Accelerator(cpu=not cuda, **common)
    if accelerator.num_processes != plan.processes:
        raise RuntimeError(f"{plan.processes} processes were launched, Accelerate sees {accelerator.num_processes}")
    if settings.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # else DeepSpeed's empty buckets take 2 GB a rank
        torch.backends.cudnn.benchmark = False
    if cuda and plan.processes == 1 and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        print(f"one of {torch.cuda.device_count()} GPUs is used; all: torchrun --nproc_per_node {torch.cuda.device_count()} train.py …")
    return accelerator


def uses_zero(settings: Settings) -> bool:
    return settings.strategy.name != "ddp"


def overrule_launcher(settings: Settings) -> None:
    """Launchers pass their flags and `accelerate config`'s file as environment variables; where they differ, say so."""
    wanted = {
        "ACCELERATE_USE_DEEPSPEED": str(uses_zero(settings)).lower(),
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_MEGATRON_LM": "false",
        "ACCELERATE_MIXED_PRECISION": MIXED[settings.train.precision],
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    for key, value in wanted.items():
        given = os.environ.get(key, value)
        # accelerate launch always passes a precision: "no" is its default, not a wish.
        if given.lower() != value and given.lower() != "no":
            key_name = key.removeprefix("ACCELERATE_").lower()
            process.say(f"the launcher says {key_name} = {given}; the settings win: {settings.strategy.name}, {settings.train.precision}")
        os.environ[key] = value
    if uses_zero(settings):
        os.environ["ACCELERATE_USE_CPU"] = "false"


def prepare_environment() -> None:
    """What DeepSpeed expects of a launcher, where there was none; and its compiled parts in a folder of this environment."""
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # A killed build leaves a lock on which later runs hang in silence: keep it apart from other projects' builds.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.environ.get("VIRTUAL_ENV") or sys.prefix, "torch_extensions"))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed's own calls of torch, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    if not torch.cuda.is_available():
        # Otherwise DeepSpeed compiles a shared-memory collective of its own at the first use; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(settings: Settings, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's own config. What changes the last bits of a result (sub_group_size, the threshold) is set explicitly."""
    name, train = settings.strategy.name, settings.train
    zero: dict[str, Any] = {"stage": 3 if name.startswith("zero3") else 2, "contiguous_gradients": True, "overlap_comm": False}
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if name.endswith("offload"):
        zero["offload_optimizer"] = place
    if zero["stage"] == 3:
        zero |= {"sub_group_size": 10**9, "stage3_param_persistence_threshold": 10_000}
        if name.endswith("offload"):
            zero["offload_param"] = place
    ours = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        # True by default under offload: the optimizer is then rebuilt as DeepSpeedCPUAdam with plain L2 instead of AdamW.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
        "steps_per_print": 10**12,
    }
    return deep_merge(ours, settings.strategy.deepspeed)


def deep_merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


@contextmanager
def building(settings: Settings, plan: Plan) -> Iterator[None]:
    """In it the model is built: under strategy.sharded_init each rank keeps only its share of every weight."""
    if not settings.strategy.sharded_init:
        build_whole(settings)
    with sharded(settings, plan) if settings.strategy.sharded_init else nullcontext():
        yield
    build_whole(settings)


def build_whole(settings: Settings) -> None:
    """Accelerate told transformers of ZeRO-3, which then shards every model that it makes in this process: also one for inference."""
    if uses_zero(settings):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def sharded(settings: Settings, plan: Plan) -> Any:
    if not settings.strategy.name.startswith("zero3"):
        raise UserError(f'strategy.sharded_init = true: needs strategy.name = "zero3" or "zero3-offload", not "{settings.strategy.name}"')
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config(settings, plan))


def prepare(accelerator: Any, settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as the strategy wants them: moved, wrapped, sharded, compiled."""
    sixteen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision) if uses_zero(settings) else None
    if sixteen:
        # DeepSpeed keeps the weights in 16 bits, buffers in 32, and converts nothing: a product of the two would be refused.
        model.forward = torch.autocast(accelerator.device.type, sixteen)(model.forward)
    wrapped = torch.compile(model) if settings.train.compile else model
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    if sixteen:
        wrapped.register_forward_pre_hook(lambda _, inputs: tuple(halved(batch, sixteen) for batch in inputs))
    if uses_zero(settings):
        running = list(state.buffers(model).values())
        wrapped.register_forward_pre_hook(lambda *_: share(running) if not model.training else None)
    return wrapped, optimizer


def share(buffers: list[torch.Tensor]) -> None:
    """Running means are each rank's own under ZeRO: scores, as checkpoints, go by rank 0's. DDP sees to that by itself."""
    for buffer in buffers if process.world_size() > 1 else ():
        torch.distributed.broadcast(buffer, 0)


def halved(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for key, value in batch.items()}


def settle_buckets(accelerator: Any, model: nn.Module, some_batch: Callable[[], dict[str, Any]]) -> None:
    """One backward of zero, so that DDP has rebuilt its buckets before the first step and after every resume.

    It does so after the first backward, in the order in which gradients arrived; with three or more ranks the new order of
    summation changes last bits, and a resumed run would differ from the straight one.
    """
    if accelerator.num_processes > 2 and isinstance(model, nn.parallel.DistributedDataParallel):
        before = [buffer.clone() for buffer in model.buffers()]
        (model(to_device(some_batch(), accelerator.device)).sum() * 0).backward()
        model.zero_grad()
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def accumulating(accelerator: Any, model: nn.Module) -> Any:
    """Context of one micro-step, forward included: gradients are shared among ranks only in the last one of a step."""
    return accelerator.accumulate(model) if accelerator.gradient_accumulation_steps > 1 else nullcontext()


def plain(accelerator: Any) -> bool:
    """Whether torch alone does the step: no ZeRO, no fp16. Then Accelerate's wrappers would only cost, 0.2 ms a step."""
    return accelerator.scaler is None and accelerator.state.deepspeed_plugin is None


def backward(accelerator: Any, loss: torch.Tensor) -> None:
    if plain(accelerator) and accelerator.gradient_accumulation_steps == 1:
        loss.backward()
    else:
        accelerator.backward(loss)


def update(accelerator: Any, model: nn.Module, optimizer: Any, clip: float) -> torch.Tensor | None:
    """Clip and step once the gradients are complete. Returns their norm before clipping, where it was computed.

    Under DeepSpeed `accelerator.backward` has already clipped and stepped.
    """
    if not accelerator.sync_gradients:
        return None
    if plain(accelerator):
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None
        optimizer.optimizer.step()
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return norm
    if hasattr(model, "get_global_grad_norm"):
        return torch.as_tensor(model.get_global_grad_norm() or 0.0)
    norm = accelerator.clip_grad_norm_(model.parameters(), clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    return norm
