"""Training with transformers' `Trainer` and TRL's `SFTTrainer`: masks that hold, checkpoints that survive a kill."""

from sparse_ft.training.mask_callback import MaskCallback
from sparse_ft.training.resume import is_complete_checkpoint, latest_complete_checkpoint

__all__ = ["MaskCallback", "is_complete_checkpoint", "latest_complete_checkpoint"]
