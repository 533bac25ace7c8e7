"""Short runs with a teacher, and the losses written a second time: from full logits and all hidden states at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import TINY, VOCABULARY
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from sparse_ft.distillation import CachedTargets, DistillationConfig, distilling

PAD = 2
EPS = 2.0**-7
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
Collate = Callable[[list[Any]], dict[str, Tensor]]


def lively(model: PreTrainedModel | str, seed: int = 0) -> PreTrainedModel:
    """A model without dropout, of weights large enough that tokens, layers and predictions differ."""
    model = TINY[model](seed) if isinstance(model, str) else model
    larger = 1 if model.config.model_type == "t5" else 4  # T5 is lively enough as it comes
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.ndim > 1}.values():
            parameter.mul_(larger)
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def words(*, swapped: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary; another one of the same size if two words are swapped."""
    ids = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    if swapped:
        ids["w7"], ids["w8"] = 8, 7
    fast = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Random token ids of many lengths; the first labels of each row, its prompt, are masked."""

    def __init__(self, lengths: Sequence[int] = (9, 14, 5, 11), prompt: int = 2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for number, length in enumerate(lengths):
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
            labels = ids.clone()
            labels[: prompt + number % 2] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def padding(side: str = "right") -> Collate:
    """A collator that pads each batch to its longest row."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            longest = max(len(row[name]) for row in rows)
            gaps = [(row[name], longest - len(row[name])) for row in rows]
            return torch.stack([F.pad(t, (gap, 0) if side == "left" else (0, gap), value=value) for t, gap in gaps])

        batch = {"input_ids": padded("input_ids", PAD), "labels": padded("labels", -100)}
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        return {**batch, "attention_mask": padded("attention_mask", 0)}

    return collate


@dataclass
class Watch(TrainerCallback):
    """Keeps the gradients of every step, before the optimizer uses them."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


@dataclass
class Run:
    """What a run left."""

    trainer: Trainer
    gradients: list[dict[str, Tensor]]
    logs: list[dict[str, float]]

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.logs if name in entry]

    @property
    def distill(self) -> list[dict[str, float]]:
        """What was logged of the teacher's losses, step by step."""
        of_steps = [{n: v for n, v in entry.items() if n.startswith("distill/")} for entry in self.logs]
        return [entry for entry in of_steps if entry]


def train(
    student: nn.Module,
    directory: Path,
    distillation: DistillationConfig | None,
    teacher: nn.Module | CachedTargets | None = None,
    *,
    data: Any = None,
    collate: Collate | None = None,
    cls: type[Trainer] = Trainer,
    arguments: type[TrainingArguments] = TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
    trainer: Mapping[str, Any] | None = None,
    **more: Any,
) -> Run:
    """One step of SGD on all rows unless told otherwise; without a `distillation`, the plain trainer."""
    data = Rows() if data is None else data
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }
    watch = Watch()
    taught = {} if distillation is None else {"distillation": distillation, "teacher": teacher}
    made: Any = (cls if distillation is None else distilling(cls))(
        model=student,
        args=arguments(**settings),
        train_dataset=data,
        callbacks=[*callbacks, watch],
        **taught,
        **{"data_collator": collate or padding(), **(trainer or {})},
    )
    made.train(resume_from_checkpoint=resume)
    return Run(made, watch.gradients, made.state.log_history)


# -- the losses, a second time ---------------------------------------------------------------------------------------


def token_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, items: int | None = None
) -> tuple[Tensor, Tensor]:
    """(CE, τ² KL) of logits (n, V) and labels (n,)."""
    keep = labels != -100
    items = int(keep.sum()) if items is None else items
    ce = -torch.log_softmax(student[keep], -1).gather(-1, labels[keep].unsqueeze(-1)).sum()
    p = torch.log_softmax(teacher[keep] / temperature, -1)
    q = torch.log_softmax(student[keep] / temperature, -1)
    return ce / items, temperature**2 * (p.exp() * (p - q)).sum() / items


def layer_term(kind: str, student: Tensor, teacher: Tensor, valid: Tensor, energy: Tensor | None = None) -> Tensor:
    """One layer of a loss on hidden states."""
    s, t = student[valid], teacher[valid]
    if kind == "cosine":
        return (1 - F.cosine_similarity(s, t, dim=-1)).mean()
    error = ((s - t) ** 2).mean()
    return error if kind == "mse" else error / ((t**2).mean() + EPS if energy is None else energy + EPS)


def states_term(kind: str, student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor) -> Tensor:
    """The sum over layers, of `hidden_states` with the embeddings first."""
    pairs = zip(student[1:], teacher[1:], strict=True)
    return torch.stack([layer_term(kind, s, t, valid) for s, t in pairs]).sum()


@dataclass
class Terms:
    """What a causal model's micro-batch contributes; the tokens it is weighted by."""

    ce: Tensor
    kl: Tensor
    features: dict[str, Tensor]
    labels: int
    tokens: int


def terms(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Tensor],
    config: DistillationConfig,
    *,
    items: int | None = None,
    energies: Sequence[Tensor] | None = None,
) -> Terms:
    """Cross-entropy, KL and losses on states of a batch of a causal model, with full logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(**inputs, output_hidden_states=True)
    labels = batch["labels"][:, 1:].reshape(-1)
    logits = [out.logits[:, :-1].reshape(len(labels), -1) for out in (ours, its)]
    ce, kl = token_terms(*logits, labels, config.temperature, items)
    valid = batch["attention_mask"].bool()
    features = {}
    for kind in config.feature_weights:
        pairs = enumerate(zip(ours.hidden_states[1:], its.hidden_states[1:], strict=True))
        each = [layer_term(kind, s, t, valid, None if energies is None else energies[i]) for i, (s, t) in pairs]
        features[kind] = torch.stack(each).sum()
    return Terms(ce, kl, features, int((labels != -100).sum()), int(valid.sum()))


def total(found: Terms, config: DistillationConfig) -> Tensor:
    """The weighted sum."""
    of_states = sum(weight * found.features[name] for name, weight in config.feature_weights.items())
    return config.ce_weight * found.ce + config.kl * found.kl + of_states


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By parameter name; the model's own `grad` is left alone."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rel: float = 1e-5) -> None:
    """Equal gradients, tensor by tensor, up to `rel` of the tensor's norm, or of a thousandth of the whole one's."""
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert whole > 0
    for name, wanted in expected.items():
        error = float((found[name] - wanted).norm() / torch.maximum(wanted.norm(), whole / 1000))
        assert error <= rel, f"{name} differs by {error:.2e} of its norm"


def assert_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal tensors, bit for bit."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(found[name].detach(), wanted.detach()), name
