"""``python -m flexbatch``: the same program as ``flexbatch``."""

from __future__ import annotations

from flexbatch.cli.main import entry

if __name__ == "__main__":
    entry()
