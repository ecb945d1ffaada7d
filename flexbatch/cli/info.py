"""``flexbatch info``: what a model is and what it takes, from its configuration alone. Reads and fetches no weights."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from flexbatch.cli.console import Console
from flexbatch.errors import ExitCode
from flexbatch.units import format_size

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder


def add_info_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch info``."""
    parser.add_argument(
        "--model", required=True, help="a folder, a GGUF file, a hub id, a short name such as opt-30b, or demo"
    )
    parser.add_argument("--json", action="store_true", help="write JSON")


def run_info(values: argparse.Namespace) -> ExitCode:
    """Print what is known of a model to stdout."""
    from flexbatch.checkpoint.locate import locate

    folder = locate(values.model, dummy=True)
    for warning in folder.warnings:
        Console().warn(warning)
    facts = describe(folder)
    print(json.dumps(facts, ensure_ascii=False) if values.json else "\n".join(_lines(facts)))
    return ExitCode.DONE


def describe(folder: ModelFolder) -> dict[str, Any]:
    """Return a model's facts: counts, and sizes in bytes for 16-bit and 32-bit compute."""
    from flexbatch.models.registry import family_of
    from flexbatch.models.spec import model_size
    from flexbatch.policy.footprint import DTYPE_BYTES

    shape = folder.shape
    size = model_size(shape, family_of(shape).table(shape))
    parts = {group.name: group.elements for group in size.groups}
    windows = sorted({window for window in shape.windows if window is not None})
    return {
        "model": folder.name,
        "path": str(folder.path),
        "family": shape.family,
        "architecture": shape.architecture,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_positions": shape.max_positions,
        "sliding_windows": windows,
        "tie_embeddings": shape.tie_embeddings,
        "stored_dtype": shape.stored_dtype,
        "format": _format(folder),
        "eos_token_ids": list(shape.eos_token_ids),
        "parameters": sum(parts.values()),
        "weight_bytes": size.weight_bytes(shape.stored_dtype),
        "largest_group_bytes": max(parts.values()) * DTYPE_BYTES[shape.stored_dtype],
        "kv_bytes_per_token": {dtype: size.kv_token_bytes(dtype) for dtype in ("float16", "float32")},
        "hidden_bytes_per_token": {dtype: size.hidden_token_bytes(dtype) for dtype in ("float16", "float32")},
        "supported": ["generate", "score"],
    }


def _format(folder: ModelFolder) -> str:
    """How the weights are stored: the types in a GGUF file, the method of a 4-bit checkpoint, else 16 or 32 bit."""
    from collections import Counter

    from flexbatch.checkpoint.gguf_file import read_gguf
    from flexbatch.config_quantization import read_quantization

    if folder.path.is_file():
        tensors = read_gguf(folder.path).tensors.values()
        kinds = Counter(tensor.kind for tensor in tensors).most_common()
        size = format_size(sum(tensor.nbytes for tensor in tensors))
        return "GGUF, " + ", ".join(f"{count} tensors {kind}" for kind, count in kinds) + f"; {size}"
    quantization = read_quantization(folder.shape.architecture, folder.config)
    if quantization is not None:
        name = "converted" if quantization.method == "flexbatch" else quantization.method.upper()
        return f"{name}, 4 bits, groups of {quantization.group}"
    return folder.shape.stored_dtype


def _lines(facts: dict[str, Any]) -> list[str]:
    kv, hidden = facts["kv_bytes_per_token"], facts["hidden_bytes_per_token"]
    windows = ", ".join(str(window) for window in facts["sliding_windows"])
    rows = {
        "model": f"{facts['model']} ({facts['path']})",
        "family": f"{facts['family']} ({facts['architecture']})",
        "layers": f"{facts['num_layers']}, hidden size {facts['hidden_size']}, MLP {facts['intermediate_size']}",
        "attention": f"{facts['num_heads']} heads, {facts['num_kv_heads']} for KV, of size {facts['head_dim']}"
        + (f", sliding window {windows}" if windows else ""),
        "vocabulary": f"{facts['vocab_size']}" + (", embeddings tied" if facts["tie_embeddings"] else ""),
        "window": f"{facts['max_positions']} tokens",
        "parameters": f"{facts['parameters']:,}",
        "format": facts["format"],
        "weights": f"{format_size(facts['weight_bytes'])} in {facts['stored_dtype']}, "
        f"the largest part {format_size(facts['largest_group_bytes'])}",
        "KV cache": f"{format_size(kv['float16'])} per token in 16 bit, {format_size(kv['float32'])} in float32",
        "hidden": f"{format_size(hidden['float16'])} per token in 16 bit, {format_size(hidden['float32'])} in float32",
        "supported": ", ".join(facts["supported"]),
    }
    width = max(len(name) for name in rows)
    return [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
