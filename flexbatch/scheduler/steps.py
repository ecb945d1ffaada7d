"""Steps: the tasks of a sweep, each bound to one resource. Plain data; what they do is the runtime's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexbatch.options import Resource as Resource

Kind = Literal[
    "read",  # weights of a group: disk -> host ring
    "upload",  # weights of a group: host -> GPU ring
    "adapter_read",  # LoRA adapters: disk -> arena in RAM
    "adapter_up",  # a group's part of adapters: arena -> pages on the GPU
    "gather",  # rows of the token embedding, from where the table rests
    "embed",
    "hidden_read",  # a waiting micro-batch's hidden state: disk -> host
    "hidden_up",  # host -> GPU
    "hidden_down",  # GPU -> host
    "hidden_write",  # host -> disk
    "kv_read",  # KV pages of a micro-batch: disk -> host
    "kv_up",  # host -> GPU
    "project",
    "qkv_down",  # what the CPU needs to attend: GPU -> host
    "attend",
    "attended_up",  # and its answer: host -> GPU
    "kv_down",  # pages that were written to: GPU -> host
    "kv_write",  # host -> disk
    "finish",
    "head",
]


@dataclass(frozen=True, slots=True)
class Step:
    """One task. ``id`` only grows, over all sweeps of a run; ``after`` are the ids of the Steps it waits for.

    ``group`` counts what a sweep visits: 0 the embedding, 1..L the layers, L+1 the head. ``batch`` is the micro-batch
    (-1: none), ``tokens`` how many tokens it carries; ``slot`` the buffer a transfer
    uses, of weights its first byte in their ring.
    """

    id: int
    kind: Kind
    resource: Resource
    group: int
    batch: int
    tokens: int
    after: tuple[int, ...]
    slot: int = 0
