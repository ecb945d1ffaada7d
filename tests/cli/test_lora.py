"""Adapters on the command line: names, refusals before the model loads, rows that fail alone, what a job is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.cli.main import main
from flexbatch.lora.folders import CONFIG
from tests.cli.conftest import Job
from tests.lora.peft_cases import generate_with, make_adapters
from tests.oracle import ragged_rows
from tests.tiny import tiny_checkpoint

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def adapters(job: Job, *names: str) -> Path:
    """Folders that look like adapters, beside the job's."""
    folder = job.folder.parent / "adapters"
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / CONFIG).write_text(json.dumps({"peft_type": "LORA", "name": name}))
    return folder


def openai(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {**CHAT, **body}}


def test_rows_name_adapters(job: Job) -> None:
    folder = adapters(job, "fr", "de", "unused")
    job.write({"id": "a", "prompt": "abc", "lora": "fr"}, {"id": "b", "prompt": "x"}, openai("c", model="de"))
    assert job.run("--lora", f"xx={folder / 'fr'}", "--lora-dir", str(folder), "--adapter-memory", "1GB") == 0
    first, second, third = job.results()
    assert first["lora"] == "fr"
    assert "lora" not in second
    assert third["response"]["body"]["model"] == "de"
    assert job.backend.adapters == [{"fr": folder / "fr", "de": folder / "de"}]
    assert job.backend.options[0].adapter_memory == 10**9


def test_the_base_model_goes_by_its_own_name(job: Job) -> None:
    folder = adapters(job, "fr")
    job.write(openai("a", model="fake"), openai("b"), openai("c", model="gpt"))
    assert job.run("--lora-dir", str(folder)) == 2
    assert "line 3: unknown adapter 'gpt': this run has fr, and 'fake' for the base model" in job.err
    assert job.run() == 0, "without adapters, body.model says nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora", "fr"), "--lora fr: give NAME=DIR"),
        (("--lora", "fr=/nowhere"), "--lora fr=/nowhere: no adapter there"),
        (("--lora-dir", "/nowhere"), "--lora-dir /nowhere: is no folder"),
        (("--adapter-memory", "much"), "--adapter-memory: 'much' is not a size"),
    ],
)
def test_wrong_options(job: Job, options: tuple[str, ...], message: str) -> None:
    assert job.run(*options) == 2
    assert message in job.err
    assert not job.backend.options


def test_unknown_and_unsupported_adapters_are_invalid_rows(job: Job) -> None:
    folder = adapters(job, "fr", "dora")
    job.write(
        {"id": "a", "prompt": "abc", "lora": "fr"},
        {"id": "b", "prompt": "x", "lora": "nl"},
        {"id": "c", "prompt": "y", "lora": "dora"},
    )
    refused = {"dora": "adapter dora: use_dora is not supported"}
    assert job.run("--lora-dir", str(folder), refused=refused) == 2
    assert "line 2: unknown adapter 'nl': this run has dora, fr" in job.err
    assert not job.backend.options, "the model was not loaded"
    job.write({"id": "a", "prompt": "abc", "lora": "fr"}, {"id": "c", "prompt": "y", "lora": "dora"})
    assert job.run("--lora-dir", str(folder), refused=refused) == 2
    assert "line 2: adapter dora: use_dora is not supported" in job.err
    assert job.run("--lora-dir", str(folder), "--skip-invalid", refused=refused) == 3
    first, second = job.results()
    assert first["error"] is None
    assert "use_dora" in second["error"]["message"]


def test_another_adapter_is_another_job(job: Job) -> None:
    folder = adapters(job, "fr", "unused")
    job.write({"id": "a", "prompt": "abc", "lora": "fr"}, {"id": "b", "prompt": "x"})

    def stop(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    assert job.run("--lora-dir", str(folder), before=stop) == 130
    (folder / "unused" / CONFIG).write_text("{}")
    assert job.run("--lora-dir", str(folder), before=stop) == 130, "one that no row names does not matter"
    (folder / "fr" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 9}))
    assert job.run("--lora-dir", str(folder)) == 2
    assert "adapters (it was" in job.err


def test_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing: two adapters and the base model, one adapter unreadable, stats by adapter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", "llama")
    settings = {name: {"r": 4, "target_modules": ["q_proj", "down_proj"]} for name in ("one", "two")}
    made = make_adapters(path, tmp_path / "adapters", settings, 1)
    (tmp_path / "adapters" / "bad").mkdir()
    rng = random.Random(1)
    names = [rng.choice(["one", "two", None]) for _ in range(8)]
    rows = generate_with(path, made, ragged_rows(rng, 149, 8, longest=9, new=5), names)
    lines = [
        {"prompt": list(row.prompt), "max_tokens": row.new, **({"lora": name} if name else {})}
        for row, name in zip(rows, names, strict=True)
    ]
    lines.append({"prompt": [1, 2], "lora": "bad"})
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--stats", str(tmp_path / "stats")]
    adapters = ["--lora-dir", str(tmp_path / "adapters")]
    assert main(["run", "--model", str(path), "--device", "cpu", *places, *adapters]) == 3
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [tuple(result["token_ids"]) for result in results[:-1]] == [row.tokens for row in rows]
    assert results[-1]["error"]["type"] == "adapter_error"
    assert "adapter_config.json" in results[-1]["error"]["message"]
    stats = json.loads((tmp_path / "stats").read_text())
    counts = stats["adapters"]["rows"]
    assert counts["one"]["requests"] == names.count("one")
    assert counts["bad"] == {"requests": 1, "failed": 1, "prompt_tokens": 2, "completion_tokens": 0}
    assert stats["plan"]["memory"]["cpu"]["adapters"] == stats["adapters"]["arena_bytes"] > 0
