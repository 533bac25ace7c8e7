"""Training with transformers' `Trainer` and TRL's `SFTTrainer`: masks that hold, checkpoints that survive a kill."""

from sparse_ft.training.adamr import AdamR
from sparse_ft.training.adamr_groups import adamr_groups
from sparse_ft.training.gradient_flow import watch_gradient_flow
from sparse_ft.training.mask_callback import MaskCallback
from sparse_ft.training.processes import check_same_masks, check_strategy, wait_for_everyone
from sparse_ft.training.resume import is_complete_checkpoint, latest_complete_checkpoint

__all__ = [
    "AdamR",
    "MaskCallback",
    "adamr_groups",
    "check_same_masks",
    "check_strategy",
    "is_complete_checkpoint",
    "latest_complete_checkpoint",
    "wait_for_everyone",
    "watch_gradient_flow",
]
