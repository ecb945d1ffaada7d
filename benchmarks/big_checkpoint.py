"""Writes a checkpoint of random weights in real shapes, for runs that have to read gigabytes from disk.

    python benchmarks/big_checkpoint.py qwen2-1.5b DIR      (3.1 GB)
    python benchmarks/big_checkpoint.py NAME DIR --layers N (fewer or more layers than NAME has)

NAME is a short name whose configuration the package carries. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.models.registry import family_of


def write(name: str, folder: Path, layers: int | None = None) -> int:
    """Write the checkpoint and return its size in bytes."""
    model = locate(name, dummy=True)
    config = dict(model.config)
    if layers is not None:
        config["num_hidden_layers"] = layers
        windows = (model.shape.windows * layers)[:layers]
        model = replace(model, config=config, shape=replace(model.shape, num_layers=layers, windows=windows))
    checkpoint = open_checkpoint(model, family_of(model.shape).table(model.shape))
    entries = {entry.name: entry for entry in checkpoint.entries.values()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries.values():
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for entry in entries.values():
            stream.write(checkpoint.read(entry).flatten().view(torch.uint8).numpy().data)
    return offset


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    print(write(options.name, options.folder, options.layers), "bytes")


if __name__ == "__main__":
    main()
