"""How far a run is, and what it has computed: counts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexbatch.policy.footprint import ModelSize
from flexbatch.runtime.micro_batch import Readout
from flexbatch.scheduler.prefix_cache import PrefixCounts
from flexbatch.scheduler.sweep import Slice, Sweep


@dataclass(slots=True)
class RunProgress:
    """How far a run is; token counts are those of finished and running rows.

    ``computed_tokens`` of prompts are computed; others are shared with rows that have computed them. ``peak_kv_bytes``:
    the most that pages of finished runs held on each tier, on a GPU those of adapters included.
    """

    rows_done: int = 0
    rows_failed: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    preemptions: int = 0
    prefixes: PrefixCounts = field(default_factory=PrefixCounts)
    peak_kv_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts, computed or shared."""
        return self.computed_tokens + self.prefixes.tokens

    def count_pages(self, peaks: Mapping[str, int], page_bytes: int) -> None:
        """Note the most pages of ``page_bytes`` that a run held on each tier."""
        for tier, pages in peaks.items():
            self.peak_kv_bytes[tier] = max(self.peak_kv_bytes.get(tier, 0), pages * page_bytes)

    def count(self, size: ModelSize, sweep: Sweep, read: Sequence[tuple[Slice, Readout]]) -> None:
        """Add what ``sweep`` of a model of ``size`` computed and ``read`` off."""
        rows = 0
        pairs = 0
        for piece, readout in read:
            rows += (readout.token is not None) + len(readout.prompt_values)
            pairs += piece.count * piece.start + piece.count * (piece.count + 1) // 2
            self.computed_tokens += max(0, min(piece.stop, piece.sequence.prompt_len) - piece.start)
            self.completion_tokens += readout.token is not None
        self.linear_flops += size.linear_flops(sweep.tokens, rows)
        self.attention_flops += size.attention_flops(pairs)
