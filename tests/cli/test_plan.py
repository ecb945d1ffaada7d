"""``flexbatch plan`` and ``run --plan``: figures that add up, machines one does not have, and clear mistakes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import ASSETS
from flexbatch.cli.main import main
from flexbatch.policy.machines import load_profile, machine_of, profile_text
from flexbatch.policy.profile import HardwareProfile
from flexbatch.runtime import profile_cache
from flexbatch.runtime.measure import QUICK
from flexbatch.runtime.steady import Patience
from flexbatch.text.codec import TextCodec
from flexbatch.units import GIB, MIB, Shares
from tests.cli.conftest import Job

# PuLP 3 announces names that PuLP 4 will give; both work with what pyproject asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*PuLP 4:DeprecationWarning")
SHORT = ["--prompt-len", "64", "--gen-len", "16", "--num-requests", "40"]


class Program:
    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture
        self.out = self.err = ""

    def plan(self, model: str, *words: str) -> int:
        code = main(["plan", "--model", model, *words])
        self.out, self.err = self._capture.readouterr()
        return code

    def json(self, model: str, *words: str) -> dict[str, Any]:
        assert self.plan(model, "--json", *words) == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Measurements take no time worth mentioning; the cache is empty; the network is not asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short = Patience(0.5, 2, 0.02)
    tiny = replace(QUICK, rows=(1, 64, 512), patience=short, disk=short, pool=8 * MIB, file=4 * MIB, piece=MIB)
    monkeypatch.setattr(profile_cache, "_EFFORTS", {"full": tiny, "quick": tiny})
    return Program(tmp_path, capsys)


def check_sums(plan: dict[str, Any]) -> None:
    for name in ("weights", "kv", "hidden"):
        assert sum(plan[name].values()) == pytest.approx(1)
    for used in plan["memory"].values():
        parts = sum(used[name] for name in ("weights", "kv", "hidden", "adapters", "working"))
        assert parts == used["total"] <= used["budget"]


def test_a_machine_that_is_not_here_and_a_model_without_weights(program: Program) -> None:
    plan = program.json(
        "opt-175b", "--profile", "t4", "--prompt-len", "512", "--gen-len", "32", "--num-requests", "300"
    )
    assert program.err == ""
    check_sums(plan)
    profile = load_profile("t4")
    assert plan["workload"] == {"prompt_len": 512, "gen_len": 32, "num_requests": 300}
    assert plan["hardware"] == profile.name
    assert plan["dtype"] == "float16"
    budgets = {tier: memory["budget"] for tier, memory in plan["memory"].items()}
    assert budgets == {
        "gpu": int(0.9 * profile.memory["gpu"]),
        "cpu": int(0.8 * profile.memory["cpu"]),
        "disk": int(0.9 * profile.memory["disk"]),
    }
    assert set(plan["predicted"]) >= {"throughput_tok_s", "sweep_s", "bottleneck", "resource_s"}
    # 350 GB of weights in 16 bit: most of them lie on disk, and reading them is what takes the time.
    assert plan["weights"]["disk"] > 0.4
    assert plan["predicted"]["sweep_s"] >= plan["weights"]["disk"] * 349e9 / profile.links["disk_read"] * 0.99
    assert plan["gains"]["twice_as_fast"]["disk_read"] > 0.02


def test_given_budgets_and_placement_are_kept(program: Program) -> None:
    words = ["--gpu-memory", "8GiB", "--cpu-memory", "64GiB", "--disk-memory", "100GB", "--weights", "10,90,0"]
    plan = program.json("opt-13b", "--profile", "a10g", *words, "--max-sequences", "17", *SHORT)
    check_sums(plan)
    assert {tier: used["budget"] for tier, used in plan["memory"].items()} == {
        "gpu": 8 * GIB,
        "cpu": 64 * GIB,
        "disk": 100 * 10**9,
    }
    assert plan["weights"]["gpu"] == pytest.approx(0.1, abs=0.01)
    assert plan["max_sequences"] <= 17


def test_the_table_says_what_the_json_says(program: Program) -> None:
    words = ["--profile", "rtx3060", "--prompt-len", "256", "--gen-len", "64", "--num-requests", "500"]
    plan = program.json("llama-3.1-8b", *words)
    assert program.plan("llama-3.1-8b", *words) == 0
    assert program.err == ""
    lines = program.out.splitlines()
    assert lines[0] == f"llama-3.1-8b on {plan['hardware']}"
    assert lines[1] == "500 rows of 256 + 64 tokens"
    rate = re.search(r"^prediction +([\d.]+) tokens/s", program.out, re.MULTILINE)
    assert rate is not None
    assert float(rate[1]) == pytest.approx(plan["predicted"]["throughput_tok_s"], rel=0.01)
    table = {line.split("  ")[0]: line for line in lines}
    assert f"{100 * plan['weights']['gpu']:.1f}%" in table["weights"]
    assert f"{plan['memory']['cpu']['budget'] / GIB:.1f} GiB" in table["budget"]
    assert f"{plan['max_sequences']} sequences" in table["block"]
    assert set(table) >= {"KV cache", "total", "precision", "busy", "binds", "one more GB", "twice as fast"}
    assert max(map(len, lines)) <= 140


def test_this_machine_is_measured_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = program.json("demo", "--device", "cpu", *SHORT)
    check_sums(plan)
    assert plan["memory"]["gpu"]["budget"] == 0
    assert plan["predicted"]["throughput_tok_s"] > 0

    def again(*_: Any, **__: Any) -> HardwareProfile:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(profile_cache, "measure", again)
    assert program.json("demo", "--device", "cpu", *SHORT)["hardware"] == plan["hardware"]


def test_the_lengths_of_real_rows(program: Program) -> None:
    texts = ["Once upon a time", "The", "A long story about a small dog " * 3]
    path = program.folder / "rows.jsonl"
    rows = 20 * ([{"prompt": text} for text in texts] + [{"prompt": [1] * 9, "max_tokens": 5}])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = TextCodec.load_if_present(ASSETS / "demo")
    assert codec is not None
    lengths = [*(len(codec.encode(text)) for text in texts), 9]
    plan = program.json("demo", "--device", "cpu", "--input", str(path), "--max-tokens", "7")
    assert plan["workload"] == {"prompt_len": sum(lengths) / 4, "gen_len": (3 * 7 + 5) / 4, "num_requests": 80}
    assert plan["predicted"]["job_s"] > 0


def test_rows_for_a_model_without_a_tokenizer(program: Program) -> None:
    path = program.folder / "rows.jsonl"
    path.write_text(40 * ('{"prompt": "' + "x" * 400 + '"}\n{"prompt": [5, 6, 7, 8]}\n'))
    plan = program.json("opt-125m", "--profile", "l4", "-i", str(path))
    assert plan["workload"]["prompt_len"] == (100 + 4) / 2
    assert program.err.count("\n") == 1
    assert "no tokenizer" in program.err
    path.write_text(40 * '{"prompt": [5, 6, 7, 8]}\n')
    assert program.json("opt-125m", "--profile", "l4", "-i", str(path))["workload"]["prompt_len"] == 4
    assert program.err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--profile", "t5"], "--profile t5: neither a file nor a shipped machine"),
        (["--profile", "t4", "--prompt-len", "0"], "--prompt-len 0: give a whole number"),
        (["--profile", "t4", "--gen-len", "many"], "--gen-len many: give a whole number"),
        (["--profile", "t4", "--prompt-len", "5000"], "--prompt-len 5000: opt-30b has a window of 2048 tokens"),
        (["--profile", "t4", "--dtype", "bfloat16"], "--dtype bfloat16: the profile t4"),
        (["--profile", "t4", "--max-tokens", "5"], "--max-tokens: goes with --input"),
        (["--profile", "t4", "--chat"], "--chat: goes with --input"),
        (["--profile", "t4", "-i", "rows.jsonl", "--gen-len", "5"], "--gen-len: the rows of --input have lengths"),
        (["--profile", "t4", "-i", "/missing.jsonl"], "/missing.jsonl"),
        (["--profile", "t4", "--plot", "x.bmp"], "--plot x.bmp: give a name that ends in .png"),
        (["--profile", "t4", "--plot", "/missing/x.png"], "there is no folder /missing"),
        (["--profile", "t4", "--weights", "50,50"], "--weights 50,50: write three percentages"),
        (["--profile", "t4", "--device", "cpu", "--weights", "50,50,0"], "--weights: this device has no GPU"),
    ],
)
def test_a_mistake_is_one_line(program: Program, words: list[str], expected: str) -> None:
    assert program.plan("opt-30b", *words) == 2
    assert program.out == ""
    assert program.err.count("\n") == 1
    assert expected in program.err


def test_what_does_not_fit(program: Program) -> None:
    words = ["--profile", "t4", "--gpu-memory", "1MiB", "--cpu-memory", "1GiB"]
    assert program.plan("opt-30b", *words, *SHORT) == 4
    assert program.err.count("\n") == 1
    assert re.search(r"missing.*--(gpu|cpu)-memory", program.err)


def test_a_profile_without_a_gpu(program: Program) -> None:
    profile = load_profile("t4")
    links = {name: profile.links[name] for name in ("disk_read", "disk_write")}
    memory = {name: profile.memory[name] for name in ("cpu", "disk")}
    path = program.folder / "mine.json"
    path.write_text(profile_text(replace(profile, gpu=None, links=links, memory=memory)))
    plan = program.json("opt-6.7b", "--profile", str(path), *SHORT)
    assert (plan["dtype"], plan["memory"]["gpu"]["budget"], plan["weights"]["gpu"]) == ("float32", 0, 0)
    assert program.plan("opt-6.7b", "--profile", str(path), "--device", "cuda", *SHORT) == 2
    assert "has no GPU: use --device cpu" in program.err


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "sim"])
def test_the_machine_of_a_profile(device: str) -> None:
    from flexbatch.options import EngineOptions

    machine = machine_of(load_profile("a10g"), EngineOptions(device=device), "bfloat16")
    on_gpu = device != "cpu"
    assert machine.compute == ("gpu" if on_gpu else "cpu")
    assert machine.dtype == ("bfloat16" if device in ("auto", "cuda") else "float32")
    assert bool(machine.gpu) == on_gpu
    old = machine_of(load_profile("t4"), EngineOptions(), "bfloat16")
    assert old.dtype == "float16"


def test_a_picture(program: Program) -> None:
    pytest.importorskip("matplotlib")
    path = program.folder / "plan.svg"
    assert program.plan("opt-6.7b", "--profile", "t4", "--plot", str(path), *SHORT) == 0
    text = path.read_text()
    assert text.startswith("<?xml")
    assert str(path) in program.err


def test_a_picture_needs_matplotlib(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    assert program.plan("opt-6.7b", "--profile", "t4", "--plot", str(program.folder / "x.png"), *SHORT) == 2
    assert "pip install 'flexbatch[plot]'" in program.err
    assert program.err.count("\n") == 1


# --- run --plan --------------------------------------------------------------------------------------------------


def test_a_run_follows_a_saved_plan(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    rows = program.folder / "rows.jsonl"
    rows.write_text('{"prompt": "Once upon a time"}\n{"prompt": "The cat"}\n')
    saved, stats = program.folder / "plan.json", program.folder / "stats.json"
    plan = program.json(
        "demo", "--device", "cpu", "-i", str(rows), "--max-tokens", "4", "--weights", "0,75,25", "--max-sequences", "1"
    )
    saved.write_text(json.dumps(plan))
    words = ["--max-tokens", "4", "--device", "cpu", "--plan", str(saved), "--stats", str(stats)]
    assert main(["run", "--model", "demo", "-i", str(rows), "-o", str(program.folder / "out.jsonl"), *words]) == 0
    capsys.readouterr()
    ran = json.loads(stats.read_text())["plan"]
    assert ran["max_sequences"] == 1
    for tier in ("gpu", "cpu", "disk"):
        assert ran["weights"][tier] == pytest.approx(plan["weights"][tier], abs=0.02)


def test_the_plan_reaches_the_engine(job: Job) -> None:
    plan = {
        "model": "fake",
        "weights": {"gpu": 0, "cpu": 0.5, "disk": 0.5},
        "kv": {"gpu": 0, "cpu": 1, "disk": 0},
        "hidden": {"gpu": 0, "cpu": 1, "disk": 0},
        "cpu_attention": 1,
        "weight_bits": 16,
        "kv_bits": 4,
        "micro_batch_tokens": 33,
        "max_sequences": 5,
    }
    (job.folder / "plan.json").write_text(json.dumps(plan))
    assert job.run("--plan", str(job.folder / "plan.json")) == 0, job.err
    (options,) = job.backend.options
    assert options.weights == Shares(0, 0.5, 0.5)
    assert (options.micro_batch, options.max_sequences, options.kv_bits) == (33, 5, 4)


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({"model": "opt-30b"}, [], "is a plan for opt-30b, not for fake"),
        ({"max_sequences": 0}, [], "max_sequences: 0: write a whole number"),
        ({}, ["--kv", "0,100,0"], "--kv: the plan given with --plan says that already"),
    ],
)
def test_a_plan_that_cannot_be_followed(job: Job, changes: dict[str, Any], words: list[str], expected: str) -> None:
    shares = {"gpu": 0, "cpu": 1, "disk": 0}
    plan = {"model": "fake", "weights": shares, "kv": shares, "hidden": shares, "cpu_attention": 1, "weight_bits": 16}
    plan |= {"kv_bits": 16, "micro_batch_tokens": 8, "max_sequences": 5, **changes}
    path = job.folder / "plan.json"
    path.write_text(json.dumps(plan))
    assert job.run("--plan", str(path), *words) == 2
    assert job.err.count("\n") == 1
    assert expected in job.err


def test_one_model_has_several_names(job: Job) -> None:
    from flexbatch.checkpoint.hub import canonical

    assert canonical("opt-30b") == canonical("OPT-30b") == canonical("facebook/opt-30b")
    assert canonical(str(job.folder)) == canonical(str(job.folder / ".." / job.folder.name))
    assert canonical("opt-30b") != canonical("opt-13b")
