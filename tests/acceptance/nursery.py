"""Starts ``flexbatch`` again and again without importing its libraries again: reads arguments, forks, says who runs.

One line of JSON in (the arguments), the child's process id out; one more line in, then its exit status out: so the id
stands for the child until whoever asked is done with it. A child is a process
of its own in every respect that matters to a test that kills it.
"""

from __future__ import annotations

import json
import os
import sys

import torch  # noqa: F401
import transformers  # noqa: F401

import flexbatch.finetune.start
import flexbatch.text.codec  # noqa: F401
from flexbatch.cli.main import main

if __name__ == "__main__":
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            os._exit(main(json.loads(line)))
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
