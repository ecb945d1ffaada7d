"""Brings the generated parts of the documents up to date, or with ``--check`` says which are stale.

Knows three marks, each in a comment on the line before a fenced block: ``help: COMMAND`` (the block is that command's
``--help``), ``test`` (bash or Python that must run; all of one document share a folder) and ``output`` (the block is
what the last ``test`` printed).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "cli.md")
_BLOCK = re.compile(
    r"^<!-- (?P<mark>help: [\w-]+|test|output) -->\n```(?P<language>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)


class StaleError(Exception):
    """A document cannot be brought up to date: one of its commands fails."""


def normalised(help_text: str) -> str:
    """Return a help text without what differs between Python versions: line breaks, and ``-i FILE, --input FILE``."""
    return " ".join(re.sub(r"(?<=\s)(-\w) [^\s,]+, (?=--)", r"\1, ", help_text).split())


def updated(text: str, run: Callable[[str, str], str]) -> str:
    """Return a document with its generated blocks renewed; ``run(language, code)`` executes code and returns stdout."""
    printed = ""

    def renew(match: re.Match[str]) -> str:
        nonlocal printed
        mark, body = match["mark"], match["body"]
        if mark == "test":
            printed = run(match["language"], body)
            return match[0]
        if mark == "output":
            fresh = printed
        else:
            fresh = run("bash", f"flexbatch {mark.removeprefix('help: ')} --help")
            if normalised(fresh) == normalised(body):
                return match[0]
        return f"<!-- {mark} -->\n```{match['language']}\n{fresh.rstrip()}\n```"

    return _BLOCK.sub(renew, text)


def runner(folder: Path) -> Callable[[str, str], str]:
    """Return a function that executes code in ``folder``, where ``flexbatch`` is this clone's and ``examples`` lies."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    program = folder / ".bin" / "flexbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flexbatch "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = {
        **os.environ,
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "PATH": os.pathsep.join([str(program.parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }

    def run(language: str, code: str) -> str:
        command = {"bash": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}[language]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise StaleError(f"exit code {done.returncode} from\n{code}\n{done.stdout}{done.stderr}")
        return done.stdout

    return run


def main() -> int:
    """Renew or check the documents named on the command line, or all; return 1 when a check finds a stale one."""
    parser = argparse.ArgumentParser(description="Renew the generated blocks of the documents.")
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a document is stale")
    arguments = parser.parse_args()
    status = 0
    for document in arguments.documents:
        old = document.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            try:
                new = updated(old, runner(Path(folder)))
            except StaleError as error:
                print(f"{document}: {error}", file=sys.stderr)
                status = 1
                continue
        if new == old:
            continue
        if arguments.check:
            print(f"{document} is stale: run scripts/update_docs.py", file=sys.stderr)
            status = 1
        else:
            document.write_text(new, encoding="utf-8")
            print(f"{document} renewed", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
