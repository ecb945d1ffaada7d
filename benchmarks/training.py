"""What benchmarks of finetuning share: an example whose tokens are all targets, and a Llama to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Row:
    """One example, every token but the first a target."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Self:
        """All of ``tokens``."""
        return cls(tuple(tokens), (False, *[True] * (len(tokens) - 1)))


def make_llama(shape: Mapping[str, Any], folder: Path | str, dtype: str = "float16") -> None:
    """Write a Llama of these shapes with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**shape), dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)
