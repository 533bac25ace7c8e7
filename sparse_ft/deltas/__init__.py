"""Fine-tuning deltas: what a fine-tune changed, pruned, stored small, and applied again; start in `random_mask.py`."""

from sparse_ft.deltas.random_mask import GENERATOR, random_keep, random_positions

__all__ = ["GENERATOR", "random_keep", "random_positions"]
