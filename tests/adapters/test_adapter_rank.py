"""What each method can and cannot learn: updates of full rank, of rank 1, and ScaleLoRA's two starts."""

from __future__ import annotations

import pytest
import torch
from adapters.sparse_models import logits, sparse_model, train
from peft import get_peft_model
from tiny_models import tiny_batch
from torch import Tensor

from sparse_ft.adapters import ScaleLoraConfig, mask_lora_linear, scale_lora_linear
from sparse_ft.adapters.masked_layer import MaskedLayer

OUT, IN = 6, 8


def fit(method: str, rank: int, *, break_symmetry: bool = True, steps: int = 1200) -> tuple[float, Tensor]:
    """Least squares of an effective weight to a random target on the mask: the mean squared error and B A."""
    torch.manual_seed(0)
    mask = torch.rand(OUT, IN) > 0.4
    weight, wanted = (torch.randn(OUT, IN).abs() + 0.5) * mask, torch.randn(OUT, IN) * mask
    A, B = torch.randn(rank, IN) * 0.4, torch.zeros(OUT, rank)
    if method == "scale_lora" and break_symmetry:
        A[0], B[:, 0] = 1, 1
    elif method == "scale_lora":
        A, B = torch.full_like(A, rank**-0.5), torch.full_like(B, rank**-0.5)
    A.requires_grad_(), B.requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        if method == "scale_lora":
            effective = scale_lora_linear(torch.eye(IN), weight, None, A, B)
        else:
            effective = mask_lora_linear(torch.eye(IN), weight, None, mask, A, B, 1.0)
        loss = (effective - wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item(), (B @ A).detach()


@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_full_rank_reaches_any_masked_update_and_rank_one_cannot(method: str) -> None:
    assert fit(method, min(OUT, IN))[0] < 1e-6
    assert fit(method, 1)[0] > 0.05


def test_the_published_start_of_scale_lora_stays_at_rank_one() -> None:
    error, product = fit("scale_lora", 6, break_symmetry=False)
    values = torch.linalg.svdvals(product)
    assert values[1] < 1e-5 * values[0]
    assert error > 0.05


def factors(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]
    return [layer.factors("default")[:2] for layer in layers]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("break_symmetry", [False, True])
def test_rank_of_scale_lora_after_training_a_model(name: str, break_symmetry: bool) -> None:
    model, masks = sparse_model(name)
    peft_model = get_peft_model(model, ScaleLoraConfig(r=4, masks=masks, break_symmetry=break_symmetry))
    start = float(peft_model(**tiny_batch(model)).loss.detach())
    train(peft_model, steps=5)
    assert float(peft_model(**tiny_batch(model)).loss.detach()) < start
    seconds = [torch.linalg.svdvals(B @ A)[:, :2] for A, B in factors(peft_model)]
    relative = torch.stack([(values[:, 1] / values[:, 0]).max() for values in seconds])
    assert (relative > 1e-4).all() if break_symmetry else (relative < 1e-5).all()


@pytest.mark.parametrize("r", [1, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_of_scale_lora_is_one_for_every_rank_and_base(r: int, dtype: torch.dtype) -> None:
    model, masks = sparse_model("mixtral", dtype=dtype)
    before = logits(model)
    for break_symmetry in (False, True):
        config = ScaleLoraConfig(r=r, masks=masks, break_symmetry=break_symmetry)
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=not break_symmetry)
        exact = break_symmetry or r in (1, 4, 16)
        for A, B in factors(peft_model):
            assert A.dtype == torch.float32
            assert torch.allclose(B @ A, torch.ones(()), rtol=0, atol=0 if exact else 4e-7)
        if exact or dtype != torch.float32:
            assert torch.equal(logits(peft_model), before)
        model = peft_model.unload()


def test_without_initialisation_scale_lora_starts_elsewhere() -> None:
    model, masks = sparse_model()
    before = logits(model)
    assert not torch.allclose(
        logits(get_peft_model(model, ScaleLoraConfig(masks=masks, init_lora_weights=False))), before
    )
