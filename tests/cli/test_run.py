"""``flexbatch run`` with a fake model: outputs, resuming, and what may stand where the output goes."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flexbatch.cli.signals import Interrupted
from flexbatch.errors import InternalError
from flexbatch.jobs.rows import read_rows
from flexbatch.sampling import SamplingParams
from tests.cli.conftest import IDS, Job
from tests.jobs.test_journal import FullDisk

ROOT = Path(__file__).resolve().parents[2]


def crash(after: int) -> Any:
    def before(count: int) -> None:
        if count == after:
            raise InternalError("power cut")

    return before


def test_rows_come_out_in_input_order_and_format(job: Job) -> None:
    assert job.run() == 0
    native, tokens, completion, fourth, chat = job.results()
    assert native == {
        "id": "a",
        "text": "cba",
        "token_ids": [99, 98, 97],
        "finish_reason": "length",
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "error": None,
    }
    assert (tokens["id"], tokens["token_ids"]) == ("b", [101])
    assert (fourth["id"], fourth["text"], len(fourth["logprobs"]["tokens"])) == ("4", "\u2028 eßörg", 7)
    assert completion["custom_id"] == "c"
    assert completion["response"]["body"]["choices"][0]["text"] == "xyzzyx"
    assert completion["response"]["body"]["model"] == "fake"
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == "ih>resu<"
    assert chat["response"]["body"]["choices"][0]["logprobs"]["content"][0]["token"] == "i"
    digest = read_rows(str(job.input), SamplingParams()).rows[2].digest
    assert completion["response"]["body"]["id"] == f"cmpl-{digest}"
    assert job.files() == ["out.jsonl", "rows.jsonl"]
    assert job.out == ""
    assert job.backend.closed == 1
    assert "plan" in job.err
    assert "5 rows, 0 failed" in job.err


def test_quiet_is_quiet(job: Job) -> None:
    assert job.run("--quiet", warnings=("odd config",)) == 0
    assert job.err == ""
    assert job.run("--overwrite", warnings=("odd config",)) == 0
    assert "flexbatch: warning: odd config\n" in job.err


def test_options_reach_rows_and_engine(job: Job) -> None:
    options = ("--max-tokens", "2", "--logprobs", "0", "--dtype", "float16", "--max-sequences", "3", "--no-overlap")
    assert job.run(*options, "--weights", "20,80,0", "--weight-bits", "auto", "--cpu-memory", "1GiB") == 0
    assert [len(row["token_ids"]) for row in job.results() if "token_ids" in row] == [2, 1, 2]
    assert "logprobs" in job.results()[0]
    (engine,) = job.backend.options
    assert (engine.dtype, engine.max_sequences, engine.overlap, engine.cpu_memory) == ("float16", 3, False, 2**30)
    assert (engine.weight_bits, engine.kv_bits) == (None, 16)
    assert engine.weights is not None
    assert engine.weights.gpu == pytest.approx(0.2)


def test_chat_and_template(job: Job) -> None:
    (job.folder / "template").write_text("T")
    job.write({"prompt": "a"}, {"prompt": [65]}, {"messages": [{"role": "user", "content": "b"}]})
    assert job.run("--chat", "--chat-template", str(job.folder / "template")) == 0
    assert [row["text"] for row in job.results()] == ["a>resu<T", "A", "b>resu<T"]


def test_standard_input(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(job.input.read_bytes())))
    assert job.main(["run", "--model", "fake", "-i", "-", "-o", str(job.output)]) == 0
    assert [row.get("id", row.get("custom_id")) for row in job.results()][:2] == ["a", "b"]


def test_stats_and_trace(job: Job) -> None:
    stats, trace = job.folder / "stats.json", job.folder / "trace.json"
    job.write({"id": "a", "prompt": "abc"}, {"id": "bad", "prompt": "!"})
    assert job.run("--stats", str(stats), "--trace", str(trace)) == 3
    values = json.loads(stats.read_text())
    assert {name: values[name] for name in ("requests", "completed", "failed", "resumed", "completion_tokens")} == {
        "requests": 2,
        "completed": 1,
        "failed": 1,
        "resumed": 0,
        "completion_tokens": 3,
    }
    assert trace.read_text() == "[]"


def test_a_row_that_fails_alone(job: Job) -> None:
    job.write({"id": "a", "prompt": "!"}, {"id": "b", "prompt": "ok"})
    assert job.run() == 3
    first, second = job.results()
    assert first["error"] == {"type": "does_not_fit", "message": "too long for the cpu tier"}
    assert (first["finish_reason"], second["text"]) == ("error", "ko")


def test_skip_invalid(job: Job) -> None:
    bad_body = {"custom_id": "z", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "n": 2}}
    job.write({"id": "a", "prompt": "ok"}, "{broken", {"id": "a", "prompt": "again"}, bad_body, {"prompt": "x" * 61})
    assert job.run() == 2
    assert not job.part.exists()
    assert job.run("--skip-invalid") == 3
    good, broken, twin, body, long = job.results()
    assert (good["text"], good["error"]) == ("ko", None)
    assert broken["id"] == "2"
    assert broken["finish_reason"] == "error"
    assert broken["error"]["type"] == "invalid_request"
    assert broken["error"]["message"].startswith("line 2: not JSON")
    assert (twin["id"], twin["error"]["message"]) == ("a", "line 3: duplicate id 'a', first on line 1")
    assert (body["custom_id"], body["response"], body["error"]["code"]) == ("z", None, "invalid_request")
    assert "61 tokens" in long["error"]["message"]
    assert job.backend.computed == ["a"]


def test_a_file_of_invalid_rows_alone_needs_no_engine(job: Job) -> None:
    job.write("{broken")
    assert job.run("--skip-invalid", "--stats", str(job.folder / "s.json")) == 3
    assert len(job.results()) == 1
    assert job.backend.options == []
    assert json.loads((job.folder / "s.json").read_text())["failed"] == 1


def test_resuming_at_many_bytes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert job.run("--quiet") == 0
    expected = job.output.read_bytes()
    job.output.unlink()
    assert job.run("--quiet", before=crash(5)) == 1
    full = job.part.read_bytes()
    assert sorted(full.split(b"\n")[1:-1]) == sorted(expected.split(b"\n")[:-1])
    job.part.unlink()
    for size in range(0, len(full) + 1, 13):
        job.part.write_bytes(full[:size])
        assert job.run("--quiet") == 0
        done = max(0, full[: size + 1].count(b"\n") - 1)  # a row that lacks only its line end is done
        assert job.backend.computed == list(reversed(IDS[: 5 - done]))
        assert job.output.read_bytes() == expected
        assert not job.part.exists()
        job.output.unlink()


def test_a_resumed_run_keeps_what_auto_became(job: Job) -> None:
    assert job.run("--dtype", "bfloat16", "--weight-bits", "4", before=crash(2)) == 1
    assert job.run("--dtype", "float32", "--weight-bits", "4") == 2
    assert "dtype (it was 'bfloat16', now 'float32')" in job.err
    assert job.run("--weight-bits", "auto") == 0
    assert (job.backend.options[0].dtype, job.backend.options[0].weight_bits) == ("bfloat16", 4)
    assert len(job.backend.computed) == 3


def test_sizes_and_schedule_may_change_in_between(job: Job) -> None:
    assert job.run(before=crash(2)) == 1
    assert job.run("--schedule", "block", "--max-sequences", "1", "--cpu-memory", "3GiB") == 0
    assert job.backend.computed == ["c", "b", "a"]
    assert "2 of 5 rows are done" in job.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--temperature", "0.5"), "temperature (it was 0.0, now 0.5)"),
        (("--max-tokens", "7"), "max_tokens (it was 128, now 7)"),
        (("--stop", "x"), "stop (it was [], now ['x'])"),
        (("--seed", "1"), "seed (it was 0, now 1)"),
        (("--chat",), "chat (it was False, now True)"),
        (("--dummy-weights",), "dummy_weights"),
        (("--kv-bits", "4"), "kv_bits (it was 16, now 4)"),
    ],
)
def test_another_job_says_what_differs(job: Job, change: tuple[str, ...], said: str) -> None:
    assert job.run(before=crash(2)) == 1
    before = job.part.read_bytes()
    assert job.run(*change) == 2
    assert said in job.err
    assert f"{job.part} belongs to another job" in job.err
    assert job.err.count("\n") == 1
    assert "kept" not in job.err
    assert (job.part.read_bytes(), job.backend.options) == (before, [])
    assert job.run(*change, "--overwrite") == 0
    assert len(job.backend.computed) == 5


def test_another_input_or_model(job: Job) -> None:
    assert job.run(before=crash(2)) == 1
    assert job.run(model_hash="m2") == 2
    assert "what differs: the model:" in job.err
    job.input.write_text(job.input.read_text() + "\n")
    assert job.run() == 2
    assert "the input file's content" in job.err


def test_the_same_command_on_a_complete_output(job: Job) -> None:
    job.write({"id": "a", "prompt": "abc"})
    assert job.run() == 0
    before = job.output.stat()
    assert job.run() == 0
    assert "already complete" in job.err
    assert job.backend.options == []
    assert job.output.stat() == before
    assert job.run("--temperature", "1") == 2
    assert "temperature (it was 0.0, now 1.0)" in job.err
    job.output.write_text("mine\n")
    assert job.run() == 2
    assert f"{job.output}: exists" in job.err
    assert job.output.read_text() == "mine\n"
    assert job.run("--overwrite") == 0
    assert job.results()[0]["text"] == "cba"


def test_a_complete_output_with_failed_rows_says_so_again(job: Job) -> None:
    job.write({"id": "a", "prompt": "!"})
    assert job.run() == 3
    assert job.run() == 3
    assert "1 rows, 1 failed" in job.err


def test_a_crash_between_output_and_part_is_harmless(job: Job) -> None:
    assert job.run(before=crash(5)) == 1
    part = job.part.read_bytes()
    assert job.run() == 0
    expected = job.output.read_bytes()
    job.part.write_bytes(part)
    assert job.run() == 0
    assert (job.backend.computed, job.output.read_bytes(), job.part.exists()) == ([], expected, False)


def test_an_output_beside_an_unfinished_part_is_not_touched(job: Job) -> None:
    assert job.run(before=crash(2)) == 1
    job.output.write_text("mine\n")
    assert job.run() == 2
    assert f"{job.output} exists" in job.err
    assert job.output.read_text() == "mine\n"


def test_overwrite_keeps_the_old_output_until_the_model_is_there(job: Job) -> None:
    job.output.write_text("mine\n")
    job.write({"prompt": "x" * 61})
    assert job.run("--overwrite") == 2
    assert job.output.read_text() == "mine\n"
    job.write({"prompt": "x"})
    assert job.run("--overwrite", before=crash(0)) == 1
    assert not job.output.exists()


@pytest.mark.parametrize("room", [0, 40])
def test_a_full_disk_keeps_finished_rows(job: Job, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    def fill(count: int) -> None:
        if count == 3:
            monkeypatch.setattr(os, "write", FullDisk(room))

    with monkeypatch.context():
        assert job.run(before=fill) == 4
        monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.folder / "cache"))
    assert job.err.strip().split("\n")[-1].startswith(f"flexbatch: error: cannot write {job.part}: No space left")
    assert "bytes" in job.err
    assert f"3 of 5 rows are kept in {job.part}" in job.err
    assert job.run() == 0
    assert job.backend.computed == ["b", "a"]


def test_a_full_disk_when_the_output_is_written(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(count: int) -> None:
        if count == 5:
            monkeypatch.setattr(os, "write", FullDisk(50))

    assert job.run(before=fill) == 4
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.folder / "cache"))
    assert f"cannot write {job.output}: No space left" in job.err
    assert "5 of 5 rows are kept" in job.err
    assert job.files() == ["out.jsonl.part", "rows.jsonl"]
    assert job.run() == 0
    assert job.backend.computed == []


def test_two_runs_on_one_output(job: Job) -> None:
    codes: list[int] = []

    def second(count: int) -> None:
        if count == 1:
            codes.append(Job(job.folder, job.capture).run())

    assert job.run(before=second) == 0
    assert codes == [2]


def test_memory_errors(job: Job) -> None:
    def exhaust(error: BaseException) -> Any:
        def before(count: int) -> None:
            if count == 1:
                raise error

        return before

    assert job.run(before=exhaust(MemoryError("x"))) == 4
    assert "memory ran out (x)" in job.err
    assert "1 of 5 rows are kept" in job.err
    assert job.run(before=exhaust(OSError(errno.ENOSPC, "No space left on device"))) == 4
    assert "the disk is full" in job.err
    assert job.run(before=exhaust(type("OutOfMemoryError", (RuntimeError,), {})("CUDA"))) == 4
    assert "Traceback" not in job.err


def test_a_fault_shows_a_traceback_and_asks_for_a_report(job: Job) -> None:
    assert job.run(before=lambda count: [][count]) == 1
    assert "Traceback" in job.err
    assert "please report it" in job.err
    assert not job.output.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_prints_the_command_that_resumes(job: Job, number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    odd = job.folder / "it's $here"
    odd.mkdir()
    job.output.write_text("old")
    job.output.rename(odd / "out.jsonl")
    words = [*job.words("--overwrite", "--stop", "two words", "--quiet")]
    words[words.index(str(job.output))] = str(odd / "out.jsonl")
    assert job.main(words, before=lambda count: signal.raise_signal(number) if count == 2 else None) == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    said, command = job.err.splitlines()
    assert said == f"flexbatch: interrupted; 2 of 5 rows are kept in {odd / 'out.jsonl.part'}; continue with:"
    program, *again = shlex.split(command)
    assert (program, "--overwrite" in again) == ("flexbatch", False)
    assert not (odd / "out.jsonl").exists()
    assert job.main(again) == 0
    assert job.backend.computed == ["c", "b", "a"]
    assert len((odd / "out.jsonl").read_text().splitlines()) >= 5


def test_a_lost_interruption_is_noticed_at_the_next_row(job: Job) -> None:
    def lose(count: int) -> None:
        if count == 2:
            with suppress(Interrupted):
                signal.raise_signal(signal.SIGTERM)

    assert job.run(before=lose) == 143
    assert "3 of 5 rows are kept" in job.err


def child(job: Job, code: str) -> subprocess.CompletedProcess[str]:
    imports = (
        "import os, resource, signal, sys\nfrom tests.cli.fakes import FakeBackend\nfrom flexbatch.cli.main import main"
    )
    script = f"{imports}\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)


def test_killed_outright(job: Job) -> None:
    assert job.run() == 0
    expected = job.output.read_bytes()
    job.output.unlink()
    kill = "lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == 2 else None"
    for rows in (["e", "4"], ["c", "b"]):
        done = child(job, f"main({job.words()!r}, FakeBackend({kill}))")
        assert done.returncode == -signal.SIGKILL
        assert rows[-1] in job.part.read_text().splitlines()[-1]
    assert job.run() == 0
    assert job.backend.computed == ["a"]
    assert job.output.read_bytes() == expected


def test_a_real_file_size_limit(job: Job) -> None:
    job.write(*({"prompt": "x" * 50} for _ in range(200)))
    soft = f"resource.setrlimit(resource.RLIMIT_FSIZE, (8000, {resource.RLIM_INFINITY}))"
    done = child(job, f"{soft}\nsys.exit(main({job.words()!r}, FakeBackend()))")
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr
    kept = len(job.part.read_bytes().splitlines()) - 1
    assert 0 < kept < 200
    assert job.part.stat().st_size <= 8000
    assert job.run() == 0
    assert len(job.backend.computed) == 200 - kept


def test_a_gone_stderr_does_not_stop_the_job(job: Job) -> None:
    code = f"os.close(2)\nsys.stderr = None\nsys.exit(main({job.words()!r}, FakeBackend()))"
    assert child(job, code).returncode == 0
    assert len(job.results()) == 5
