"""`reconstruct`: win back what pruning cost, block by block, without back-propagating through the model.

    masks = prune(model, sparsity=0.6, method="wanda", calibration=batches)
    result = reconstruct(model, masks, dense, calibration=batches)

Each window of each block is trained by itself to compute what the dense block computes, on a few calibration texts:

    minimise  mean (f(Z; W ∘ m) - f_dense(Z))²   over the kept weights of the window

It takes the activations of one block and the optimizer state of one window, and pruned weights stay exactly zero.

Departures from the sources: the loss is divided by its value before training, and a window whose error does not get
lower keeps its weights. That error is a mean over at most 16 batches of the calibration data, spread evenly.

Source: Zimmer et al., PERP, arXiv 2312.15230 (layer-wise reconstruction), and arXiv 2510.14444 (attention and MLP as
windows).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_ft.masks import MaskSet
from sparse_ft.reconstruction.activations import keeper
from sparse_ft.reconstruction.blocks import BlockReconstruction, WindowResult
from sparse_ft.reconstruction.settings import (
    Batch,
    Settings,
    Task,
    check_calibration,
    check_models,
    check_settings,
    check_trained,
    count_rows,
)


@dataclass(frozen=True)
class ReconstructionResult:
    """What `reconstruct` did.

    Attributes:
        windows: one row per window, in the order they were trained.
        train: what was trained, `"full+norms"`.
        granularity: as asked for.
        stream: where inputs and targets came from.
        learning_rate: at its peak.
        autocast: whether training steps multiplied in bfloat16.
        samples: calibration sequences.
        whole_blocks: blocks without a cut between attention and MLP, reconstructed as one window.
        skipped_blocks: blocks the model never called; they are unchanged.
    """

    windows: tuple[WindowResult, ...]
    train: str
    granularity: str
    stream: str
    learning_rate: float
    autocast: bool
    samples: int
    whole_blocks: tuple[str, ...] = ()
    skipped_blocks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self)


def reconstruct(
    model: nn.Module,
    masks: MaskSet,
    dense: nn.Module,
    *,
    calibration: Iterable[Any] | None,
    train: str = "full",
    granularity: str = "attn_mlp",
    stream: str = "sparse",
    iterations: int | None = None,
    batch_size: int = 2,
    learning_rate: float | None = None,
    warmup: float = 0.1,
    autocast: bool | None = None,
    r: int = 16,
    lora_alpha: int | None = None,
    seed: int = 0,
    activations_dir: str | Path | None = None,
    progress: bool = True,
) -> ReconstructionResult:
    """Train each window of a pruned model to compute what the dense model's computes, in place.

    Args:
        model: the pruned model; any architecture that `find_blocks` takes apart.
        masks: its masks. Weights without a mask, routers among them, are not trained.
        dense: the model it was pruned from, in the same dtype; may be on another device. Not changed.
        calibration: batches of token ids `(B, T)`, or dictionaries for the model's forward; no labels are needed.
            Padding is taken out, and batching does not matter. 128 sequences are usual.
        train: `"full"` (the kept weights), `"mask_lora"`, `"scale_lora"` or `"lora_prune"`, and the groups `"norms"`
            and `"biases"`, joined by "+". Adapters are merged window by window.
        granularity: `"attn_mlp"`, `"block"` or `"linear"`; see `windows`.
        stream: `"sparse"`, `"dense"` or `"sparse_to_dense"`; see `streams`.
        iterations: training steps per window; by default each calibration sequence is used once.
        batch_size: sequences per step.
        learning_rate: of AdamW at its peak, then linear decay; by default 5e-4, and for `"full"` 0.8 / the least number
            of inputs of a masked matrix (2e-4 for 4096). Choose it on validation data.
        warmup: steps until the peak; below 1 a share of all.
        autocast: compute the matrix products of training steps in bfloat16; by default if weights are in bfloat16, or
            the device has instructions for it (AMX, AVX512-BF16, newer GPUs). Trained weights and the loss are in fp32
            in either case. Targets and errors of fp32 weights are computed with the same products; those of others in
            the model's dtype.
        r: rank of an adapter; in a matrix with a shorter side below it, that side.
        lora_alpha: its scale is lora_alpha / r, with this r everywhere; by default 2 r.
        seed: of the order of the batches, and of adapters.
        activations_dir: directory for activations, which otherwise lie in memory: about four times those between two
            blocks.
        progress: show a progress bar when it takes more than two seconds.

    Returns:
        The error of each window before and after.

    Raises:
        ValueError: if an argument, a model or the calibration data cannot be used; nothing is changed then.
        RuntimeError: if a pruned weight is not zero, or layers share their weights.

    Example:
        >>> result = reconstruct(model, masks, dense, calibration=batches, train="mask_lora+norms")
        >>> [(row.block, row.window, row.loss_before, row.loss_after) for row in result.windows][:2]
    """
    settings = check_settings(
        train=train, granularity=granularity, stream=stream, iterations=iterations, batch_size=batch_size,
        learning_rate=learning_rate, warmup=warmup, autocast=autocast, r=r, lora_alpha=lora_alpha, seed=seed,
        progress=progress,
    )  # fmt: skip
    model, dense = getattr(model, "_orig_mod", model), getattr(dense, "_orig_mod", dense)
    return reconstruct_with(model, dense, Task(masks, settings, calibration, activations_dir))


def reconstruct_with(model: nn.Module, dense: nn.Module, task: Task) -> ReconstructionResult:
    """`reconstruct` with checked settings."""
    masks, settings = task.masks, task.settings
    check_models(model, dense)
    masks.verify(model)
    groups = check_trained(model, masks, settings)
    batches = check_calibration(model, task.calibration, settings.batch_size)
    device, dense_device = (getattr(m, "device", next(m.parameters()).device) for m in (model, dense))
    run = BlockReconstruction(
        model, dense, masks, groups, batches, settings,
        device=device, dense_device=dense_device, keep=keeper(device, task.activations_dir),
    )  # fmt: skip
    run.run()
    return result_of(run, settings, batches)


def result_of(run: BlockReconstruction, settings: Settings, batches: Sequence[Batch]) -> ReconstructionResult:
    """The result of a run that is over."""
    return ReconstructionResult(
        windows=tuple(run.rows),
        train=str(settings.train),
        granularity=settings.granularity,
        stream=settings.stream,
        learning_rate=run.learning_rate,
        autocast=run.autocast,
        samples=count_rows(batches),
        whole_blocks=tuple(run.whole),
        skipped_blocks=tuple(run.skipped),
    )
