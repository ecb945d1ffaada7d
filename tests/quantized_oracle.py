"""transformers with weights that went through 4 bits: the oracle of ``weight_bits=4``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.packed import packable
from flexbatch.compression.groups import dequantize
from flexbatch.compression.quantize import quantize
from flexbatch.models.registry import family_of
from tests.tiny import load_oracle


def quantized_oracle(path: Path) -> Any:
    """transformers' model, its layers' linear weights replaced by what 4 bits make of them."""
    shape = locate(str(path)).shape
    model = load_oracle(path)
    parameters = dict(model.named_parameters())
    for name, kind in packable(family_of(shape).table(shape)).items():
        found = parameters.get(name, parameters.get(f"model.{name}"))
        assert found is not None, name
        weight = found.data.t() if kind.transposed else found.data
        kept = dequantize(quantize(weight.contiguous()))
        found.data.copy_(kept.t() if kind.transposed else kept)
    return model
