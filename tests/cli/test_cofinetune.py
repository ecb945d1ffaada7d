"""``flexbatch run --finetune`` with a real model: both jobs give what each gives alone, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexbatch.cli.backend import Backend
from flexbatch.cli.main import main
from flexbatch.finetune.companion import Companion
from flexbatch.finetune.start import parameters_of
from tests.tiny import tiny_checkpoint

TRAINING = (
    "--rank",
    "2",
    "--batch-size",
    "2",
    "--grad-accumulation",
    "2",
    "--learning-rate",
    "0.01",
    "--save-every",
    "1",
)
NAME = "adapter_model.safetensors"


class Both:
    """A model, rows to generate for and rows to train on, and what each job gives alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint(folder / "model", "llama")
        rng = random.Random(1)
        rows = [{"prompt": [rng.randrange(3, 149) for _ in range(rng.randint(2, 9))]} for _ in range(12)]
        data = [{**row, "completion": row["prompt"][::-1] * rng.randint(1, 3)} for row in rows[:7]]
        self.write("rows.jsonl", rows)
        self.write("data.jsonl", data)

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.folder / name

    def run(self, name: str, *options: str, tuned: bool = True, backend: Backend | None = None) -> int:
        words = ["run", "--model", str(self.model), "-i", str(self.folder / "rows.jsonl"), "-o", str(self.text(name))]
        words += ["--max-tokens", "8", "--ignore-eos", "--max-sequences", "3", "--stats", str(self.folder / name)]
        if tuned:
            words += ["--finetune", str(self.folder / "data.jsonl"), "--adapter-output", str(self.adapter(name))]
            words += TRAINING
        return main([*words, *options], backend)

    def finetune(self, name: str, *options: str) -> int:
        words = ["finetune", "--model", str(self.model), "--data", str(self.folder / "data.jsonl")]
        return main([*words, "-o", str(self.adapter(name)), *TRAINING, *options])

    def text(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def adapter(self, name: str) -> Path:
        return self.folder / f"{name}-adapter"

    def stats(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name).read_text())
        return found

    def difference(self, one: str, two: str) -> float:
        """The norm of the difference of two adapters over the norm of the first."""
        tensors = [load_file(self.adapter(name) / NAME) for name in (one, two)]
        assert tensors[0].keys() == tensors[1].keys()
        gap = torch.stack([(tensors[0][name] - tensors[1][name]).norm() for name in tensors[0]]).norm()
        return float(gap / torch.stack([tensor.norm() for tensor in tensors[0].values()]).norm())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Both:
    both = Both(tmp_path_factory.mktemp("both"))
    assert both.run("alone", tuned=False) == 0
    assert both.finetune("alone") == 0
    return both


@pytest.fixture
def both(shared: Both, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Both:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shared


class Ready(Companion):
    """Lets generation begin only when training has asked for something: otherwise it may be over before that."""

    def start(self) -> None:
        super().start()
        while self.trainer._asked.empty() and self._running is not None:
            time.sleep(0.001)


class Ordered(Backend):
    """Backward in the order that is asked for."""

    def __init__(self, order: str | None, step: int | None = None) -> None:
        self.order = order
        self.step = step
        self.orders: list[str] = []

    def companion(self, job: Any, observe: Any, *, share: float) -> Companion:
        def watched(progress: Any) -> None:
            if progress.step == self.step:
                self.step = None
                os.kill(os.getpid(), signal.SIGTERM)
            observe(progress)

        return Ready(job, parameters_of(job.task), watched, share=share, order=self.order)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ("riding", ()),
        ("reverse", ("--finetune-share", "0.9")),
        ("riding", ("--weights", "0,0,100", "--finetune-share", "0.9")),
        ("reverse", ("--weights", "0,0,100", "--finetune-share", "0.5", "--epochs", "2")),
        (None, ("--device", "sim", "--weights", "30,30,40")),
    ],
)
def test_both_jobs_give_what_each_gives_alone(order: str | None, options: tuple[str, ...], both: Both) -> None:
    name = "-".join([str(order), *options]).replace(",", "")
    assert both.run(name, *options, backend=Ordered(order)) == 0
    assert both.text(name).read_bytes() == both.text("alone").read_bytes()
    stats = both.stats(name)
    expected = "alone"
    if "--epochs" in options:
        expected = "alone twice"
        assert both.finetune(expected, "--epochs", "2") == 0
    assert both.difference(expected, name) < 1e-5
    record = json.loads((both.adapter(expected) / "training.json").read_text())["record"]
    assert stats["losses"] == pytest.approx(record["losses"], rel=1e-5)
    assert stats["tokens"] == record["tokens"]
    assert stats["completed"] == 12
    plan = stats["finetune"]["plan"]
    assert order is None or plan["order"] == order
    assert "tokens/s" in plan["reason"]
    shared_sweeps = {"riding": stats["finetune"]["sweeps_ridden"], "reverse": stats["finetune"]["pauses"]}
    assert shared_sweeps[plan["order"]] > 0
    assert not Path(f"{both.adapter(name)}.part").exists()


def test_an_interruption_keeps_both(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first step generation is under way, at the second perhaps not; neither changes what comes of it."""
    for step in (1, 2):
        name = f"broken {step}"
        assert both.run(name, backend=Ordered("riding", step)) == 143
        said = capsys.readouterr().err
        assert "continue with:" in said
        kept = Path(f"{both.adapter(name)}.part").is_dir()  # after the last step the adapter may be written yet
        assert ("steps are kept in" in said) == kept
        assert kept or step == 2
        assert both.run(name) == 0
        assert both.text(name).read_bytes() == both.text("alone").read_bytes()
        assert both.difference("alone", name) < 1e-5
        capsys.readouterr()


class Struck(SimpleQueue[Any]):
    """A queue whose reader is struck by a signal just after it has got something, before it can note what."""

    def __init__(self, after: int) -> None:
        self.after = after

    def _strike(self, item: Any) -> Any:
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGTERM)
        return item

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return self._strike(super().get(block, timeout))

    def get_nowait(self) -> Any:
        return self._strike(super().get_nowait())


class StruckBetween(Ordered):
    """A signal strikes between two lines of the thread that sweeps."""

    def __init__(self, order: str, after: int) -> None:
        super().__init__(order)
        self.after = after

    def companion(self, job: Any, observe: Any, *, share: float) -> Companion:
        companion = super().companion(job, observe, share=share)
        companion.trainer._asked = Struck(self.after)
        return companion


@pytest.mark.parametrize("order", ["riding", "reverse"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_signal_that_strikes_as_work_is_handed_over(order: str, after: int, both: Both) -> None:
    name = f"struck {order} {after}"
    assert both.run(name, "--finetune-share", "0.9", backend=StruckBetween(order, after)) == 143
    assert both.run(name) == 0
    assert both.text(name).read_bytes() == both.text("alone").read_bytes()
    assert both.difference("alone", name) < 1e-5


def test_a_signal_that_strikes_between_the_two_jobs(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation is over, and nobody does what is left of training yet."""

    def struck(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("flexbatch.cli.run.job_stats", struck)
        assert both.run("between") == 143
    assert both.run("between") == 0
    assert both.difference("alone", "between") < 1e-5


def test_one_of_the_two_may_be_done_already(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    assert both.run("early", tuned=False) == 0
    assert both.run("early") == 0  # training alone
    assert both.difference("alone", "early") == 0
    said = capsys.readouterr().err
    assert "early.jsonl is already complete" in said
    assert "2 steps" in said
    assert both.run("early") == 0
    said = capsys.readouterr().err
    assert "early-adapter is already complete: 2 steps" in said
    assert both.finetune("late") == 0
    assert both.run("late") == 0  # generation alone
    assert both.text("late").read_bytes() == both.text("alone").read_bytes()
    assert both.stats("late")["losses"] == both.stats("early")["losses"]


def test_a_training_that_diverges_does_not_stop_generation(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    assert both.run("wild", "--optimizer", "sgd", "--clip", "0", "--learning-rate", "1e9", "--epochs", "9") == 2
    assert "the training diverged" in capsys.readouterr().err
    assert both.text("wild").read_bytes() == both.text("alone").read_bytes()
    assert not both.adapter("wild").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--finetune", "data.jsonl"), "--adapter-output DIR"),
        (("--adapter-output", "x"), "--adapter-output: goes with --finetune"),
        (("--rank", "3"), "--rank: goes with --finetune"),
        (("--finetune-share", "0.2"), "--finetune-share: goes with --finetune"),
        (("--finetune", "data.jsonl", "--adapter-output", "x", "--finetune-share", "1"), "--finetune-share 1"),
        (("--finetune", "data.jsonl", "--adapter-output", "x", "--base-bits", "4"), "--base-bits 4"),
        (("--finetune", "data.jsonl", "--adapter-output", "x", "--weight-bits", "auto"), "--weight-bits auto"),
        (("--finetune", "none.jsonl", "--adapter-output", "x"), "none.jsonl: no such file"),
        (("--finetune", "data.jsonl", "--adapter-output", "out.jsonl"), "is the same file as --adapter-output"),
        (("--finetune", "bad.jsonl", "--adapter-output", "x"), "line 1"),
    ],
)
def test_mistakes(
    words: tuple[str, ...], complaint: str, both: Both, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(both.folder)
    both.write("bad.jsonl", [{"prompt": "x"}])
    assert main(["run", "--model", str(both.model), "-i", "rows.jsonl", "-o", "out.jsonl", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not (both.folder / "out.jsonl").exists()
    assert not (both.folder / "x.part").exists()


@pytest.mark.parametrize("profile", [None, "t4"])
def test_a_plan_of_both(profile: str | None, both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(both.model), "--prompt-len", "20", "--gen-len", "8", "--num-requests", "50"]
    words += ["--finetune", str(both.folder / "data.jsonl"), "--batch-size", "2", "--grad-accumulation", "2"]
    words += [] if profile is None else ["--profile", profile]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["finetune"]
    assert found["steps"] == 2
    both_jobs, alone = found["together"], found["alone"]
    assert both_jobs["order"] in ("riding", "reverse")
    assert both_jobs["share"] == 0.1
    assert 0 < both_jobs["predicted"]["tokens_per_s"] <= alone["predicted"]["tokens_per_s"] * 1.05
    assert alone["predicted"]["pass_s"] > 0
    tier = "cpu" if profile is None else "gpu"
    assert alone["memory"][tier]["adapters"] > 0
    assert main(words) == 0
    assert "finetuning" in capsys.readouterr().out
    assert main(["plan", "--model", str(both.model), "--rank", "3"]) == 2
    assert "--rank: goes with --finetune" in capsys.readouterr().err
