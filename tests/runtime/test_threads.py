"""A thread that keeps torch to itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch

from flexbatch.runtime.threads import keep_to_one_core


def in_a_thread(work: Callable[[], object]) -> object:
    found: list[object] = []
    thread = Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def two() -> None:
    """More than one thread, or there is nothing to see."""
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch without OpenMP")


@pytest.mark.usefixtures("two")
def test_only_the_calling_thread_is_kept_to_one_core() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)

        def kept() -> int:
            keep_to_one_core()
            return torch.get_num_threads()

        assert in_a_thread(kept) == 1
        assert torch.get_num_threads() == 3
        assert in_a_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


SCRIPT = """
import os, sys, threading, torch
from flexbatch.runtime.threads import keep_to_one_core

torch.set_num_threads(3)

def work():
    if sys.argv[1] == "alone":
        keep_to_one_core()
    torch.ones(1)
    count = len(os.listdir("/proc/self/task"))
    torch.randn(1 << 20).exp_()
    torch.randn(512, 512) @ torch.randn(512, 512)
    print(len(os.listdir("/proc/self/task")) - count)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.usefixtures("two")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
@pytest.mark.parametrize(("how", "team"), [("alone", 0), ("not", 2)])
def test_no_team_is_made_for_it(how: str, team: int) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == team
