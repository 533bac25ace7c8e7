"""Text and tokens: what is calibrated on, trained on and evaluated on."""

from sparse_ft.data.calibration import TooFewSequencesError, calibration_batches
from sparse_ft.data.packing import tokens_digest, training_dataset
from sparse_ft.data.text import load_text
from sparse_ft.data.tokens import random_windows, tokenize, windows

__all__ = [
    "TooFewSequencesError",
    "calibration_batches",
    "load_text",
    "random_windows",
    "tokenize",
    "tokens_digest",
    "training_dataset",
    "windows",
]
