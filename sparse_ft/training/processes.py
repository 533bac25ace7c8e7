"""Several processes with a whole copy of the model each (DistributedDataParallel): what they must agree on, and when.

Gradients are masked on every process before they are averaged, and the masks are the same everywhere, so the average
is masked as well and nothing is communicated per step. Once, when training begins, the processes compare the digests of
their masks; at each save they wait for each other twice, so that the masks beside a checkpoint say that every process
has written its part of it.

Example:
    >>> check_strategy(training_arguments)           # raises for DeepSpeed, FSDP, Megatron-LM and tensor parallelism
    >>> check_same_masks(masks, training_arguments)

Limits: the Trainer looks for unused parameters in every step, of a PEFT model also under reentrant activation
checkpointing, where torch cannot: set `ddp_find_unused_parameters` to False where `uses_every_parameter` says so, as
`sparse-ft retrain` does. A model whose masks are taken from its zeros is that of
process 0, whose weights DDP gives to all.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather
from torch import nn
from transformers import TrainingArguments

from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name

# What `accelerate launch` sets in the processes it starts -> what it then does with the model.
_LAUNCHED_WITH = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_WHOLE_MODEL = ("NO", "MULTI_")  # accelerate's distributed types that leave every process the whole model


def check_strategy(args: TrainingArguments) -> None:
    """Refuse what cuts the model into pieces. It can be called as soon as there are `TrainingArguments`.

    Raises:
        ValueError: for DeepSpeed, FSDP, Megatron-LM, tensor or pipeline parallelism.
    """
    strategy = _sharding(args)
    if strategy is not None:
        raise ValueError(
            f"Masked training keeps a whole copy of the model in every process, but these {args.world_size} processes "
            f"run under {strategy}, which shards it; start with plain `python`, or with `accelerate launch "
            f"--config_file launch/ddp.yaml`."
        )


def _sharding(args: TrainingArguments) -> str | None:
    """What shards the model, None if nothing does."""
    if getattr(args, "deepspeed", None):
        return "DeepSpeed"
    if getattr(args, "fsdp", None):
        return "FSDP"
    for variable, name in _LAUNCHED_WITH.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return name
    # The Accelerator knows best, once there is one; before it, only the process group does.
    state = AcceleratorState() if is_initialized() else PartialState()
    kind = str(state.distributed_type.value)
    return None if kind.startswith(_WHOLE_MODEL) else kind


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which this process holds only slices, as tensor parallelism makes it when it is loaded.

    Raises:
        ValueError: naming the first parameter that is sharded.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):  # a DTensor
            raise ValueError(
                f"'{canonical_name(name)}' is sharded among processes ({parameter.placements}); load the whole model "
                f"in every process, without tp_plan or a device mesh."
            )


def uses_every_parameter(model: nn.Module) -> bool:
    """Whether each step gives every trained parameter a gradient, so that DDP need not look for those without.

    Not so with experts, of which a batch may reach some only, and where whole layers are dropped at random.
    """
    names = (f"{name} {type(module).__name__}".lower() for name, module in model.named_modules())
    config = getattr(model, "config", None)
    drops = any(getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"))
    return not drops and not any("expert" in name for name in names)


def check_same_masks(masks: MaskSet, args: TrainingArguments) -> None:
    """Check that all processes hold the same masks: one exchange of 32 bytes.

    Raises:
        ValueError: on every process, if two processes differ.
    """
    if args.world_size == 1:
        return
    mine = torch.frombuffer(bytearray.fromhex(masks.digest()), dtype=torch.uint8).to(args.device)
    every = [bytes(row.tolist()).hex() for row in gather(mine[None]).cpu()]
    for process, digest in enumerate(every):
        if digest != every[0]:
            raise ValueError(
                f"Process {process} has masks with digest {digest[:12]} but process 0 has {every[0][:12]}; prune with "
                f"the same data and seed in every process, or load the masks from one file."
            )


def wait_for_everyone() -> None:
    """Return when every process has come here; at once if there is only one."""
    PartialState().wait_for_everyone()
