"""Draws a trace that ``flexbatch run --trace`` wrote: ``draw_trace.py TRACE.json PICTURE.svg [--from S --to S]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexbatch.errors import FlexbatchError
from flexbatch.runtime.picture import draw


def main() -> int:
    """Draw what the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, metavar="TRACE.json")
    parser.add_argument("picture", type=Path, metavar="PICTURE.svg")
    parser.add_argument("--from", dest="start_s", type=float, metavar="S", help="where the picture begins, in seconds")
    parser.add_argument("--to", dest="end_s", type=float, metavar="S", help="where it ends")
    arguments = parser.parse_args()
    try:
        draw(arguments.trace, arguments.picture, start_s=arguments.start_s, end_s=arguments.end_s)
    except FlexbatchError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
