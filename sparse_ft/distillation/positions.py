"""The positions whose predictions are trained on, the same set for cross-entropy and KL."""

from __future__ import annotations

from torch import Tensor


def loss_positions(labels: Tensor, *, ignore_index: int = -100, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Positions with a label to predict, and those labels.

    Finding out how many there are waits for the device, once per call; the output head then runs on these positions
    only.

    Args:
        labels: (B, T) int64.
        ignore_index: the label of tokens that are not trained on.
        shift: the states at position i predict token i + 1, as in decoders; False: label i itself, as in
            encoder-decoders and encoders.

    Returns:
        positions: (N,) int64, indices into the (B·T,) flattened positions, ascending.
        targets: (N,) int64, what each of them predicts.

    Example:
        >>> positions, targets = loss_positions(torch.tensor([[-100, 7, 9]]))
        >>> positions.tolist(), targets.tolist()
        ([0, 1], [7, 9])
    """
    if shift:
        following = labels.new_full(labels.shape, ignore_index)
        following[..., :-1] = labels[..., 1:]
        labels = following
    flat = labels.reshape(-1)
    positions = (flat != ignore_index).nonzero().squeeze(-1)
    return positions, flat[positions]
