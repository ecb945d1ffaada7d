"""Checks the tokenizers that flexbatch builds from GGUF vocabularies against llama.cpp's own test vectors.

    python scripts/check_vocabularies.py DIR [NAME ...]

DIR is ``models/`` of llama.cpp (the source distribution of llama-cpp-python on PyPI carries it below
``vendor/llama.cpp``): files ``ggml-vocab-NAME.gguf``, each with ``.inp`` (texts) and ``.out`` (token ids). Without
names, the four whose families flexbatch runs are checked. Exits with 1 if any text is encoded differently.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexbatch.text.codec import TextCodec

NAMES = ("llama-spm", "llama-bpe", "qwen2", "gpt-2")
SEPARATOR = "\n__ggml_vocab_test__\n"


def mismatches(vocabulary: Path) -> tuple[int, list[str]]:
    """Return the number of texts, and one line for each that is encoded differently."""
    texts = Path(f"{vocabulary}.inp").read_bytes().decode().split(SEPARATOR)
    ids = [tuple(map(int, line.split())) for line in Path(f"{vocabulary}.out").read_text().split("\n")]
    found = TextCodec.load(vocabulary).encode_many(texts, special_tokens=False)
    wrong = [
        f"{text!r}: {got}, not {expected}"
        for text, got, expected in zip(texts, found, ids, strict=True)
        if got != expected
    ]
    return len(texts), wrong


def main() -> None:
    """Check every named vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    options = parser.parse_args()
    failed = False
    for name in options.names:
        count, wrong = mismatches(options.folder / f"ggml-vocab-{name}.gguf")
        print(f"{name}: {count - len(wrong)} of {count} texts as llama.cpp has them")
        for line in wrong:
            print(f"  {line}")
        failed = failed or bool(wrong)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
