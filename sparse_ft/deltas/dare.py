"""DARE: drop entries of a fine-tuning delta by chance and divide the survivors by the density.

    kept_ij ~ Bernoulli(density)        delta'_ij = kept_ij * delta_ij / q        weight = base + delta'

With q = density (drop rate p = 1 - density, so q = 1 - p) the expected output of every layer is that of the fine-tuned
one. A larger q trades this for less noise: DAREx-q, see `darex.py`. q = 1 is dropping without a rescale.

Example:
    >>> pruned = dare(finetuned.float() - base.float(), density=0.1, seed=0, name="layers.0.q_proj.weight")
    >>> weight = add_delta(base, pruned)

Limits: the variance of a layer's output grows with (1 - density) / density times the squares of delta * input, so large
deltas (mean |delta| above about 0.01: continued pre-training, or simply the wrong base) do not survive it.

Source: Yu et al. 2023, "Language Models are Super Mario", arXiv 2311.03099, section 3.1; the scale q: Deng et al. 2024,
"DARE the Extreme", arXiv 2410.09344, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.deltas.checks import check_delta, check_keep, check_scale
from sparse_ft.deltas.random_mask import GAPS_UP_TO, check_density, random_keep, random_positions


@torch.no_grad()
def dare(
    delta: Tensor,
    *,
    density: float,
    seed: int = 0,
    name: str | None = None,
    role: str = "",
    scale: float | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Drop entries at random and divide the kept ones by the scale.

    Args:
        delta: finetuned - base, any shape and float dtype; unchanged. Take the difference in fp32.
        density: probability that an entry is kept, 0..1.
        seed: of the mask.
        name: canonical name of the tensor; part of the mask's key, so each tensor has its own. Not needed with `keep`.
        role: tells masks of one tensor apart, for instance the model the delta belongs to.
        scale: q, what kept entries are divided by; None = density (DARE), 1 = no rescale.
        keep: bool mask of the shape of `delta` instead of the one that (seed, role, name) gives.

    Returns:
        fp32 tensor of the shape of `delta`. Density 1 without a scale gives `delta` bit for bit, density 0 zeros.

    Raises:
        ValueError: a density outside 0..1, a scale that is not positive, neither name nor mask, a mask of another
            shape, an integer tensor, or NaN or infinite entries.

    Example:
        >>> dare(torch.tensor([1.0, 2.0]), density=0.5, keep=torch.tensor([True, False]))
        tensor([2., 0.])

    Source: arXiv 2311.03099, section 3.1, and 2410.09344, section 4.1 for q.
    """
    density = check_density(density)
    largest = check_delta(delta, name)
    if keep is None and name is None:
        raise ValueError("dare needs name, the key of the tensor's random mask, or keep, the mask itself; got neither.")
    if scale is not None:
        scale = check_scale(scale, largest)
    if density == 0.0 or not delta.numel():
        return torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
    divisor = torch.tensor(check_scale(density if scale is None else scale, largest), device=delta.device)
    if keep is None and density <= GAPS_UP_TO:
        positions = random_positions(delta.numel(), density, seed=seed, name=str(name), role=role)
        index = torch.from_numpy(positions).to(delta.device)
        result = torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
        # a tensor as divisor: CUDA replaces a division by a number with a product, which rounds otherwise than the CPU
        result.view(-1)[index] = delta.reshape(-1)[index].float() / divisor
        return result
    if keep is None:
        keep = keep_mask(delta.shape, density, seed=seed, name=str(name), role=role, device=delta.device)
    return torch.where(check_keep(keep, delta), delta.float() / divisor, 0.0)


def keep_mask(
    shape: Sequence[int],
    density: float,
    *,
    seed: int,
    name: str,
    role: str = "",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The bool mask (True = keep) that `dare` uses for a tensor of this shape; see `random_mask.py`.

    Raises:
        ValueError: a density outside 0..1.
    """
    shape = torch.Size(shape)
    return torch.from_numpy(random_keep(shape.numel(), density, seed=seed, name=name, role=role)).view(shape).to(device)


@torch.no_grad()
def add_delta(base: Tensor, delta: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """base + delta, added in fp32 and cast once; where the delta is zero the base's bits are kept, -0 included.

    Args:
        base: any shape, floating point.
        delta: same shape; computed in fp32.
        dtype: of the result; None = the base's.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> add_delta(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]))
        tensor([1.5000, 2.0000])
    """
    if base.shape != delta.shape:
        raise ValueError(f"The base has shape {tuple(base.shape)} and the delta {tuple(delta.shape)}; they must agree.")
    dtype = dtype or base.dtype
    delta = delta.to(base.device)
    return torch.where(delta != 0, (base.float() + delta.float()).to(dtype), base.to(dtype))
