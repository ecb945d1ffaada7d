"""``flexbatch finetune`` against a model without weights: files, resuming, mistakes, and what is said."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flexbatch.finetune import plot
from tests.cli.conftest import Job

ROWS: list[dict[str, Any]] = [{"text": text} for text in ("abcd", "efg", "hi", "jklmnop", "q", "rs", "tuvw")]
SGD = ("--optimizer", "sgd", "--learning-rate", "0.001", "--lr-schedule", "constant", "--clip", "0")


class Tune:
    """``run(*options)`` is ``flexbatch finetune`` on ``rows.jsonl`` into ``adapter``."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.write(*ROWS)
        self.output = job.folder / "adapter"
        self.part = job.folder / "adapter.part"
        self.stats = job.folder / "stats.json"

    def run(self, *options: str, **backend: Any) -> int:
        words = ["finetune", "--model", "fake", "--data", str(self.job.input), "-o", str(self.output)]
        words += ["--batch-size", "2", "--stats", str(self.stats), *options]
        return self.job.main(words, **backend)

    @property
    def err(self) -> str:
        return self.job.err

    def losses(self) -> list[float]:
        values: list[float] = json.loads(self.stats.read_text())["losses"]
        return values

    def weights(self) -> bytes:
        return (self.output / "adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.part.glob("step-*")) if self.part.exists() else []


@pytest.fixture
def tune(job: Job) -> Tune:
    return Tune(job)


def test_an_adapter_from_rows(tune: Tune) -> None:
    assert tune.run("--epochs", "3", *SGD) == 0
    assert tune.job.out == ""
    assert "7 rows, 12 steps of 2 rows" in tune.err
    stats = json.loads(tune.stats.read_text())
    assert stats["steps"] == len(stats["losses"]) == 12
    assert stats["losses"][-1] < stats["losses"][0]
    length = sum(len(row["text"]) + 1 for row in ROWS)
    assert stats["tokens"] == 3 * length
    assert stats["trained_tokens"] == 3 * (length - len(ROWS))
    assert stats["tokens_per_s"] > 0
    assert stats["peak_activation_bytes"] == 1000
    names = {path.name for path in tune.output.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert not tune.part.exists()
    config = json.loads((tune.output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (16, 32, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == "fake"
    card = (tune.output / "README.md").read_text()
    assert "library_name: peft" in card
    assert "12 steps" in card
    assert f"{stats['losses'][-1]:.4f}" in card
    # What a fake trainer was given: rows in file order, two at a time, the mean over the tokens of the whole step.
    trainer = tune.job.backend.trainers[0]
    assert [rows for rows, _ in trainer.calls][:5] == [(97, 101), (104, 106), (113, 114), (116,), (97, 101)]
    assert trainer.calls[0][1] == pytest.approx(1 / 7)
    assert trainer.closed == 1


def test_accumulation_is_one_mean_over_all_tokens(tune: Tune) -> None:
    assert tune.run("--grad-accumulation", "4", "--max-steps", "5", *SGD) == 0
    together = tune.weights(), tune.losses()
    calls = tune.job.backend.trainers[0].calls
    assert len(calls) == 5 * 4
    assert {scale for _, scale in calls} == {1 / 23}
    assert tune.run("--batch-size", "7", "--max-steps", "5", "--overwrite", *SGD) == 0
    assert tune.losses() == pytest.approx(together[1], rel=1e-5)


def test_a_complete_output_is_left_alone(tune: Tune) -> None:
    assert tune.run(*SGD) == 0
    before = tune.weights()
    assert tune.run(*SGD) == 0
    assert "already complete: 4 steps" in tune.err
    assert tune.job.backend.trainers == []
    assert tune.run("--seed", "1", *SGD) == 2
    assert "exists, from a training that differs in seed (it was 0, now 1)" in tune.err
    assert tune.run("--overwrite", "--save-every", "1", *SGD) == 0
    assert tune.weights() == before
    (tune.output / "training.json").unlink()
    assert tune.run(*SGD) == 2
    assert "exists: choose another name, or replace it with --overwrite" in tune.err


@pytest.mark.parametrize("states", ["memory", "disk"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_the_same(tune: Tune, signal_number: int, states: str) -> None:
    options = ("--epochs", "4", "--weight-decay", "0.1", "--warmup-steps", "3", "--grad-accumulation", "2")
    assert tune.run(*options) == 0
    straight = tune.weights(), tune.losses()
    assert len(straight[1]) == 8
    rng = random.Random(signal_number)
    call = rng.randrange(3, 14)

    def kill(count: int) -> None:
        if count == call:
            os.kill(os.getpid(), signal_number)

    assert tune.run(*options, "--overwrite", "--optimizer-states", states, before_batch=kill) == 128 + signal_number
    steps = call // 4 * 2 + (1 if call % 4 >= 2 else 0)  # an epoch's four batches are two steps
    assert tune.checkpoints() == [f"step-{steps:08d}"]
    assert f"{steps} of 8 steps are kept" in tune.err
    assert "--overwrite" not in tune.err.splitlines()[-1]
    assert not tune.output.exists()
    # Where states rest and how often they are kept changes no result.
    assert tune.run(*options, "--save-every", "1") == 0
    assert f"{steps} steps are done" in tune.err
    assert (tune.weights(), tune.losses()) == straight
    assert tune.job.backend.sizes[0].examples_done == {0: 0, 1: 4}[steps % 2] + steps // 2 * 7
    assert not tune.part.exists()


class Died(BaseException):
    """The process is gone: nothing is cleaned up."""


class Mortal:
    """Dies at the ``moment``-th sync or rename."""

    def __init__(self, moment: int, patch: pytest.MonkeyPatch) -> None:
        self._left = moment
        self._fsync, self._rename = os.fsync, Path.rename
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(Path, "rename", lambda path, target: self.rename(path, target))

    def fsync(self, fd: int) -> None:
        self._tick()
        self._fsync(fd)

    def rename(self, path: Path, target: Path) -> Path:
        self._tick()
        return self._rename(path, target)

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Died


def test_death_at_every_file_operation(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rename or sync the process dies at, the next run ends with the same bytes."""
    options = ("--epochs", "2", "--save-every", "2")
    assert tune.run(*options) == 0
    straight = tune.weights(), tune.losses()
    monkeypatch.setattr(plot, "draw_losses", lambda *_: False)
    deaths = 0
    for moment in range(1, 200):
        with monkeypatch.context() as patch:
            Mortal(moment, patch)
            try:
                assert tune.run(*options, "--overwrite") == 0
                break
            except Died:
                deaths += 1
        assert tune.run(*options) == 0
        assert (tune.weights(), tune.losses()) == straight, moment
        assert not tune.part.exists()
    assert deaths > 12


def test_checkpoints_of_another_training_are_refused(tune: Tune) -> None:
    def kill(count: int) -> None:
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert tune.run(before_batch=kill) == 130
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        (("--learning-rate", "1"), {}, "learning_rate (it was 0.0002, now 1.0)"),
        (("--window", "7"), {}, "window (it was None, now 7)"),
        ((), {"model_hash": "m2"}, "what differs: the model"),
    ]
    for options, backend, said in cases:
        assert tune.run(*options, **backend) == 2
        assert "belongs to another training" in tune.err
        assert said in tune.err
        assert tune.checkpoints() == ["step-00000003"]
    tune.job.write(*ROWS, {"text": "more"})
    assert tune.run() == 2
    assert "the input file's content" in tune.err
    tune.job.write(*ROWS)
    (tune.part / "step-00000003" / "state.json").write_text("{")
    assert tune.run() == 2
    assert "cannot be continued" in tune.err
    assert tune.run("--overwrite") == 0


def test_two_runs_cannot_train_into_one_folder(tune: Tune) -> None:
    seen: list[int] = []

    def second(count: int) -> None:
        if count == 1:
            other = Tune.__new__(Tune)
            other.__dict__.update(tune.__dict__)
            seen.append(other.run())

    assert tune.run(before_batch=second) == 0
    assert seen == [2]


@pytest.mark.parametrize("what", ["loss", "gradient", "adapter"])
def test_a_training_that_diverges_ends_clearly(tune: Tune, what: str) -> None:
    options = ("--epochs", "3", "--save-every", "4", "--optimizer", "sgd", "--lr-schedule", "constant", "--clip", "0")
    rate = "1e9" if what == "adapter" else "0.001"
    bad = None if what == "adapter" else (what, 6)
    assert tune.run(*options, "--learning-rate", rate, bad=bad) == 2
    assert tune.err.splitlines()[-1].startswith("flexbatch: error: the training diverged: ")
    assert "--learning-rate" in tune.err
    assert not tune.output.exists()
    if what == "adapter":
        return
    assert f"the {what} of step 7 of 12 is nan" in tune.err
    assert tune.checkpoints() == ["step-00000006"]
    kept = load_file(tune.part / "step-00000006" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert f"{tune.part / 'step-00000006'} with --init-from" in tune.err


OPTION_FAULTS: list[tuple[tuple[str, ...], str]] = [
    (("--rank", "0"), "rank must be a whole number from 1"),
    (("--rank", "x"), "argument --rank: invalid int value"),
    (("--learning-rate", "nan"), "learning_rate must be a finite number"),
    (("--dropout", "1"), "dropout must be from 0 to below 1"),
    (("--base-bits", "8"), "argument --base-bits: invalid choice"),
    (("--optimizer", "adam"), "argument --optimizer: invalid choice"),
    (("--target-modules", "q_proj,,v_proj"), "target_modules must be all-linear or names of modules"),
    (("--rank", "8", "--init-from", "x"), "--rank: the adapter of --init-from x has its own"),
    (("--init-from", "/no/such"), "--init-from /no/such: adapter_config.json cannot be read"),
    (("--data", "/no/such/file"), "/no/such/file: no such file"),
    (("--output", "/no/such/dir/x"), "--output /no/such/dir/x: there is no folder /no/such/dir"),
    (("--output", "/"), "is a folder with other things in it"),
    (("--stats", "/"), "--stats /: is a folder"),
    (("--max-length", "61"), "--max-length 61: the model's window is 60"),
    (("--chat-template", "/no/such"), "--chat-template /no/such: cannot be read"),
    (("--colour",), "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize(("options", "said"), OPTION_FAULTS)
def test_a_wrong_option(tune: Tune, options: tuple[str, ...], said: str) -> None:
    assert tune.run(*options) == 2
    assert tune.err.startswith("flexbatch: error: ")
    assert said in tune.err
    assert tune.err.count("\n") == 1
    assert tune.job.files() == ["rows.jsonl"]
    assert tune.job.backend.trainers == []


def test_bad_rows_are_listed_before_the_model_loads(tune: Tune) -> None:
    tune.job.write({"text": "fine"}, {"text": "x" * 60}, {"prompt": "a"}, {"text": [1, 0x3000]})
    assert tune.run() == 2
    assert "1 of 4 rows invalid" in tune.err
    assert "  line 3: needs text" in tune.err
    tune.job.write({"text": "fine"}, {"text": "x" * 60}, {"text": [1, 0x3000]})
    assert tune.run() == 2
    assert "  line 2: the row has 61 tokens, the model's window 60" in tune.err
    assert "  line 3: token id 12288 is outside the vocabulary" in tune.err
    assert tune.job.backend.trainers == []
    assert tune.job.files() == ["rows.jsonl"]
    tune.job.write({"text": "fine"}, {"text": "x" * 60})
    assert tune.run("--max-length", "30") == 0
    assert "warning: 1 of 2 rows were cut to --max-length 30 tokens" in tune.err


def test_quiet_and_the_picture(tune: Tune) -> None:
    assert tune.run("--quiet", *SGD) == 0
    assert tune.err == ""
    picture = tune.job.folder / "adapter.loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        assert not picture.exists()
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_fault_in_the_trainer_keeps_what_was_saved(tune: Tune) -> None:
    def fail(count: int) -> None:
        if count == 3:
            raise RuntimeError("broken")

    assert tune.run("--save-every", "1", before_batch=fail) == 1
    assert "broken" in tune.err
    assert f"checkpoint {tune.part / 'step-00000003'} is kept: the same command goes on from there" in tune.err
    assert tune.checkpoints() == ["step-00000003"]
