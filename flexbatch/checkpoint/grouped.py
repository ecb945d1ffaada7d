"""Linears of GPTQ and AWQ checkpoints: found among the stored tensors, checked, and as the group format has them.

Knows both layouts of codes, zero points and scales; which configurations mean them is ``config_quantization``'s part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flexbatch.checkpoint.gguf_blocks import first_not_finite
from flexbatch.checkpoint.safetensors import read_bytes
from flexbatch.checkpoint.tensors import DTYPES, TensorEntry
from flexbatch.compression.groups import GROUPS, Packed, PackedLayout, dequantize, groups_of, pack_codes, unpack_codes
from flexbatch.config_quantization import Quantization
from flexbatch.errors import ModelError

_PER_WORD = 8  # codes in an int32
_MIDDLE = 8  # the zero point of symmetric codes
# AWQ stores the columns 0 2 4 6 1 3 5 7 of every eight: column c is nibble _AWQ_NIBBLE[c].
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class GroupedRecipe:
    """One quantized linear. ``group`` may be smaller than stored; ``chosen``: the stored group of each of them."""

    quantization: Quantization
    codes: TensorEntry
    zeros: TensorEntry
    scales: TensorEntry
    shape: tuple[int, int]
    group: int
    chosen: tuple[int, ...] | None
    transposed: bool

    @property
    def layout(self) -> PackedLayout:
        """The layout of what ``packed`` returns."""
        return PackedLayout(self.shape, self.group, "zero", scale_type=DTYPES[self.scales.dtype])

    def make(self) -> torch.Tensor:
        """Return the weight as the table has it, (code - zero) * scale rounded once to the scales' type."""
        packed = self.packed()
        values = dequantize(packed, packed.scales.dtype)
        return values.t().contiguous() if self.transposed else values

    def packed(self) -> Packed:
        """Return the weight in the group format: the same codes, zero points and scales."""
        out_features, in_features = self.shape
        scales = _read(self.scales)
        wrong = first_not_finite(scales)
        if wrong is not None:
            raise ModelError(f"{self.scales.path}: tensor {self.scales.name}: its value number {wrong} is not finite")
        zeros = self._zeros()
        if self.chosen is not None:
            rows = torch.tensor(self.chosen)
            scales, zeros = scales[rows], zeros[rows]
        words = _read(self.codes)
        if self.quantization.method == "gptq":
            # A word holds eight inputs of one output, the first one lowest: its bytes are the group format's.
            lanes = words.view(torch.uint8).view(in_features // _PER_WORD, out_features, _PER_WORD // 2)
            codes = lanes.transpose(0, 1).reshape(out_features, in_features // 2)
        else:
            codes = pack_codes(_awq_columns(words).t())
        return Packed(codes, scales.t().contiguous(), None, zeros.t().contiguous(), self.group, self.shape)

    def _zeros(self) -> torch.Tensor:
        """Zero points uint8 [stored groups, out]."""
        words = _read(self.zeros)
        if self.quantization.method == "awq":
            return _awq_columns(words)
        stored = unpack_codes(words.view(torch.uint8), words.shape[1] * _PER_WORD)
        if self.quantization.symmetric and bool((stored == _MIDDLE).all()):
            return stored  # newer programs write the second format under the first one's name
        return stored + self.quantization.zero_offset


def _read(entry: TensorEntry) -> torch.Tensor:
    assert entry.path is not None
    raw = read_bytes(entry.path, entry.name, entry.offset, entry.nbytes)
    return raw.view({**DTYPES, "I32": torch.int32}[entry.dtype]).view(entry.shape)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] -> codes uint8 [n, out]."""
    nibbles = unpack_codes(words.view(torch.uint8), words.shape[1] * _PER_WORD)
    return nibbles.view(words.shape[0], -1, _PER_WORD)[:, :, list(_AWQ_NIBBLE)].reshape(words.shape[0], -1)


def fold(
    quantization: Quantization,
    stored: Mapping[str, TensorEntry],
    table_name: Callable[[str], str | None],
    conv: set[str],
) -> tuple[dict[str, TensorEntry], dict[str, GroupedRecipe]]:
    """Replace the tensors of every quantized linear by one entry of its weight; return the entries and the recipes.

    ``table_name`` gives the table's name of a stored one, ``conv`` the table's weights that are stored [in, out].
    Raises ModelError, naming the tensor, on missing parts, wrong types or shapes, and act-order that has no exact form.
    """
    left = dict(stored)
    recipes: dict[str, GroupedRecipe] = {}
    for name in [name for name in stored if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        weight = f"{module}.weight"
        if weight in stored:
            raise ModelError(f"{stored[name].path}: {module} is there twice, with and without quantization")
        if any(skipped in module for skipped in quantization.skipped):
            raise ModelError(f"{stored[name].path}: tensor {name} is quantized, though modules_to_not_convert names it")
        transposed = table_name(weight) in conv
        recipe = _recipe(quantization, stored, module, transposed=transposed)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            left.pop(f"{module}.{part}", None)
        bias = stored.get(f"{module}.bias")
        if bias is not None and table_name(bias.name) is None:
            _check_no_bias(bias)
            del left[bias.name]
        shape = recipe.shape[::-1] if transposed else recipe.shape
        nbytes = math.prod(shape) * DTYPES[recipe.scales.dtype].itemsize
        left[weight] = TensorEntry(weight, recipe.scales.dtype, shape, None, 0, nbytes)
        recipes[weight] = recipe
    if not recipes:
        where = next((entry.path for entry in stored.values()), None)
        raise ModelError(f"{where}: quantization_config says {quantization.method}, but no tensor is quantized")
    return left, recipes


def _recipe(
    quantization: Quantization, stored: Mapping[str, TensorEntry], module: str, *, transposed: bool
) -> GroupedRecipe:
    parts = {}
    for part in ("qweight", "qzeros", "scales"):
        entry = stored.get(f"{module}.{part}")
        if entry is None:
            raise ModelError(f"{stored[module + '.qweight'].path}: tensor {module}.{part} is missing")
        expected = ("F16", "BF16") if part == "scales" else ("I32",)
        if entry.dtype not in expected or len(entry.shape) != 2:
            raise ModelError(
                f"{entry.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; it must be a matrix of "
                + " or ".join(expected)
            )
        parts[part] = entry
    rows, columns = parts["qweight"].shape
    gptq = quantization.method == "gptq"
    in_features, out_features = (rows * _PER_WORD, columns) if gptq else (rows, columns * _PER_WORD)
    groups = groups_of(in_features, quantization.group)
    for part, shape in (("scales", (groups, out_features)), ("qzeros", (groups, out_features // _PER_WORD))):
        if parts[part].shape != shape or out_features % _PER_WORD or in_features % _PER_WORD:
            raise ModelError(
                f"{parts[part].path}: tensor {module}.{part} has shape {list(parts[part].shape)}; {in_features} inputs "
                f"in groups of {quantization.group} and {out_features} outputs ask for {list(shape)}"
            )
    group, chosen = quantization.group, None
    index = stored.get(f"{module}.g_idx")
    if index is None and quantization.act_order:
        raise ModelError(f"{parts['qweight'].path}: tensor {module}.g_idx is missing, though desc_act is set")
    if index is not None:
        group, chosen = _order(index, in_features, quantization.group, groups)
    return GroupedRecipe(
        quantization,
        parts["qweight"],
        parts["qzeros"],
        parts["scales"],
        (out_features, in_features),
        group,
        chosen,
        transposed,
    )


def _order(entry: TensorEntry, in_features: int, group: int, groups: int) -> tuple[int, tuple[int, ...] | None]:
    """Return the group size under which neighbouring inputs share a group, and the stored group of each run of them.

    Act-order gives inputs to groups by their weight; only where whole runs of inputs stay together can groups of
    neighbours hold the same values.
    """
    if entry.dtype != "I32" or entry.shape != (in_features,):
        raise ModelError(
            f"{entry.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; it must be I32 [{in_features}]"
        )
    index = _read(entry)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ModelError(f"{entry.path}: tensor {entry.name} names a group beyond the {groups} there are")
    if torch.equal(index, torch.arange(in_features, dtype=torch.int32) // group):
        return group, None
    for size in sorted(GROUPS, reverse=True):
        if size <= group and in_features % size == 0:
            runs = index.view(-1, size)
            if bool((runs == runs[:, :1]).all()):
                return size, tuple(runs[:, 0].tolist())
    raise ModelError(
        f"{entry.path}: tensor {entry.name}: act-order (desc_act) mixes the groups of neighbouring inputs, which the "
        "group format cannot hold; use a checkpoint made without desc_act"
    )


def _check_no_bias(entry: TensorEntry) -> None:
    """Old programs write a bias of zeros for linears that have none."""
    if entry.dtype not in DTYPES or bool(_read(entry).any()):
        raise ModelError(f"{entry.path}: tensor {entry.name} is unexpected: this architecture has no bias there")
