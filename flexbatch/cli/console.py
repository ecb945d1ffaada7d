"""What a person reads on stderr: one line at a time, never in the way of the job. Knows nothing of what is said."""

from __future__ import annotations

import sys
from contextlib import suppress


class Console:
    """stderr, or nothing with ``quiet``. A reader who went away does not stop the job."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @property
    def is_terminal(self) -> bool:
        """Whether a progress bar makes sense."""
        try:
            return sys.stderr is not None and sys.stderr.isatty()
        except ValueError:  # it was closed
            return False

    def say(self, text: str) -> None:
        """Write one line for people, unless quiet."""
        if not self.quiet:
            print_error(f"flexbatch: {text}")

    def warn(self, text: str) -> None:
        """Write one line that begins with ``warning``, unless quiet."""
        self.say(f"warning: {text}")


def print_error(text: str) -> None:
    """Write a line to stderr whatever was asked for; a closed stderr is let be."""
    if sys.stderr is None:  # started without one; print would take stdout instead
        return
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
