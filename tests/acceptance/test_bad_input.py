"""Bad input, bad models and full disks end with their exit code and one clear line, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import ASSETS
from flexbatch.cli.main import main
from tests.acceptance.program import Program, story_rows
from tests.tiny import tiny_checkpoint

DEMO = ASSETS / "demo"
GOOD = [{"id": "a", "prompt": [1, 5, 6]}, {"id": "b", "prompt": [1, 7]}]


class Case:
    """A folder with ``rows.jsonl``; ``fails`` runs the program in this process on it and checks how that ends."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.model = "demo"
        self._capture = capture
        self.write(*GOOD)

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    def write(self, *rows: dict[str, Any] | str) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def run(self, *options: str) -> tuple[int, str, str]:
        """Return exit code, stdout, stderr."""
        places = ["-i", str(self.folder / "rows.jsonl"), "-o", str(self.output)]
        code = main(["run", "--model", self.model, *places, "--max-tokens", "4", *options])
        return code, *self._capture.readouterr()

    def fails(self, *options: str, code: int = 2, lines: int = 1) -> str:
        """Run; assert that it fails with ``code``, says so in ``lines`` lines and changes no file. Return the lines."""
        before = self.files()
        ended, out, err = self.run(*options)
        assert ended == code, err
        assert out == ""
        assert err.startswith("flexbatch: error: ")
        assert err.count("\n") == lines, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert self.files() == before
        return err


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Case:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "job").mkdir()
    return Case(tmp_path / "job", capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", shards=2)


@pytest.fixture
def model(case: Case, checkpoint: Path) -> Path:
    """A tiny sharded model without a tokenizer, the case's own, to be spoilt."""
    folder = case.folder / "model"
    shutil.copytree(checkpoint, folder)
    case.model = str(folder)
    return folder


# --- the input ---------------------------------------------------------------------------------------------------


def test_a_missing_file(case: Case) -> None:
    assert "/no/such/rows.jsonl: no such file" in case.fails("--input", "/no/such/rows.jsonl")


@pytest.mark.parametrize("content", ["", "\n  \n\n", "\ufeff\n"])
def test_an_empty_file(case: Case, content: str) -> None:
    (case.folder / "rows.jsonl").write_text(content, encoding="utf-8")
    assert "rows.jsonl: holds no rows" in case.fails()


ROW_FAULTS: list[tuple[dict[str, Any] | str, str]] = [
    ('{"id": "x", "prompt": "a"', "not JSON (Expecting ',' delimiter at column 26)"),
    ("plain words", "not JSON"),
    ('["a"]', "must be an object"),
    ('{"prompt": "a", "temperature": NaN}', "not JSON (it holds NaN)"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, "2"]}, "prompt"),
    ({"prompt": "a", "max_tokens": "8"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "stop": 7}, "stop"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "echo": "yes"}, "echo"),
    ({"prompt": "a", "top_p": 2}, "top_p"),
    ({"prompt": "a", "colour": 1}, "colour"),
    ({"prompt": "a", "messages": []}, "messages"),
    ({"id": 3, "prompt": "a"}, "id"),
    ({"id": "nothing"}, "prompt"),
    ({"id": "a", "prompt": "again"}, "duplicate id 'a', first on line 1"),
    ({"prompt": " ".join(["word"] * 300)}, "the prompt has 301 tokens, the model's window 256: shorten the prompt"),
    ({"prompt": [7] * 257}, "the prompt has 257 tokens, the model's window 256: shorten the prompt"),
    ({"prompt": [32000]}, "token id 32000 is outside the vocabulary (0 to 31999)"),
    ({"prompt": []}, "empty"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"custom_id": "o", "method": "POST", "url": "/v1/embeddings", "body": {}}, "url"),
    ({"custom_id": "o", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "n": 2}}, "n"),
]


@pytest.mark.parametrize(("row", "said"), ROW_FAULTS)
def test_an_invalid_row(case: Case, row: dict[str, Any] | str, said: str) -> None:
    case.write(GOOD[0], row, GOOD[1])
    first, second = case.fails("--chat-template", str(template(case)), lines=2).splitlines()
    assert f"{case.folder / 'rows.jsonl'}: 1 of 3 rows invalid: correct them, or give --skip-invalid" in first
    assert second.startswith("  line 2: ")
    assert said in second


def template(case: Case) -> Path:
    path = case.folder.parent / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    return path


def test_only_the_first_20_invalid_rows_are_listed(case: Case) -> None:
    case.write(*("{" for _ in range(30)))
    lines = case.fails(lines=22).splitlines()
    assert lines[1].startswith("  line 1: ")
    assert lines[20].startswith("  line 20: ")
    assert lines[21] == "  and 10 more"


def test_invalid_rows_that_are_skipped_are_error_rows(case: Case) -> None:
    case.write(GOOD[0], "{", {"id": "a", "prompt": "again"}, {"id": "long", "prompt": [7] * 257}, GOOD[1])
    code, out, err = case.run("--skip-invalid", "--quiet")
    assert (code, out, err) == (3, "", "")
    results = [json.loads(line) for line in case.output.read_text(encoding="utf-8").splitlines()]
    assert [row["finish_reason"] for row in results] == ["length", "error", "error", "error", "length"]
    assert [row["id"] for row in results] == ["a", "2", "a", "long", "b"]
    assert "the prompt has 257 tokens" in results[3]["error"]["message"]


# --- options and places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "nan"), "temperature must be a finite number, not nan"),
        (("--weights", "20,80,10"), "--weights 20,80,10: the shares sum to 110, not to 100"),
        (("--kv", "0,0,0"), "--kv 0,0,0: the shares sum to 0, not to 100"),
        (("--hidden", "50,49"), "--hidden 50,49"),
    ],
)
def test_a_wrong_value(case: Case, options: tuple[str, ...], said: str) -> None:
    assert said in case.fails(*options)


@pytest.mark.parametrize("place", ["rows.jsonl/out.jsonl", "no/such/folder/out.jsonl", "model"])
def test_an_output_that_cannot_be_written(case: Case, model: Path, place: str) -> None:
    target = case.folder / place
    assert f"--output {target}: " in case.fails("--output", str(target))


def test_an_output_where_not_even_root_can_write(case: Case) -> None:
    assert "/proc/out.jsonl" in case.fails("--output", "/proc/out.jsonl")


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-model", "model no-such-model is neither a folder, a hub id (owner/name), demo nor a short name"),
        ("nobody/no-such-model", "nobody/no-such-model is not on this machine and HF_HUB_OFFLINE is set"),
        ("opt-125m", "opt-125m is not on this machine and HF_HUB_OFFLINE is set"),
        ("/no/such/folder", "model /no/such/folder is neither a folder"),
    ],
)
def test_an_unknown_model(case: Case, name: str, said: str) -> None:
    case.model = name
    assert said in case.fails()


def test_a_folder_that_holds_no_model(case: Case) -> None:
    case.model = str(case.folder)
    assert f"{case.folder}: no config.json: not a Hugging Face model folder" in case.fails()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"hidden_size": "80"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 4}, "model.layers.3."),
        ({"num_hidden_layers": 2}, "model.layers.2."),
        ({"intermediate_size": 111}, "shape"),
    ],
)
def test_a_config_that_is_not_supported(case: Case, model: Path, values: dict[str, Any], said: str) -> None:
    edit(model / "config.json", **values)
    error = case.fails()
    assert said in error
    assert str(model) in error


def test_a_config_that_is_no_json(case: Case, model: Path) -> None:
    (model / "config.json").write_text('{"hidden_size": ', encoding="utf-8")
    assert f"{model / 'config.json'}: not valid JSON" in case.fails()


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = header_of(path)
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def shard_of(model: Path) -> Path:
    return model / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(case: Case, model: Path, kept: int) -> None:
    path = shard_of(model)
    path.write_bytes(path.read_bytes()[:kept])
    error = case.fails()
    assert str(path) in error
    assert "truncated" in error


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for name, value in header.items() if name != "__metadata__")
    return entry


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda header: first(header).update(shape=[2**40, 2**40]), id="shape"),
        pytest.param(lambda header: first(header).update(shape=[2**62, 2]), id="dimension"),
        pytest.param(lambda header: first(header).update(data_offsets=[0, 2**60]), id="end"),
        pytest.param(lambda header: first(header).update(data_offsets=[-(2**60), 0]), id="start"),
        pytest.param(lambda header: first(header).update(dtype="F1024"), id="dtype"),
        pytest.param(lambda header: header.update({"x" * 60: {"dtype": "F32", "shape": [10**9]}}), id="no offsets"),
    ],
)
def test_absurd_claims_about_a_tensor(case: Case, model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = shard_of(model)
    with_header(path, change)
    error = case.fails()
    assert f"{path}: tensor " in error
    assert len(error) < 1000


@pytest.mark.parametrize("length", [2**63, 2**40, 99_000_000])
def test_an_absurd_header_length(case: Case, model: Path, length: int) -> None:
    path = shard_of(model)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"{path}: the header claims " in case.fails()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_missing_shard(case: Case, model: Path) -> None:
    shard_of(model).unlink()
    assert f"{shard_of(model)}: the shard is missing" in case.fails()


def test_no_weights_at_all(case: Case, model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    assert f"{model}: no weights" in case.fails()


def test_a_model_without_a_tokenizer(case: Case, model: Path) -> None:
    code, out, err = case.run("--quiet")  # token ids need none
    assert (code, out, err) == (0, "", "")
    case.output.unlink()
    case.write({"prompt": "some text"})
    assert "tokenizer" in case.fails()
    case.write({"prompt": [5], "stop": "x"})
    assert "stop needs a tokenizer" in case.fails(lines=2)


def test_a_damaged_tokenizer(case: Case, model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    assert f"{model}: the tokenizer cannot be read" in case.fails()


def test_a_chat_for_a_model_without_a_template(case: Case) -> None:
    case.write({"messages": [{"role": "user", "content": "hi"}]})
    assert "has no chat template: give one with --chat-template FILE" in case.fails()
    case.write({"prompt": "hi"})
    assert "has no chat template" in case.fails("--chat")


def test_weights_that_are_not_numbers_give_error_rows(case: Case, model: Path) -> None:
    header, data = header_of(shard_of(model))
    begin, end = first(header)["data_offsets"]
    raw = json.dumps(header).encode()
    spoilt = data[:begin] + b"\xff" * (end - begin) + data[end:]
    shard_of(model).write_bytes(len(raw).to_bytes(8, "little") + raw + spoilt)
    code, _, err = case.run("--quiet")
    assert (code, err) == (3, "")
    results = [json.loads(line) for line in case.output.read_text(encoding="utf-8").splitlines()]
    assert [row["error"]["type"] for row in results] == ["not_finite", "not_finite"]


# --- what does not fit -------------------------------------------------------------------------------------------


IN_RAM = ("--weights", "0,100,0", "--kv", "0,100,0", "--hidden", "0,100,0", "--quiet")


@pytest.mark.parametrize("memory", ["1MB", "65MB"])
def test_weights_or_the_cache_of_one_row_do_not_fit(case: Case, memory: str) -> None:
    error = case.fails("--cpu-memory", memory, *IN_RAM, code=4)
    assert "cpu tier" in error
    assert re.search(r"[\d.]+ [KMG]iB are missing", error)
    assert "--cpu-memory" in error


def test_a_row_that_alone_does_not_fit_is_an_error_row(case: Case, model: Path) -> None:
    # The smallest budget that the short row asks for leaves no room for the long one.
    case.write({"id": "short", "prompt": [1, 2]}, {"id": "long", "prompt": [1, 2], "max_tokens": 250})
    low, high = 1, 2**17
    while high - low > 1:
        middle = (low + high) // 2
        code, _, _ = case.run("--cpu-memory", f"{middle}KiB", "--overwrite", *IN_RAM)
        assert code in (0, 3, 4)
        low, high = (middle, high) if code == 4 else (low, middle)
    code, _, err = case.run("--cpu-memory", f"{high}KiB", "--overwrite", *IN_RAM)
    assert (code, err) == (3, "")
    short, long = (json.loads(line) for line in case.output.read_text(encoding="utf-8").splitlines())
    assert (short["finish_reason"], short["error"]) == ("length", None)
    assert (long["finish_reason"], long["error"]["type"]) == ("error", "does_not_fit")
    assert "cpu tier" in long["error"]["message"]
    assert "--cpu-memory" in long["error"]["message"]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Make ``folder`` a file system of its own of this size where that is allowed; tell whether it is."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def limited(program: Program, kilobytes: int | None) -> int:
    """Run the program with files of at most this size; EFBIG is what a full disk looks like without one."""
    limit = "unlimited" if kilobytes is None else str(kilobytes)
    script = f'ulimit -f {limit}; exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "flexbatch", *program.words()]
    with program.errors.open("wb") as errors:
        return subprocess.run(command, stderr=errors, env=program.environment()).returncode


def test_a_full_disk_keeps_the_finished_rows(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16) as mounted:
        program = Program(tmp_path / "disk", story_rows(40, 40), ("--quiet", "--max-sequences", "4"))
        assert limited(program, None if mounted else 8) == 4, program.said
        assert program.said.startswith(f"flexbatch: error: cannot write {program.part}: ")
        assert program.said.count("\n") == 1
        assert ("No space left on device" if mounted else "File too large") in program.said
        assert "free space there, or choose another disk with --output" in program.said
        kept = program.journalled()
        assert 0 < len(kept) - 1 < 40
        assert (
            f"{len(kept) - 1} of 40 rows are kept in {program.part}: the same command goes on from there"
            in program.said
        )
        assert sorted(path.name for path in program.folder.iterdir()) == ["out.jsonl.part", "rows.jsonl"]
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path / "disk")], check=True)
        assert limited(program, None) == 0, program.said
        results = [json.loads(line) for line in program.output.read_text(encoding="utf-8").splitlines()]
        assert [row["id"] for row in results] == [row["id"] for row in program.rows]
        assert set(kept[1:]) <= set(program.output.read_bytes().splitlines(keepends=True))


# --- the program as a process ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "no-such-model"], "model no-such-model is neither a folder"),
        (["--output", "/proc/out.jsonl"], "/proc/out.jsonl"),
        (["--temperature", "NaN"], "temperature must be a finite number"),
    ],
)
def test_a_process_says_one_line_and_exits(tmp_path: Path, words: list[str], said: str) -> None:
    program = Program(tmp_path / "job", story_rows(3, 4), ("--quiet",))
    assert program.finish(*words) == 2
    assert program.said.startswith("flexbatch: error: ")
    assert said in program.said
    assert program.said.count("\n") == 1
    assert [path.name for path in program.folder.iterdir()] == ["rows.jsonl"]
