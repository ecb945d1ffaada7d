"""Mistakes cost a moment and one line: which exit code, what is said, and that nothing heavy was imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexbatch import __version__
from flexbatch.cli.main import main
from tests.cli.conftest import Job
from tests.cli.fakes import FakeCodec

ROOT = Path(__file__).resolve().parents[2]

OPTION_FAULTS: list[tuple[tuple[str, ...], str]] = [
    (("--temperature", "nan"), "temperature must be a finite number, not nan"),
    (("--temperature", "hot"), "argument --temperature: invalid float value: 'hot'"),
    (("--temperature", "-1"), "temperature must be from 0"),
    (("--top-p", "0"), "top_p must be above 0"),
    (("--top-p", "1.5"), "top_p must be from 0 to 1"),
    (("--top-k", "-1"), "top_k must be a whole number"),
    (("--max-tokens", "1.5"), "argument --max-tokens: invalid int value"),
    (("--max-tokens", "-1"), "max_tokens must be a whole number"),
    (("--logprobs", "-1"), "logprobs must be a whole number"),
    (("--stop", ""), "stop must be one or more non-empty strings"),
    (("--weights", "20,80,10"), "--weights 20,80,10: the shares sum to 110, not to 100"),
    (("--kv", "all"), "--kv all: write three percentages"),
    (("--hidden", "nan,0,0"), "--hidden nan,0,0: write three percentages"),
    (("--cpu-attention", "yes"), "--cpu-attention yes: give on, off or auto"),
    (("--weight-bits", "8"), "--weight-bits 8: give 16, 4 or auto"),
    (("--kv-bits", "x"), "--kv-bits x: give 16, 4 or auto"),
    (("--micro-batch", "0"), "--micro-batch 0: give a whole number from 1 on"),
    (("--max-sequences", "-3"), "--max-sequences -3: give a whole number from 1 on"),
    (("--cpu-memory", "lots"), "--cpu-memory: 'lots' is not a size"),
    (("--device", "tpu"), "--device tpu: give auto, cuda"),
    (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    (("--schedule", "lazy"), "argument --schedule: invalid choice: 'lazy'"),
    (("--disk-dir", "/no/such/dir"), "--disk-dir /no/such/dir: is no folder"),
    (("--chat-template", "/no/such/file"), "--chat-template /no/such/file: cannot be read"),
    (("--stats", "/no/such/dir/x"), "--stats /no/such/dir/x: there is no folder"),
    (("--trace", "/dev/full"), "--trace /dev/full: is not a regular file"),
    (("--colour",), "unrecognized arguments: --colour"),
    (("--temp", "1"), "unrecognized arguments: --temp 1"),
    (("--output", "-"), "--output -: results cannot go to stdout"),
    (("--output", "/no/such/dir/x"), "--output /no/such/dir/x: there is no folder /no/such/dir"),
    (("--output", "/"), "--output /: is a folder"),
    (("--input", "/no/such/file"), "/no/such/file: no such file"),
    (("--input", "/"), "/: is a folder"),
    (("--input", "/dev/null"), "/dev/null: holds no rows"),
]


@pytest.mark.parametrize(("options", "said"), OPTION_FAULTS)
def test_a_wrong_option(job: Job, options: tuple[str, ...], said: str) -> None:
    assert job.run(*options) == 2
    assert job.err.startswith("flexbatch: error: ")
    assert said in job.err
    assert job.err.count("\n") == 1
    assert job.out == ""
    assert job.files() == ["rows.jsonl"]
    assert job.backend.options == []


ROW_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x" * 61}, "the prompt has 61 tokens, the model's window 60"),
    ({"prompt": [1, 0x3000]}, "token id 12288 is outside the vocabulary"),
    ({"prompt": "a", "temperature": "x"}, "temperature must be a finite number"),
]


@pytest.mark.parametrize(("row", "said"), ROW_FAULTS)
def test_a_wrong_row_is_found_before_the_model_loads(job: Job, row: dict[str, Any], said: str) -> None:
    job.write({"prompt": "fine"}, row, row)
    assert job.run() == 2
    first, second, third = job.err.splitlines()
    assert first.startswith(f"flexbatch: error: {job.input}: 2 of 3 rows invalid")
    assert second.startswith("  line 2: ")
    assert third.startswith("  line 3: ")
    assert said in second
    assert job.backend.options == []
    assert job.files() == ["rows.jsonl"]


def test_input_and_output_are_one_file(job: Job) -> None:
    for output in (job.input, job.folder / ".." / "work" / "rows.jsonl"):
        assert job.run("--overwrite", "--output", str(output)) == 2
        assert "is the same file as --input" in job.err
        assert job.input.read_text().count("\n") == 5
    assert job.run("--stats", str(job.output)) == 2
    assert "--stats" in job.err
    assert "is the same file as --output" in job.err


def test_a_model_without_a_tokenizer_takes_token_ids_alone(job: Job) -> None:
    job.write({"prompt": [65, 66]}, {"prompt": [65], "logprobs": 0})
    assert job.run(tokenizer=None) == 0
    assert [row["token_ids"] for row in job.results()] == [[66, 65], [65]]
    for row, said in (
        ({"prompt": "text"}, "tokenizer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "tokenizer"),
        ({"prompt": [65], "stop": "x"}, "stop needs a tokenizer"),
    ):
        job.write(row)
        assert job.run("--overwrite", tokenizer=None) == 2
        assert said in job.err


def test_a_model_without_a_template(job: Job) -> None:
    codec = FakeCodec()
    codec.has_template = False
    assert job.run(tokenizer=codec) == 2
    assert job.err == "flexbatch: error: fake has no chat template: give one with --chat-template FILE\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND: see flexbatch --help"),
        (["walk"], "invalid choice: 'walk'"),
        (["run"], "the following arguments are required: --model, -i/--input, -o/--output: see flexbatch run --help"),
        (["info"], "the following arguments are required: --model"),
        (["info", "--model", "no-such-model-x"], "no-such-model-x"),
    ],
)
def test_a_wrong_command(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexbatch: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"flexbatch {__version__}\n"


def test_mistakes_and_help_import_nothing_heavy(job: Job) -> None:
    job.write({"prompt": 5})
    commands = [
        ["--version"],
        ["run", "--help"],
        job.words("--temperature", "nan"),
        job.words("--weights", "1,2,3"),
        job.words("--input", "/no/such/file"),
        job.words("--output", "/no/such/dir/x"),
        job.words(),
    ]
    script = (
        "import json, sys\n"
        "from flexbatch.cli.main import main\n"
        "codes = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        codes.append(main(words))\n"
        "    except SystemExit as end:\n"
        "        codes.append(end.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "print(json.dumps([codes, sorted(heavy)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0, 2, 2, 2, 2, 2], []], done.stderr


def test_a_reader_who_goes_away_is_no_fault() -> None:
    # `head -0` closes the pipe before anything is written to it.
    command = f"'{sys.executable}' -m flexbatch info --model demo; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == "0\n"
