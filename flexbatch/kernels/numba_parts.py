"""What compiled kernels are built of: numbers at an address, in any type; an exponential that a vector can take.

Addresses and places are int64; nothing is checked. Types are known by their place in ``native.TYPES``; where a kernel
has it as a constant, no question is left when it is compiled.
"""

# ruff: noqa: ARG001  what Numba calls has to have its parameters

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from flexbatch.kernels import native

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
    """Compile a function of one address, of a record, to a C function; kept on disk where that can be.

    Numba takes what it kept for good if the function's own file is as it was: the rest of what went into it is named.
    """
    signature = types.void(types.int64)
    try:
        function.__qualname__ += f".{_revision()}"
        return cfunc(signature, nopython=True, cache=True, error_model="numpy", fastmath=FAST)(function)
    except (RuntimeError, OSError):  # no folder that can be written, or no sources
        return cfunc(signature, nopython=True, error_model="numpy", fastmath=FAST)(function)


@functools.cache
def _revision() -> str:
    """A name for what is in all kernels: this module's text and ``native``'s."""
    sources = [Path(str(module)).read_bytes() for module in (__file__, native.__file__)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


inlined = njit(inline="always", fastmath=FAST, error_model="numpy")


_FLOAT, _SHORT, _INT, _LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)

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


def _as_it_is(builder: Any, value: Any) -> Any:
    return value


def _loader(
    element: ir.Type, result: Any, widen: Callable[[Any, Any], Any], memory: str = "read", align: int | None = None
) -> Any:
    @intrinsic
    def load(context: Any, address: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], element.as_pointer())
            loaded = builder.load(builder.gep(pointer, [values[1]]), align=align)
            return widen(builder, _scoped(builder, loaded, memory))

        return result(types.int64, types.int64), generate

    return load


def _storer(
    element: ir.Type,
    taken: Any,
    memory: str = "written",
    narrow: Callable[[Any, Any], Any] = _as_it_is,
    align: int | None = None,
) -> Any:
    @intrinsic
    def store(context: Any, address: Any, place: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], element.as_pointer())
            value = narrow(builder, values[2])
            _scoped(builder, builder.store(value, builder.gep(pointer, [values[1]]), align=align), memory)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, taken), generate

    return store


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


def _bits(element: ir.Type) -> tuple[Any, Any]:
    def widen(builder: Any, value: Any) -> Any:
        return builder.zext(value, _LONG) if element.width < _LONG.width else value

    def narrow(builder: Any, value: Any) -> Any:
        return builder.trunc(value, element) if element.width < _LONG.width else value

    loader = _loader(element, types.uint64, widen, align=1)
    return loader, _storer(element, types.uint64, narrow=narrow, align=1)


# Numbers of so many bits as uint64, at any address: what is only read, and what is written, of which the lowest count.
(peek_short, poke_short), (peek_int, poke_int), (peek_long, poke_long) = map(_bits, (_SHORT, _INT, _LONG))


def _turner(element: ir.Type) -> Any:
    """Turns a square of 8 x 8 numbers, whose rows are so many bytes apart, on its way from one address to another.

    What it gives are the bits of the sums of ``fill`` and every number without its sign, ORed.
    """
    vector, places = ir.VectorType(element, 8), ir.VectorType(_INT, 8)

    @intrinsic
    def turn(context: Any, source: Any, source_step: Any, target: Any, target_step: Any, fill: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            def row_at(address: Any, step: Any, number: int) -> Any:
                row = builder.add(address, builder.mul(step, ir.Constant(_LONG, number)))
                return builder.inttoptr(row, vector.as_pointer())

            def mixed(one: Any, other: Any, own: list[int]) -> Any:
                return builder.shuffle_vector(one, other, ir.Constant(places, own))

            rows = [
                _scoped(builder, builder.load(row_at(values[0], values[1], number), align=1), "read")
                for number in range(8)
            ]
            nothing = ir.Constant(vector, ir.Undefined)
            filling = builder.insert_element(nothing, builder.trunc(values[4], element), ir.Constant(_INT, 0))
            filling = mixed(filling, nothing, [0] * 8)
            unsigned = ir.Constant(vector, [(1 << (element.width - 1)) - 1] * 8)
            sums = [builder.add(builder.and_(row, unsigned), filling) for row in rows]
            seen = builder.bitcast(functools.reduce(builder.or_, sums), ir.VectorType(_LONG, element.width // 8))
            parts = [builder.extract_element(seen, ir.Constant(_INT, part)) for part in range(element.width // 8)]
            for apart in (4, 2, 1):  # squares of that size beside the diagonal change places
                for number in (number for number in range(8) if not number & apart):
                    one, other = rows[number], rows[number + apart]
                    rows[number] = mixed(one, other, [n + (8 - apart) * bool(n & apart) for n in range(8)])
                    rows[number + apart] = mixed(one, other, [n + 8 if n & apart else n + apart for n in range(8)])
            for number, row in enumerate(rows):
                _scoped(builder, builder.store(row, row_at(values[2], values[3], number), align=1), "written")
            return functools.reduce(builder.or_, parts)

        return types.uint64(types.int64, types.int64, types.int64, types.int64, types.uint64), generate

    return turn


turn_shorts, turn_ints = _turner(_SHORT), _turner(_INT)


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
