"""Dropout whose masks follow from what a number is for, not from when it is drawn.

A mask depends on the seed, the example, the position, the module and the column alone. So it is the same when a layer
is computed again, in windows of any size, in any order, and nothing is kept of it but keys of four bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FINAL_1, _FINAL_2 = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)  # as signed numbers of 32 bits


def _mixed(keys: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers in which every bit depends on every other (splitmix64's, by Steele et al.)."""
    with np.errstate(over="ignore"):
        keys = keys + _GOLDEN
        keys = (keys ^ (keys >> np.uint64(30))) * _MIX_1
        keys = (keys ^ (keys >> np.uint64(27))) * _MIX_2
        mixed: np.ndarray = keys ^ (keys >> np.uint64(31))
    return mixed


def token_keys(seed: int, example: int, positions: np.ndarray) -> np.ndarray:
    """uint64 [T]: what tells the tokens of the ``example``-th example of a run from all others."""
    start = _mixed(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    start = _mixed(start ^ np.uint64(example))
    return _mixed(start ^ positions.astype(np.uint64))


@lru_cache(maxsize=16)
def _columns(width: int) -> Tensor:
    return _low_half(_mixed(np.arange(width, dtype=np.uint64)))


def _low_half(keys: np.ndarray) -> Tensor:
    return torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32))


@dataclass(frozen=True, slots=True)
class Dropout:
    """Drops with probability ``rate``. ``keys`` uint64 [T]: those of the tokens at hand."""

    rate: float
    keys: np.ndarray

    def rows(self, start: int, stop: int) -> Dropout:
        """The same for a part of the tokens."""
        return Dropout(self.rate, self.keys[start:stop])

    def apply(self, x: Tensor, module: int) -> Tensor:
        """[T, in] -> [T, in]: dropped where module ``module`` drops, the rest divided by what is kept on average."""
        rows = _low_half(_mixed(self.keys ^ np.uint64(module))).to(x.device)
        state = rows.unsqueeze(1) ^ _columns(x.shape[1]).to(x.device)
        state.mul_(_FINAL_1)
        state.bitwise_xor_(state >> 13)
        state.mul_(_FINAL_2)
        state.bitwise_xor_(state >> 16)
        kept = state >= int(self.rate * 2**32) - 2**31
        return torch.where(kept, x * (1 / (1 - self.rate)), 0.0)
