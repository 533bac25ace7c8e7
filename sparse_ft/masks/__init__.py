"""Masks: patterns, exact selection, and `MaskSet`, the stored truth about which weights are pruned."""

from sparse_ft.masks.bits import keep_bits, mask_
from sparse_ft.masks.mask_file import MASKS_FILE
from sparse_ft.masks.mask_set import MaskSet, Surprise
from sparse_ft.masks.packing import pack_bits, unpack_bits
from sparse_ft.masks.pattern import Pattern, check_sparsity
from sparse_ft.masks.selection import keep_largest, keep_largest_per_row, keep_n_of_m

__all__ = [
    "MASKS_FILE",
    "MaskSet",
    "Pattern",
    "Surprise",
    "check_sparsity",
    "keep_bits",
    "keep_largest",
    "keep_largest_per_row",
    "keep_n_of_m",
    "mask_",
    "pack_bits",
    "unpack_bits",
]
