"""Numbers as compiled loops see them: bf16 as uint16 and back, and integers that stay at 32 bits.

Numba computes with integers of 64 bits, which halves the width of vectors; what stands here goes around that. Compiled
loops are kept on disk under the date of their own file: after a change here, touch `kernels.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

#: Bits of a float32 without its sign, from which on it is infinite or NaN.
INFINITE = np.uint32(0x7F800000)

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def _from_bf16(_: Any, value: Any) -> Any:
    """The float32 of the bits of a bfloat16."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.zext(arguments[0], _I32), _I32(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_bf16(_: Any, value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, of two the even one."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    return types.uint16(types.float32), generate


@intrinsic
def larger(_: Any, largest: Any, value: Any) -> Any:
    """The larger of `largest` and the bits of a float32 without its sign, which order as absolute values do."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.and_(builder.bitcast(arguments[1], _I32), _I32(0x7FFFFFFF))
        return builder.select(builder.icmp_unsigned(">", bits, arguments[0]), bits, arguments[0])

    return types.uint32(types.uint32, types.float32), generate


@intrinsic
def plus(_: Any, count: Any, counts: Any) -> Any:
    """One more if `counts`."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(arguments[0], builder.zext(arguments[1], _I32))

    return types.uint32(types.uint32, types.boolean), generate


def widen(value: Any) -> Any:
    """A number as it is stored -> float32."""
    raise NotImplementedError("for compiled code")


@overload(widen, inline="always")
def _widen_compiled(value: Any) -> Any:
    def from_bf16(value: Any) -> Any:
        return _from_bf16(value)

    def same(value: Any) -> Any:
        return value

    return from_bf16 if value == types.uint16 else same


def narrow_like(value: Any, like: Any) -> Any:
    """A float32 -> a number as it is stored in the array `like`, to nearest even."""
    raise NotImplementedError("for compiled code")


@overload(narrow_like, inline="always")
def _narrow_compiled(value: Any, like: Any) -> Any:
    def to_bf16(value: Any, like: Any) -> Any:
        return _to_bf16(value)

    def same(value: Any, like: Any) -> Any:
        return value

    return to_bf16 if like.dtype == types.uint16 else same
