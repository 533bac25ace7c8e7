"""The teacher: loaded, frozen, and checked against the student before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.distillation.config import DistillationConfig
from sparse_ft.distillation.stacks import bare_model, find_stacks, predicts_next
from sparse_ft.models import load_config, load_model, model_class

_Model = TypeVar("_Model", bound=nn.Module)
_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(config: DistillationConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model that `config.teacher` names, frozen and in eval mode.

    Args:
        config: its teacher, teacher_dtype, teacher_device and teacher_quantization.
        device: where it goes if the config does not say.

    Raises:
        ValueError: no teacher is named, or its dtype is unknown.
        FileNotFoundError: there is no model.

    Example:
        >>> teacher = load_teacher(DistillationConfig(kl_weight=1, teacher="path/to/dense"))
    """
    if config.teacher is None:
        raise ValueError("No teacher was given: name a checkpoint in DistillationConfig(teacher=...), or hand one in.")
    if config.teacher_dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ValueError(f"teacher_dtype is {config.teacher_dtype!r}, but it can be {known}: choose one of them.")
    device = device if config.teacher_device is None else config.teacher_device
    dtype: Any = _DTYPES[config.teacher_dtype]
    if config.teacher_quantization is None:
        return freeze(load_model(config.teacher, dtype=dtype, device=device))
    return freeze(_load_quantised(config, dtype, device))


def _load_quantised(config: DistillationConfig, dtype: Any, device: torch.device | str) -> PreTrainedModel:
    """In 8 bits, or in 4 (nf4, double quantisation) computed in bfloat16."""
    four = config.teacher_quantization == "4bit"
    packing: Any = BitsAndBytesConfig(
        load_in_8bit=not four,
        load_in_4bit=four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    cls: Any = model_class(load_config(str(config.teacher)))
    model: PreTrainedModel = cls.from_pretrained(
        config.teacher, dtype=dtype, use_safetensors=True, quantization_config=packing, device_map={"": device}
    )
    return model


def freeze(teacher: _Model) -> _Model:
    """In eval mode, without gradients; the teacher itself is changed."""
    teacher.eval()
    teacher.requires_grad_(False)
    return teacher


def check_pair(student: nn.Module, teacher: nn.Module, config: DistillationConfig) -> None:
    """Refuse a teacher that cannot be compared with the student.

    Raises:
        ValueError: one is an encoder-decoder and the other is not; vocabularies, numbers of classes, rotary embeddings
            or hidden sizes differ, the teacher takes shorter sequences, or depths differ without a map of layers.
    """
    student, teacher = bare_model(student), bare_model(teacher)
    ours: Any = student.config
    its: Any = teacher.config
    shared = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if any(id(parameter) in shared for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher is the student itself, whose weights change: load it once more, or make it with self_teacher."
        )
    for name, say in (
        ("is_encoder_decoder", "is_encoder_decoder {}"),
        ("vocab_size", "a vocabulary of {}"),
        ("num_labels", "{} classes"),
    ):
        if name == "num_labels" and not _classifies(student):
            continue
        one, other = getattr(ours, name, None), getattr(its, name, None)
        if one != other:
            raise ValueError(
                f"The student has {say.format(one)} but the teacher {say.format(other)}: take a teacher of the same "
                f"kind and tokenizer."
            )
    if config.kl and predicts_next(student) != predicts_next(teacher):
        first, second = (type(model).__name__ for model in (student, teacher))
        raise ValueError(
            f"One of the student, a {first}, and the teacher, a {second}, predicts the next token and the other does "
            f"not, so KL would compare different things: take a teacher of the student's kind."
        )
    _check_positions(ours, its)
    if config.feature_weights:
        _check_states(student, teacher, config)


def _classifies(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__


def _check_positions(ours: Any, its: Any) -> None:
    """Raise ValueError for rotary embeddings that differ, or a teacher of shorter sequences."""
    one, other = (getattr(config, "rope_parameters", None) for config in (ours, its))
    if (one or None) != (other or None):
        raise ValueError(
            f"The student's rotary embeddings are {one} but the teacher's {other}: their positions mean different "
            f"things; take a teacher with the same RoPE scaling."
        )
    one, other = (getattr(config, "max_position_embeddings", None) for config in (ours, its))
    if one is not None and other is not None and other < one:
        raise ValueError(
            f"The student takes {one} positions but the teacher only {other}: take a teacher of at least the same "
            f"max_position_embeddings, or lower the student's."
        )


def _check_states(student: nn.Module, teacher: nn.Module, config: DistillationConfig) -> None:
    """Raise ValueError where there are no pairs of layers, or pairs of other sizes."""
    for ours, its in zip(find_stacks(student), find_stacks(teacher), strict=True):
        config.pairs(ours.depth, its.depth)
    sizes = [getattr(model.config, "hidden_size", None) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The student's hidden states have {sizes[0]} channels but the teacher's {sizes[1]}: they can be compared "
            f"only at the same hidden size; use kl_weight alone."
        )


def check_tokenizers(student: Any, teacher: str | Path) -> None:
    """Refuse a teacher directory whose tokenizer gives other ids.

    Args:
        student: the student's tokenizer; anything else is not looked at.
        teacher: directory or name of the teacher; without a tokenizer there, nothing is compared.

    Raises:
        ValueError: the vocabularies differ.
    """
    if not isinstance(student, PreTrainedTokenizerBase):
        return
    try:
        its = AutoTokenizer.from_pretrained(teacher)
    except Exception:  # whatever it may raise: a teacher need not have one
        return
    ours, theirs = student.get_vocab(), its.get_vocab()
    # where a directory has none, transformers may make one of special tokens and at most a space
    invented = len(set(theirs) - set(its.get_added_vocab())) <= 1
    if ours == theirs or invented:
        return
    differing = next((token for token in sorted({*ours, *theirs}) if ours.get(token) != theirs.get(token)), "")
    raise ValueError(
        f"The student's tokenizer has id {ours.get(differing)} for {differing!r} but the tokenizer in '{teacher}' has "
        f"{theirs.get(differing)}: take a teacher of the same tokenizer."
    )
