"""Masked training by several processes, `torchrun --nproc_per_node 2 ddp_run.py DIRECTORY`, and the same in one.

Every case leaves `DIRECTORY/<case>/<process>.safetensors`, its final weights, and `<process>.json`, what was logged or
raised. `run_case` is also called by the tests themselves, in one process, with the same rows in each optimizer step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from adapters.wide_models import WIDE
from safetensors.torch import save_file
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparse_ft.adapters import prepare_perp
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights
from sparse_ft.training import MaskCallback, latest_complete_checkpoint

CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
RESUMED_AT = 2


@dataclass(frozen=True)
class Case:
    """What is trained, `"full"` or a method of PERP, and how."""

    method: str = "full"
    dropout: float = 0.0
    masks_from_zeros: bool = False
    family: str | None = None  # one of `WIDE` in place of a Llama with biases
    quantised: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.3}
SAVING = {"save_strategy": "steps", "save_steps": RESUMED_AT}
CASES = {
    "full": Case(masks_from_zeros=True, arguments={"max_grad_norm": 0.5}),
    "full, adafactor": Case(arguments={"optim": "adafactor"}),
    "full, two micro-batches": Case(arguments={"gradient_accumulation_steps": 2, **SGD}),
    "mask_lora": Case("mask_lora"),
    "mask_lora, checkpointing": Case("mask_lora", arguments={CHECKPOINTING: True}),
    "mask_lora, head and norms": Case("mask_lora+head+norms"),
    "scale_lora": Case("scale_lora"),
    "lora_prune and biases": Case("lora_prune+biases"),
    "norms": Case("norms"),
    "biases and embeddings": Case("biases+embeddings"),
    "conv1d": Case("mask_lora+norms", family="gpt2"),
    "experts": Case("mask_lora", family="mixtral"),
    "resumed": Case(dropout=0.1, arguments=SAVING),
    "resumed adapter": Case("mask_lora+norms", dropout=0.1, arguments=SAVING),
}
if find_spec("bitsandbytes"):
    CASES["4 bits"] = Case("mask_lora+norms", family="llama", quantised=True)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random token ids, the same in every process."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 64, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def sparse_model(case: Case, seed: int = 0) -> tuple[Any, MaskSet]:
    """A small model, pruned to 60%, ready for what the case trains of it, and its masks."""
    torch.manual_seed(seed)
    model = dense_model(case)
    weights = named_weights(model)
    scores = {target.name: weights[target.name].detach().abs() for target in find_targets(model)}
    masks = MaskSet.from_scores(scores, sparsity=0.6).apply_(model)
    model = in_4_bits(model) if case.quantised else model
    return model if case.method == "full" else prepare_perp(model, case.method, masks, r=4), masks


def dense_model(case: Case) -> Any:
    """A small Llama with biases, or the case's own family without dropout."""
    if case.family is None:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            attention_dropout=case.dropout, attention_bias=True, mlp_bias=True, bos_token_id=0, eos_token_id=1,
            pad_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    model = WIDE[case.family]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def in_4_bits(model: Any) -> Any:
    """The model as it is loaded in 4 bits, the head apart."""
    with tempfile.TemporaryDirectory() as directory:
        # not by save_pretrained, which writes in process 0 only
        save_file(model.state_dict(), Path(directory) / "model.safetensors", metadata={"format": "pt"})
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
        for settings in (model.config, model.generation_config):
            settings.save_pretrained(directory)
        return type(model).from_pretrained(directory, quantization_config=config)


class StopAt(TrainerCallback):
    """Stands for a run that is cut off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def make_trainer(
    case: Case, model: PreTrainedModel, directory: Path, callbacks: list[Any], *, together: int = 1, **more: Any
) -> Trainer:
    """A Trainer over the rows; `together` multiplies the micro-batches per step, for fewer processes."""
    arguments: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **case.arguments,
        **more,
    }
    arguments["gradient_accumulation_steps"] = together * arguments.get("gradient_accumulation_steps", 1)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **arguments),
        train_dataset=Rows(),
        callbacks=callbacks,
    )


def run_case(name: str, directory: Path, **more: Any) -> tuple[Any, MaskSet, list[dict[str, float]]]:
    """Train one case in this process, which may be one of several: the model, its masks, and the logs.

    Only process 0 has the right weights in the first case, and none has the masks.
    """
    case, seed = CASES[name], 0
    if case.masks_from_zeros and not more:
        seed = int(os.environ.get("RANK", "0"))
    model, masks = sparse_model(case, seed)
    callback = MaskCallback(None if case.masks_from_zeros else masks)
    trainer = make_trainer(case, model, directory, [] if case.quantised else [callback], **more)
    trainer.train()
    assert callback.masks is not None
    return model, callback.masks, trainer.state.log_history


def run_resumed(name: str, directory: Path) -> tuple[Any, MaskSet]:
    """Train a case up to its checkpoint, and again from there to the end."""
    case = CASES[name]
    for stop in ([StopAt(RESUMED_AT)], []):
        model, masks = sparse_model(case)
        found = latest_complete_checkpoint(directory)
        assert (found is None) == bool(stop)
        trainer = make_trainer(case, model, directory, [MaskCallback(masks), *stop])
        trainer.train(resume_from_checkpoint=found)
    return model, masks


def refusals(directory: Path, rank: int) -> dict[str, str]:
    """What each process hears when the masks differ between them, and when a pruned weight lives at a save."""
    heard = {}
    case = CASES["full, adafactor"]
    for name, seed, callbacks in (
        ("other masks", rank, []),
        ("revived", 0, [Vandal()]),
    ):
        model, masks = sparse_model(case, seed)
        saving = {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(case, model, directory / name, [MaskCallback(masks), *callbacks], **saving)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            heard[name] = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()
    return heard


class Vandal(TrainerCallback):
    """Revives a weight in the second step, after MaskCallback has looked and before the Trainer saves."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if state.global_step == 2:
            weight = named_weights(model)["model.layers.0.mlp.up_proj.weight"].detach()
            weight[weight == 0] = 1e-3


def leave(directory: Path, rank: int, model: Any, more: dict[str, Any]) -> None:
    """Write what one process ended with."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    save_file(weights, directory / f"{rank}.safetensors")
    (directory / f"{rank}.json").write_text(json.dumps(more))


def main(directory: Path) -> None:
    """Every case in turn."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, case in CASES.items():
        model, masks, logs = run_case(name, directory / name / "run")
        leave(directory / name, rank, model, {"masks": masks.digest(), "logs": logs})
        if case.dropout:
            again = f"{name}, again"
            model, masks = run_resumed(name, directory / again / "run")
            leave(directory / again, rank, model, {"masks": masks.digest()})
    heard = refusals(directory / "refusals", rank)
    (directory / "refusals" / f"{rank}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
