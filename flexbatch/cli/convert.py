"""``flexbatch convert``: a model prepared ahead of runs, in 4 bits or as it is, in a folder that ``--model`` takes."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flexbatch.cli.console import Console, print_error
from flexbatch.cli.progress import LoadMeter
from flexbatch.cli.signals import Interrupted, interruptible
from flexbatch.errors import ExitCode, UsageError
from flexbatch.units import format_size

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.text.codec import TextCodec

_SEQUENCE = 512  # tokens of the sample that are run together
_LARGEST_SAMPLE = 4 << 20  # bytes: a few kilobytes are enough, and every one of them passes through every layer
_LEAST_SAMPLE = 64  # tokens
OWN = "self"
"""What ``--calibrate`` takes instead of a file."""


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch convert``."""
    parser.add_argument("--model", required=True, help="a folder, a GGUF file, a hub id, a short name, or demo")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="the folder to make")
    parser.add_argument(
        "--weight-bits", type=_bits, default=16, metavar="16|4", help="default 16: as stored; 4 packs all layers"
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE|self",
        help="pack for text like FILE's, a few kilobytes, or (self) for text that the model writes; slower, more exact",
    )
    parser.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")


def run_convert(values: argparse.Namespace, command: Sequence[str]) -> ExitCode:
    """Convert a model. An interruption returns its exit code after saying how ``command`` goes on."""
    try:
        with interruptible():
            return _convert(values)
    except Interrupted as interrupted:
        print_error(f"flexbatch: interrupted; finished parts are kept; continue with:\n  {shlex.join(command)}")
        return interrupted.exit_code


def _convert(values: argparse.Namespace) -> ExitCode:
    console = Console(quiet=values.quiet)
    output: Path = values.output
    own = values.calibrate == OWN
    sample = None if values.calibrate is None or own else _read_sample(Path(values.calibrate))
    if values.calibrate is not None and values.weight_bits != 4:
        raise UsageError("--calibrate: goes with --weight-bits 4")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.absolute().parent}: make it first")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file: give a folder that is not there yet")
    from flexbatch.checkpoint.export import PlainPacker, export
    from flexbatch.checkpoint.four_bits import METHOD, open_weights
    from flexbatch.checkpoint.locate import locate
    from flexbatch.checkpoint.shards import identity_of
    from flexbatch.models.registry import family_of
    from flexbatch.runtime.calibrate import Calibrator
    from flexbatch.text.codec import TextCodec

    folder = locate(values.model)
    for warning in folder.warnings:
        console.warn(warning)
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = open_weights(folder, table)
    digest = OWN if own else "" if sample is None else hashlib.sha256(sample.encode()).hexdigest()
    identity = f"{checkpoint.fingerprint} {values.weight_bits} {digest}".strip()
    if output.is_dir() and any(output.iterdir()):
        if identity_of(output) == f"{METHOD} {identity}":
            console.say(f"{output} is already complete")
            return ExitCode.DONE
        raise UsageError(f"--output {output}: is there and not empty: give a folder that is not there yet")
    if output.is_dir():
        output.rmdir()  # empty: the finished folder takes its place
    codec = TextCodec.load_if_present(folder.path)
    texts: Sequence[Sequence[int]] | None = None
    if sample is not None:
        texts = _sequences(sample, Path(values.calibrate), folder, codec)

    def finish(place: Path) -> None:
        if folder.path.is_file() and codec is not None:
            codec.save(place)

    with closing(LoadMeter(console)) as meter:
        if own:
            from flexbatch.cli.own_text import own_text

            texts = own_text(values.model, folder.shape.vocab_size, folder.shape.max_positions, meter)
        packer = None
        if values.weight_bits == 4:
            packer = PlainPacker(checkpoint, table) if texts is None else Calibrator(folder.shape, checkpoint, texts)
        export(checkpoint, folder, table, output, packer, finish, identity=identity, progress=meter)
    size = sum(file.stat().st_size for file in output.iterdir())
    console.say(f"{output}: {format_size(size)}; give it to run with --model {shlex.quote(str(output))}")
    return ExitCode.DONE


def _read_sample(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_SAMPLE:
            size = format_size(_LARGEST_SAMPLE)
            raise UsageError(f"--calibrate {path}: is larger than {size}: a few kilobytes of text are enough")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--calibrate {path}: cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--calibrate {path}: is not UTF-8: give a text file") from None


def _sequences(sample: str, path: Path, folder: ModelFolder, codec: TextCodec | None) -> list[tuple[int, ...]]:
    if codec is None:
        raise UsageError(f"--calibrate: {folder.name} has no tokenizer to read the text with: leave it out")
    tokens = codec.encode(sample)
    if len(tokens) < _LEAST_SAMPLE:
        raise UsageError(f"--calibrate {path}: has {len(tokens)} tokens: give a few kilobytes of text")
    length = min(_SEQUENCE, folder.shape.max_positions)
    return [tokens[start : start + length] for start in range(0, len(tokens), length)]


def _bits(text: str) -> Literal[16, 4]:
    values: dict[str, Literal[16, 4]] = {"16": 16, "4": 4}
    if text not in values:
        raise UsageError(f"--weight-bits {text}: give 16 or 4")
    return values[text]
