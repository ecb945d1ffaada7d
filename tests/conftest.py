"""What holds for every test: no network, no threads left behind by tokenizers' forks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch, transformers or huggingface_hub, which read these once. Tiny models gain nothing from a
# second thread, and much is lost where several processes spin for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Plans are those of one imaginary machine, wherever the tests run, and nothing is measured.
os.environ["FLEXBATCH_PROFILE"] = str(Path(__file__).parent / "profile.json")

# A shell that starts the tests in the background has them ignore interrupts, which several tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow example is no failure: the machine may be busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(params=["compiled", "by_torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either set of a CPU's kernels: those that are compiled, and what serves where nothing can be."""
    import torch

    from flexbatch.kernels import native

    if request.param == "by_torch":
        monkeypatch.setattr(native, "usable", lambda _: False)
    else:
        assert native.usable(torch.float32)
    chosen: str = request.param
    return chosen


class _FailuresAtOnce:
    """Shows a failure when it happens: should a later test hang, it would not be shown at the end."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._reporter.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Registered where results come together, which with several processes is none of those that test."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(reporter))
