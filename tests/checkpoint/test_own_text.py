"""Packing for text that the model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM
from flexbatch.checkpoint.export import export
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.cli import own_text
from flexbatch.models.registry import family_of
from flexbatch.runtime.calibrate import Calibrator
from tests.checkpoint.test_four_bits import assert_same, convert, opened


def test_a_model_writes_the_text_that_it_is_packed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed is what packing for that text gives, and the text is the model's: it finds it likely."""
    written: list[list[list[int]]] = []
    write = own_text.own_text

    def noted(*arguments: Any) -> list[list[int]]:
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(own_text, "own_text", noted)
    monkeypatch.setattr(own_text, "ROWS", 6)
    monkeypatch.setattr(own_text, "TOKENS", 40)
    assert convert(Path("demo"), tmp_path / "own", "--weight-bits", "4", "--calibrate", "self") == 0
    (rows,) = written
    assert [len(row) for row in rows] == [40] * 6
    assert len({row[0] for row in rows}) == 6
    folder = locate("demo")
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = open_checkpoint(folder, table)
    packer = Calibrator(folder.shape, checkpoint, rows)
    export(
        checkpoint, folder, table, tmp_path / "given", packer, lambda _: None, identity="x", progress=lambda *_: None
    )
    assert_same(opened(tmp_path / "own"), opened(tmp_path / "given"))
    with LLM("demo") as llm:
        scores = llm.score([(row[:1], row[1:]) for row in rows])
    assert sum(score.logprob for score in scores) / (6 * 39) > -3  # of random tokens: about -13
