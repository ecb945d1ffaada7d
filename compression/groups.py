"""The packed group format: 4-bit codes, and for every group of a row a scale and a minimum or an integer zero.

Owns the layout, packing and the reference dequantization. Knows nothing of how codes and scales were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
"""Group sizes that exist in the wild; any other is refused where it is read."""
Offset = Literal["minimum", "zero", "middle"]
SCALE_TYPES = (torch.float16, torch.bfloat16)
LEVELS = 16
MIDDLE = 8
"""The zero of every group of a weight that stores none (GGUF's Q4_0)."""
_TILE = 1 << 18  # weights unpacked at a time: fp32 tiles of that size stay in cache


def groups_of(in_features: int, group: int) -> int:
    """How many groups a row has; the last one may be shorter."""
    return -(-in_features // group)


def row_bytes(in_features: int) -> int:
    """Bytes of a row's codes: two a byte, so a row of odd length ends in half an unused byte."""
    return -(-in_features // 2)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight [out, in] in 4 bits: group g of a row holds the inputs ``g * group ..``, the last group maybe fewer.

    ``codes`` uint8 [out, ceil(in / 2)], two a byte, the lower nibble first. ``scales`` fp16 or bf16 [out, groups].
    A weight is ``code * scale + minimum`` with ``minimums`` [out, groups] of the scales' type, or
    ``(code - zero) * scale`` with ``zeros`` uint8 [out, groups], the form of GPTQ and AWQ. One of the two is None;
    where both are, every zero is ``MIDDLE``, the form of GGUF's Q4_0.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    zeros: Tensor | None
    group: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        per_group = (out_features, groups_of(in_features, self.group))
        assert self.group in GROUPS, f"group {self.group} is none of {GROUPS}"
        assert self.codes.dtype == torch.uint8
        assert self.codes.shape == (out_features, row_bytes(in_features)), self.codes.shape
        assert self.scales.dtype in SCALE_TYPES
        assert self.scales.shape == per_group, f"scales are {self.scales.shape}, not {per_group}"
        assert self.minimums is None or self.zeros is None, "minimums and zeros"
        if self.minimums is not None:
            assert (self.minimums.dtype, self.minimums.shape) == (self.scales.dtype, per_group)
        if self.zeros is not None:
            assert (self.zeros.dtype, self.zeros.shape) == (torch.uint8, per_group)

    @property
    def offset(self) -> Offset:
        """What is stored beside each scale."""
        if self.minimums is not None:
            return "minimum"
        return "middle" if self.zeros is None else "zero"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all tensors as bits for each weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, in the order of ``PackedLayout``."""
        named = {"scales": self.scales, "minimums": self.minimums, "zeros": self.zeros, "codes": self.codes}
        return {name: part for name, part in named.items() if part is not None}

    def rows(self, start: int, stop: int) -> Packed:
        """The rows ``start .. stop``, sharing memory."""
        cut = {name: part[start:stop] for name, part in self.tensors().items()}
        return Packed(
            cut["codes"],
            cut["scales"],
            cut.get("minimums"),
            cut.get("zeros"),
            self.group,
            (stop - start, self.shape[1]),
        )

    def to(self, device: torch.device) -> Packed:
        """The same on ``device``, copied on its current stream."""
        moved = {name: part.to(device, non_blocking=True) for name, part in self.tensors().items()}
        return Packed(
            moved["codes"], moved["scales"], moved.get("minimums"), moved.get("zeros"), self.group, self.shape
        )


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How a packed weight lies in one run of bytes: scales, minimums or zeros or neither, codes; nothing between them.

    ``offset`` says what is beside a group's scale: its ``minimum``, its integer ``zero``, or (``middle``) nothing.
    """

    shape: tuple[int, int]
    group: int = 64
    offset: Offset = "minimum"
    scale_type: torch.dtype = torch.float16

    @classmethod
    def of(cls, packed: Packed) -> PackedLayout:
        """The layout of ``packed``."""
        return cls(packed.shape, packed.group, packed.offset, packed.scales.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        out_features, in_features = self.shape
        per_group = self.scale_type.itemsize + self._offset_bytes
        return out_features * (groups_of(in_features, self.group) * per_group + row_bytes(in_features))

    @property
    def _offset_bytes(self) -> int:
        """Bytes of one group's minimum or zero."""
        return {"minimum": self.scale_type.itemsize, "zero": 1, "middle": 0}[self.offset]

    def put(self, packed: Packed, raw: Tensor) -> None:
        """Write ``packed`` to ``raw``, uint8 [nbytes], as ``view`` reads it back."""
        assert PackedLayout.of(packed) == self
        place = 0
        for part in packed.tensors().values():
            raw[place : place + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
            place += part.nbytes

    def view(self, raw: Tensor) -> Packed:
        """See contiguous uint8 [nbytes], starting at an even address, as the weight."""
        out_features, in_features = self.shape
        groups = groups_of(in_features, self.group)
        scale_bytes = out_features * groups * self.scale_type.itemsize
        offset_bytes = out_features * groups * self._offset_bytes
        scales, offsets, codes = raw.split([scale_bytes, offset_bytes, out_features * row_bytes(in_features)])
        minimums = offsets.view(self.scale_type).view(out_features, groups) if self.offset == "minimum" else None
        zeros = offsets.view(out_features, groups) if self.offset == "zero" else None
        return Packed(
            codes.view(out_features, -1),
            scales.view(self.scale_type).view(out_features, groups),
            minimums,
            zeros,
            self.group,
            self.shape,
        )


def pack_codes(codes: Tensor) -> Tensor:
    """Codes 0 .. 15, any integer type [..., n] -> uint8 [..., ceil(n / 2)], the lower nibble first."""
    narrow = codes.to(torch.uint8)
    if narrow.shape[-1] % 2:
        narrow = torch.nn.functional.pad(narrow, (0, 1))
    return narrow[..., 1::2].bitwise_left_shift(4).bitwise_or_(narrow[..., 0::2])


def unpack_codes(packed: Tensor, number: int) -> Tensor:
    """uint8 [..., ceil(number / 2)] -> codes uint8 [..., number]."""
    both = torch.stack([packed.bitwise_and(15), packed.bitwise_right_shift(4)], dim=-1)
    return both.flatten(-2)[..., :number]


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Return the weight [out, in], computed in fp32 and rounded once to ``dtype``, into ``out`` where one is given.

    Rows are done a few at a time, so memory beyond the result is a few MB.
    """
    out_features, in_features = packed.shape
    result = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device) if out is None else out
    groups = groups_of(in_features, packed.group)
    full = groups * packed.group
    step = max(1, _TILE // max(1, full))
    for start in range(0, out_features, step):
        part = packed.rows(start, min(start + step, out_features))
        codes = torch.nn.functional.pad(unpack_codes(part.codes, in_features), (0, full - in_features))
        values = codes.view(-1, groups, packed.group).float()
        scales = part.scales.float().unsqueeze(-1)
        if part.minimums is not None:
            values = values.mul_(scales).add_(part.minimums.float().unsqueeze(-1))
        else:
            zeros = MIDDLE if part.zeros is None else part.zeros.float().unsqueeze(-1)
            values = values.sub_(zeros).mul_(scales)
        result[start : start + step] = values.view(-1, full)[:, :in_features]
    return result
