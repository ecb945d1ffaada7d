"""Corrupted model files with a fixed seed: refused in one line, or read as other programs read them; nothing else.

FLEXBATCH_FUZZ_CASES sets how many are tried.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from pathlib import Path

from tests.checkpoint.fuzzing import Fuzz

CASES = int(os.environ.get("FLEXBATCH_FUZZ_CASES", "2000"))
_ROOM_KB = 200_000


def test_corrupted_files_are_refused_or_read_as_others_read_them(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path)
    for number in range(8):
        fuzz.case(number)  # imports and first uses take memory of their own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers: Counter[str] = Counter()
    for number in range(CASES):
        try:
            answers[fuzz.case(number)] += 1
        except BaseException as error:
            error.add_note(f"case {number}")
            raise
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _ROOM_KB
    # Neither is everything refused, nor do corruptions go unnoticed.
    assert answers["refused"] > CASES * 0.6, answers
    assert answers["accepted"] > CASES * 0.05, answers
