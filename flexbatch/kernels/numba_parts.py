"""What compiled kernels are built of: numbers at an address, in any type; an exponential that a vector can take.

Addresses and places are int64; nothing is checked. Types are known by their place in ``native.TYPES``; where a kernel
has it as a constant, no question is left when it is compiled.
"""

# ruff: noqa: ARG001  what Numba calls has to have its parameters

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

Kernel = Callable[[Any], None]

FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}
"""What sums may be changed in: their order. Numbers that are not finite stay what they are."""

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # the exponential of less is not a normal number
_TAYLOR = tuple(np.float32(1 / divisor) for divisor in (5040, 720, 120, 24, 6, 2))


def address_of(kernel: Any) -> int:
    """Where a compiled kernel begins."""
    return int(kernel.address)


def compiled(function: Kernel) -> Any:
    """Compile a function of one address, of a record, to a C function; kept on disk where that can be."""
    signature = types.void(types.int64)
    try:
        return cfunc(signature, nopython=True, cache=True, error_model="numpy", fastmath=FAST)(function)
    except RuntimeError:  # no folder that can be written
        return cfunc(signature, nopython=True, error_model="numpy", fastmath=FAST)(function)


inlined = njit(inline="always", fastmath=FAST, error_model="numpy")


_MEMORIES = ("read", "written", "copied")


def _scoped(builder: Any, instruction: Any, memory: str) -> Any:
    """Say of a load or store in which memory it is: what one of ``_MEMORIES`` holds the others do not."""
    module = builder.module
    domain = module.add_metadata(["flexbatch"])
    scopes = {name: module.add_metadata([f"flexbatch.{name}", domain]) for name in _MEMORIES}
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[memory]]))
    others = [scope for name, scope in scopes.items() if name != memory]
    instruction.set_metadata("noalias", module.add_metadata(others))
    return instruction


def _loader(element: ir.Type, result: Any, widen: Callable[[Any, Any], Any], memory: str = "read") -> Any:
    @intrinsic
    def load(context: Any, address: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], element.as_pointer())
            loaded = builder.load(builder.gep(pointer, [values[1]]))
            return widen(builder, _scoped(builder, loaded, memory))

        return result(types.int64, types.int64), generate

    return load


def _storer(element: ir.Type, taken: Any, memory: str = "written") -> Any:
    @intrinsic
    def store(context: Any, address: Any, place: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], element.as_pointer())
            _scoped(builder, builder.store(values[2], builder.gep(pointer, [values[1]])), memory)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, taken), generate

    return store


_FLOAT, _SHORT, _INT, _LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _as_it_is(builder: Any, value: Any) -> Any:
    return value


def _from_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.shl(builder.zext(value, _INT), ir.Constant(_INT, 16))
    return builder.bitcast(bits, _FLOAT)


def _from_half(builder: Any, value: Any) -> Any:
    return builder.fpext(builder.bitcast(value, ir.HalfType()), _FLOAT)


@functools.cache
def widens_halves() -> bool:
    """Whether the processor has an instruction that widens numbers of fp16."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return bool(binding.get_host_cpu_features().get("f16c", False)) if x86 else True


# What kernels only read.
load_half = _loader(_SHORT, types.float32, _from_half)
load_float = _loader(_FLOAT, types.float32, _as_it_is)
load_bfloat = _loader(_SHORT, types.float32, _from_bfloat16)
load_int = _loader(_INT, types.int64, lambda builder, value: builder.sext(value, _LONG))
load_long = _loader(_LONG, types.int64, _as_it_is)
# What they write, and may read again.
get = _loader(_FLOAT, types.float32, _as_it_is, "written")
get_bfloat = _loader(_SHORT, types.float32, _from_bfloat16, "written")
put = _storer(_FLOAT, types.float32)
# What they keep of the first for themselves.
get_copy = _loader(_FLOAT, types.float32, _as_it_is, "copied")
put_copy = _storer(_FLOAT, types.float32, "copied")
put_short = _storer(_SHORT, types.uint16)


@intrinsic
def draw(context: Any, address: Any, place: Any) -> Any:
    """Count the int64 number at a place up by one, as no other thread does; what it was."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.gep(builder.inttoptr(values[0], _LONG.as_pointer()), [values[1]])
        return builder.atomic_rmw("add", pointer, ir.Constant(_LONG, 1), "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def bits_of(context: Any, value: Any) -> Any:
    """A float32 as its bits."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _INT)

    return types.uint32(types.float32), generate


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """Bits as the float32 that they are."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _FLOAT)

    return types.float32(types.int32), generate


@inlined
def load(kind: int, address: int, place: int) -> float:
    """The number of a type at a place of what is only read, as float32."""
    return load_float(address, place) if kind == 0 else load_bfloat(address, place)


@inlined
def recall(kind: int, address: int, place: int) -> float:
    """The number of a type at a place of what is written, as float32."""
    return get(address, place) if kind == 0 else get_bfloat(address, place)


@inlined
def rounded(kind: int, value: np.float32) -> np.float32:
    """A float32 rounded to a type, to the nearest, ties to even."""
    if kind == 0:
        return value
    bits = bits_of(value)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return float_of(np.int32(near)) if value == value else value


@inlined
def store(kind: int, address: int, place: int, value: np.float32) -> None:
    """Write a float32 to a place in a type, rounded as by ``rounded``."""
    if kind == 0:
        put(address, place, value)
    else:
        put_short(address, place, np.uint16(bits_of(rounded(kind, value)) >> np.uint32(16)))


@inlined
def exponential(x: np.float32) -> np.float32:
    """E to the x for x up to 0, to 2e-7 of it; for less than -87 what it is there."""
    x = max(x, _LOWEST)
    power = np.floor(x * _LOG2_E + np.float32(0.5))
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    sum_ = _TAYLOR[0]
    sum_ = sum_ * rest + _TAYLOR[1]
    sum_ = sum_ * rest + _TAYLOR[2]
    sum_ = sum_ * rest + _TAYLOR[3]
    sum_ = sum_ * rest + _TAYLOR[4]
    sum_ = sum_ * rest + _TAYLOR[5]
    sum_ = sum_ * rest * rest + rest + np.float32(1)
    return sum_ * float_of((np.int32(power) + np.int32(127)) << np.int32(23))
