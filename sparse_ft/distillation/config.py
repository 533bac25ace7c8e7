"""`DistillationConfig`: what a student is pulled towards, and how strongly.

    total = ce_weight · L + kl_weight · KL + squarehead_weight · Σ SH_l

L is the loss the Trainer computes without a teacher, with whatever options it was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.distillation.layers import layer_pairs
from sparse_ft.naming import check_choice

FEATURES = ("squarehead", "mse", "cosine")
_ENERGIES = ("batch", "fixed")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the text `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class DistillationConfig:
    """Weights of the losses, the layers that are compared, and where the teacher comes from.

    Attributes:
        ce_weight: of the Trainer's own loss.
        kl_weight: of τ² KL(teacher || student) on the positions with a label; None is 1 where no loss on hidden
            states is asked for, else 0.
        squarehead_weight: of the sum of SquareHead over the compared layers.
        mse_weight: of the sum of plain squared errors, an alternative to SquareHead.
        cosine_weight: of the sum of 1 - cosine, another.
        temperature: τ of KL.
        distill_layers: None compares layers of equal number; "spaced" spreads the student's over a deeper teacher;
            else pairs such as "4:8" (student 4 with teacher 8) or "4" (4 with 4). Layer 1 is the output of the first
            block, the last comes after the final norm. In an encoder-decoder it holds for both stacks.
        layer_weights: one factor per compared layer, in their order.
        energy: SquareHead's denominators: "batch" takes those of each micro-batch, whose ratios are averaged by their
            share of the tokens; "fixed" measures them once, on the first `energy_samples` training samples, so that
            micro-batches and processes add up to exactly the gradient of one large batch.
        energy_samples: training samples that "fixed" looks at.
        skip_first: leave the first token of each sequence out of losses on hidden states; in many models it carries
            most of a layer's energy.
        no_padding: batches come without attention_mask, and every token in them is text.
        teacher: directory or Hub name, where none is handed to the trainer itself.
        teacher_dtype: of its weights.
        teacher_device: where it runs.
        teacher_quantization: "8bit" or "4bit".

    Raises:
        ValueError: a weight is negative or not finite, all but `ce_weight` are 0, or a setting is unknown.

    Example:
        >>> DistillationConfig(kl_weight=1.0, squarehead_weight=0.1, teacher="path/to/dense")

    Sources: arXiv 2310.06927 (SquareHead and its weights), arXiv 1503.02531 (KL).
    """

    ce_weight: float = option(1.0, "factor of the loss that needs no teacher")
    kl_weight: float | None = option(
        None, "factor of KL from the teacher's next-token distribution; by default 1, or 0 beside --squarehead_weight"
    )
    squarehead_weight: float = option(0.0, "factor of SquareHead: normalised distance of hidden states, over layers")
    mse_weight: float = option(0.0, "factor of the plain squared distance of hidden states")
    cosine_weight: float = option(0.0, "factor of 1 - cosine of hidden states")
    temperature: float = option(1.0, "what logits are divided by in KL")
    distill_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers compared: pairs student:teacher (4:8), numbers, or spaced; by default all, by number"
        },
    )
    layer_weights: list[float] | None = field(
        default=None, metadata={"help": "factors of the compared layers, in their order; by default 1"}
    )
    energy: str = option(
        "batch",
        "SquareHead's denominators: of each micro-batch (batch), or measured once so that micro-batches add (fixed)",
    )
    energy_samples: int = option(64, "training samples that --energy fixed is measured on")
    skip_first: bool = option(False, "leave the first token of each sequence out of losses on hidden states")
    no_padding: bool = option(False, "batches have no attention_mask because every token in them is text")
    teacher: str | None = option(None, "dense model to learn from: directory of a checkpoint, or a name on the Hub")
    teacher_dtype: str = option("auto", "dtype of the teacher's weights: auto (as stored), float32, bfloat16, float16")
    teacher_device: str | None = option(None, "where the teacher runs; by default where the student does")
    teacher_quantization: str | None = option(None, "load the teacher in 8bit or 4bit")

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kl_weight", *(f"{feature}_weight" for feature in FEATURES)):
            weight = getattr(self, name)
            if weight is not None and not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}, but weights are finite and at least 0: correct it.")
        if not self.feature_weights and not self.kl:
            raise ValueError(
                "kl_weight and squarehead_weight are both 0, so nothing would be learnt from the teacher: give one of "
                "them, such as kl_weight 1, or train without distillation."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"The temperature is {self.temperature}, but logits are divided by it: give one above 0.")
        for weight in self.layer_weights or ():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"layer_weights has {weight}, but weights are finite and at least 0: correct it.")
        check_choice("teacher_dtype", self.teacher_dtype, _DTYPES)
        parse_layers(self.distill_layers)
        check_choice("energy", self.energy, _ENERGIES)
        if self.energy_samples < 1:
            raise ValueError(f"energy_samples is {self.energy_samples}, but energies need samples: give at least 1.")
        if self.teacher_quantization is not None:
            check_choice("teacher_quantization", self.teacher_quantization, ("8bit", "4bit"))

    @property
    def kl(self) -> float:
        """`kl_weight`, with its default resolved."""
        if self.kl_weight is None:
            return 0.0 if self.feature_weights else 1.0
        return self.kl_weight

    @property
    def feature_weights(self) -> dict[str, float]:
        """The losses on hidden states that are asked for, with their weights."""
        weights = {name: getattr(self, f"{name}_weight") for name in FEATURES}
        return {name: float(weight) for name, weight in weights.items() if weight}

    def pairs(self, student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) of the compared layers of one stack.

        Raises:
            ValueError: if the layers do not exist, or there is not one of `layer_weights` for each pair.
        """
        if self.distill_layers is None and student_depth != teacher_depth:
            raise ValueError(
                f"The student has {student_depth} layers but the teacher {teacher_depth}, and states are compared "
                f"layer by layer: give distill_layers, pairs such as {student_depth}:{teacher_depth}, or spaced."
            )
        pairs = layer_pairs(student_depth, teacher_depth, parse_layers(self.distill_layers))
        if self.layer_weights is not None and len(self.layer_weights) != len(pairs):
            raise ValueError(
                f"There are {len(self.layer_weights)} layer_weights for {len(pairs)} compared layers: give one for "
                f"each, or none."
            )
        return pairs


def parse_layers(layers: Sequence[str] | Mapping[int, int] | str | None) -> Any:
    """What `layer_pairs` takes, from ["4:8", "8:16"], ["4", "8"], ["spaced"], "spaced", or a mapping.

    Raises:
        ValueError: an entry is neither.
    """
    if layers is None or isinstance(layers, Mapping):
        return layers
    entries = [layers] if isinstance(layers, str) else [str(entry) for entry in layers]
    if entries == ["spaced"]:
        return "spaced"
    pairs: dict[int, int] = {}
    for entry in entries:
        student, _, teacher = entry.partition(":")
        try:
            pair = int(student), int(teacher or student)
        except ValueError:
            raise ValueError(
                f"distill_layers has {entry!r}, but entries are student:teacher such as 4:8, or a number: correct it."
            ) from None
        if pair[0] in pairs:
            raise ValueError(f"distill_layers names student layer {pair[0]} twice: leave one out.")
        pairs[pair[0]] = pair[1]
    return pairs
