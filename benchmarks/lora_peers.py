"""PEFT with many LoRA adapters at once, in two ways: mixed in one batch, and merged into the weights one by one.

``Peer`` is PEFT in a process of its own, for an allocator's settings are those of a process: ours tells glibc to keep
some of what is freed; PEFT, whose tensors of whole batches are larger, is fastest where all of it is kept. This module,
run, is that process: it reads calls of ``Peft`` as lines of JSON and answers each with one.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

Prompts = Sequence[Sequence[int]]
Names = Sequence[str | None]


KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Settings with which glibc never gives memory back: PEFT does not fault its pages in again for every tensor."""


class Peer:
    """``Peft`` in its own process; ``keeps``: with an allocator that keeps what is freed. A context manager."""

    def __init__(self, model: str, adapters: Path, names: Names, *, dtype: str, new: int, keeps: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lora_peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(KEEPS if keeps else {})},
        )
        self._ask({"model": model, "adapters": str(adapters), "names": names, "dtype": dtype, "new": new})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def call(self, method: str, **arguments: Any) -> tuple[Any, float]:
        """What a method of ``Peft`` returns, and the seconds that the kernel worked for it."""
        answer = self._ask({"method": method, "arguments": arguments})
        return answer["result"], float(answer["kernel_s"])

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"PEFT's process ended with {self._process.wait()}")


class Peft:
    """A base model with the adapters of ``names``, all in ``dtype``; prompts are equally long."""

    def __init__(self, model: str, adapters: str, names: Names, *, dtype: str, new: int) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from transformers import AutoModelForCausalLM

        warnings.simplefilter("ignore")
        self._dtype = getattr(torch, dtype)
        self._adapters = Path(adapters)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype)
        self._new = new
        used = sorted({name for name in names if name is not None})
        self._adapted = bool(used)
        if used:
            self._model = PeftModel.from_pretrained(self._model, self._adapters / used[0], adapter_name=used[0])
            modules = self._model.base_model.model.named_modules()
            self._layers: dict[str, Any] = {name: each for name, each in modules if isinstance(each, LoraLayer)}
            for name in used:
                self._load(name)
        self._model.eval()

    def _load(self, name: str) -> None:
        """What ``load_adapter`` does without its walk over all modules and adapters: minutes for hundreds."""
        from peft import PeftConfig
        from safetensors.torch import load_file

        config: Any = PeftConfig.from_pretrained(str(self._adapters / name))
        config.inference_mode, config.init_lora_weights = True, False
        tensors = load_file(self._adapters / name / "adapter_model.safetensors")
        self._model.peft_config[name] = config
        for path, layer in self._layers.items():
            layer.update_layer(name, config.r, config.lora_alpha, config=config)
            for side, linear in (("A", layer.lora_A[name]), ("B", layer.lora_B[name])):
                linear.weight.data = tensors[f"base_model.model.{path}.lora_{side}.weight"].to(self._dtype)

    @torch.no_grad()
    def mixed(self, prompts: Prompts, names: Names, *, batch: int, new: int | None = None) -> float:
        """Seconds for all rows, ``batch`` at a time, each with its adapter."""
        started = time.perf_counter()
        for begin in range(0, len(prompts), batch):
            own = [name or "__base__" for name in names[begin : begin + batch]]
            mixed = {"adapter_names": own} if self._adapted else {}
            self._generate(prompts[begin : begin + batch], new or self._new, **mixed)
        return time.perf_counter() - started

    @torch.no_grad()
    def by_batch(self, prompts: Prompts, names: Names, sizes: Sequence[int], *, new: int) -> dict[int, float]:
        """Seconds that all rows would take by batch size: prompts, and as many times a token as is wanted.

        Measured with one and with 1 + ``new`` new tokens, after a round of the largest that is not counted.
        """
        expected: dict[int, float] = {}
        self.mixed(prompts, names, batch=max(sizes), new=1)
        for size in sizes:
            short, longer = (self.mixed(prompts, names, batch=size, new=count) for count in (1, 1 + new))
            expected[size] = short + (longer - short) / new * (self._new - 1)
        return expected

    @torch.no_grad()
    def merged(self, prompts: Prompts, names: Names, *, most: int) -> tuple[float, int]:
        """Seconds for the rows of the first ``most`` adapters, and how many rows these are.

        One adapter after the other is merged into the weights and taken out again, its rows in one batch.
        """
        rows = 0
        started = time.perf_counter()
        for name in sorted(set(names) - {None}, key=str)[:most]:
            self._model.set_adapter(name)
            self._model.merge_adapter()
            own = [prompt for prompt, other in zip(prompts, names, strict=True) if other == name]
            self._generate(own, self._new)
            self._model.unmerge_adapter()
            rows += len(own)
        return time.perf_counter() - started, rows

    def _generate(self, prompts: Prompts, new: int, **settings: Any) -> None:
        ids = torch.tensor(prompts)
        fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        done = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **settings)
        assert done.shape[1] == ids.shape[1] + new


def serve() -> None:
    """Read what to load, then calls; answer each."""
    peft = Peft(**json.loads(sys.stdin.readline()))
    print("{}", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        result = getattr(peft, message["method"])(**message["arguments"])
        kernel = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
        print(json.dumps({"result": result, "kernel_s": kernel}), flush=True)


if __name__ == "__main__":
    serve()
