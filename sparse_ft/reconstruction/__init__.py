"""Layer-wise reconstruction of a pruned model; start reading in `reconstruct.py`."""

from sparse_ft.reconstruction.blocks import WindowResult
from sparse_ft.reconstruction.reconstruct import ReconstructionResult, reconstruct
from sparse_ft.reconstruction.streaming import reconstruct_checkpoint

__all__ = ["ReconstructionResult", "WindowResult", "reconstruct", "reconstruct_checkpoint"]
