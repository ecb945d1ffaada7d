"""What the products of a run allocate, counted tensor by tensor, against the working memory that its plan keeps."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.sampling import SamplingParams
from flexbatch.units import parse_shares
from tests.tiny import FAMILIES, tiny_checkpoint


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still live, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._known:
                self._made(leaf.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def rows(count: int, vocab: int, longest: int) -> list[TokenizedRequest]:
    rng = random.Random(count)
    made = []
    for index in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.randint(longest // 2, longest))]
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        made.append(TokenizedRequest(Request(str(index), params, tuple(prompt)), index, tuple(prompt)))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["100,0,0", "0,100,0"])
@pytest.mark.parametrize("bits", [16, 4])
def test_what_products_allocate_was_planned(family: str, kv: str, bits: Literal[16, 4], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family, "random", seed=5, rng=random.Random(5))
    folder = locate(str(tmp_path))
    requests = rows(40, folder.shape.vocab_size, 200)
    options = EngineOptions(device="sim", gpu_memory=64 << 20, kv=parse_shares(kv, "kv"), micro_batch=256, kv_bits=bits)
    with Engine(folder, None, options, Workload.of(requests)) as engine:
        with LiveBytes() as live:
            results = list(engine.run(requests))
        memory = engine.plan.memory["gpu"]
    assert all(result.finish_reason == "length" for result in results)
    assert live.now < live.most, "nothing was let go of: the count is broken"
    # Index tensors of a micro-batch come on top: a few words a token, and a mask a page.
    assert 0 < live.most <= memory.working + memory.hidden
