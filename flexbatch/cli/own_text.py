"""Text that a model writes itself, for lack of any other: what ``flexbatch convert --calibrate self`` packs it for.

Every row begins with a token drawn at random and goes on as the model likes (in the manner of LLM-QAT, Liu et al.,
2023). The same model writes the same text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flexbatch.api import LLM
from flexbatch.sampling import SamplingParams

ROWS, TOKENS = 32, 128
_AT_ONCE = 16  # tokens of every row between two reports of progress
_TOP_K = 50


def own_text(model: str, vocab_size: int, longest: int, progress: Callable[[str, int, int], None]) -> list[list[int]]:
    """Token ids of ``ROWS`` rows of ``TOKENS`` tokens, or of ``longest`` if that is less.

    ``model`` is loaded with its stored weights for it, wherever they fit.
    """
    rng = np.random.default_rng(0)
    rows = [[int(token)] for token in rng.integers(vocab_size, size=ROWS)]
    length = min(TOKENS, longest)
    stage = "writing a text to pack for, tokens a row"
    with LLM(model, progress=progress) as llm:
        for written in range(1, length, _AT_ONCE):
            progress(stage, written, length)
            count = min(_AT_ONCE, length - written)
            settings = [
                SamplingParams(count, temperature=1.0, top_k=_TOP_K, seed=row * TOKENS + written, ignore_eos=True)
                for row in range(ROWS)
            ]
            for row, result in zip(rows, llm.generate([tuple(row) for row in rows], settings), strict=True):
                row += result.token_ids
    progress(stage, length, length)
    return rows
