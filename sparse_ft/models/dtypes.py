"""Kinds of dtype that weights are stored in."""

from __future__ import annotations

import torch

#: Floating point of 16 bits: what is computed with it where float32 is meant is rounded too early.
HALF_DTYPES = (torch.float16, torch.bfloat16)
