"""Every family's logits at every position equal transformers', in fp32."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from tests.models.naive import load_weights, logits_of
from tests.tiny import ALL_VARIANTS, FAMILIES, load_oracle, tiny_checkpoint

TOLERANCE = 1e-4


def largest_difference(path: Path, length: int = 96) -> float:
    """Of logits, in parts of the largest of them."""
    shape, weights = load_weights(path)
    ids = torch.randint(0, shape.vocab_size, (length,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = load_oracle(path)(ids[None]).logits[0]
        got = logits_of(shape, weights, ids)
    assert got.shape == expected.shape == (length, shape.vocab_size)
    assert float(expected.std()) > 0.5, "logits too flat to show an error"
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, family: str, variant: str) -> None:
    tiny_checkpoint(tmp_path, family, variant, seed=11)
    assert largest_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_shape_drawn_anew_each_run(tmp_path: Path, family: str) -> None:
    seed = int(os.environ.get("FLEXBATCH_TEST_SEED", int.from_bytes(os.urandom(4))))
    tiny_checkpoint(tmp_path, family, "random", seed=seed, rng=random.Random(seed), shards=2)
    difference = largest_difference(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert difference < TOLERANCE, f"replay with FLEXBATCH_TEST_SEED={seed}: {difference} for {config}"


@pytest.mark.parametrize("window", [1, 5])
def test_window_counts_the_token_itself(tmp_path: Path, window: int) -> None:
    """A change outside of the window's reach (layers times window) leaves later logits alone; one inside does not."""
    tiny_checkpoint(tmp_path, "mistral", "plain")
    config = (tmp_path / "config.json").read_text().replace('"sliding_window": 8', f'"sliding_window": {window}')
    (tmp_path / "config.json").write_text(config)
    shape, weights = load_weights(tmp_path)
    assert shape.windows == (window,) * 3
    ids = torch.arange(20) + 3
    other = ids.clone()
    other[0] = 90
    changed = (logits_of(shape, weights, ids) - logits_of(shape, weights, other)).abs().amax(-1) > 0
    reach = 3 * (window - 1)
    assert changed[: reach + 1].all()
    assert not changed[reach + 1 :].any()


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """A tied head and the embedding are one stored tensor, whichever the checkpoint names."""
    from flexbatch.checkpoint.locate import locate
    from flexbatch.checkpoint.reader import open_checkpoint
    from flexbatch.models.registry import family_of

    tiny_checkpoint(tmp_path, "qwen3", "plain")
    folder = locate(str(tmp_path))
    table = family_of(folder.shape).table(folder.shape)
    entries = open_checkpoint(folder, table).entries
    assert table.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert entries["lm_head.weight"] is entries["model.embed_tokens.weight"]
