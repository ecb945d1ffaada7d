"""What a harness's generation settings become; needs no harness."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from flexbatch.cli.main import main
from flexbatch.evaluation.generation import GenerationSettings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, (256, (), 0.0), id="defaults"),
        pytest.param({"until": "\n", "max_gen_toks": 7}, (7, ("\n",), 0.0), id="one stop"),
        pytest.param({"until": ["a", "", "b"], "max_tokens": 3}, (3, ("a", "b"), 0.0), id="an empty stop says nothing"),
        pytest.param({"max_new_tokens": 9, "max_gen_toks": 4}, (4, (), 0.0), id="first name wins"),
        pytest.param({"temperature": 0.7}, (256, (), 0.7), id="a temperature samples"),
        pytest.param({"temperature": 0.7, "do_sample": False}, (256, (), 0.0), id="not sampled"),
        pytest.param({"temperature": 0.7, "do_sample": True}, (256, (), 0.7), id="sampled"),
        pytest.param({"repetition_penalty": 1.0, "num_beams": 1}, (256, (), 0.0), id="harmless"),
    ],
)
def test_settings_are_read_as_the_harness_reads_them(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = GenerationSettings.read(given)
    assert (found.max_tokens, found.until, found.temperature) == expected


def test_special_tokens_among_stops_are_stops_by_id() -> None:
    settings = GenerationSettings.read({"until": ["</s>", "\n", "<|end|>"], "top_p": 0.9, "temperature": 1})
    params = settings.params([2], {"</s>": 2, "<|end|>": 7}, run_seed=5)
    assert (params.stop, params.stop_token_ids, params.top_p, params.run_seed) == (("\n",), (2, 7), 0.9, 5)


def run(*options: str) -> int:
    return main(["lm-eval", "--model", "demo", "--device", "cpu", *options])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", ","], "--tasks: names no task"),
        (["--tasks", "a", "--limit", "1.5"], "--limit 1.5: give a number of documents"),
        (["--tasks", "a", "--limit", "-1"], "--limit -1"),
        (["--tasks", "a", "--gen-kwargs", "x"], "--gen-kwargs x: give K=V"),
        (["--tasks", "a", "--include-path", "/nowhere"], "is no folder"),
        (["--tasks", "a", "--lora", "x=/a", "--lora", "y=/b"], "give it once"),
        (["--tasks", "a", "--output", "/"], "is a folder"),
        (["--tasks", "a", "--num-fewshot", "x"], "whole number from 0 on"),
        (["--tasks", "a", "--output", "x", "--samples", "x"], "same file as"),
    ],
)
def test_mistakes_are_one_line(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_without_the_harness_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run("--tasks", "a") == 2
    assert "pip install 'flexbatch[lm-eval]'" in capsys.readouterr().err
