"""What the demo model generates and scores, through the Python API and the command line, against transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexbatch import LLM, Result, SamplingParams
from flexbatch.checkpoint.locate import ASSETS
from flexbatch.cli.main import main
from tests.acceptance.program import story_rows

DEMO = ASSETS / "demo"
ROWS = story_rows(30, 24, seed=5)
PROMPTS: list[str] = [row["prompt"] for row in ROWS]
NEW: list[int] = [row["max_tokens"] for row in ROWS]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[Result]:
    return llm.generate(PROMPTS, [SamplingParams(max_tokens=new) for new in NEW])


def tokens(results: Sequence[Result]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


def command(folder: Path, rows: Sequence[dict[str, Any]], *options: str, model: str = "demo") -> list[dict[str, Any]]:
    """Run the command line on rows and return its output rows."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = ["-i", str(folder / "rows.jsonl"), "-o", str(folder / "out.jsonl"), "--overwrite", "--quiet"]
    assert main(["run", "--model", model, *places, *options]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def log_probabilities(oracle: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of every next token after each prefix of ``ids``: [len(ids) - 1, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([list(ids)])).logits[0, :-1]
    return logits.double().log_softmax(-1)


# --- greedy ------------------------------------------------------------------------------------------------------


def test_greedy_rows_of_the_command_line_equal_transformers(
    tmp_path: Path, greedy: list[Result], oracle: Any, tokenizer: Any
) -> None:
    from_file = command(tmp_path, ROWS)
    for row, result, prompt, new in zip(from_file, greedy, PROMPTS, NEW, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            whole = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        expected = whole[0, ids.shape[1] :].tolist()
        assert row["token_ids"] == list(result.token_ids) == expected
        assert row["text"] == result.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (ids.shape[1], len(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "block"},
        {"schedule": "block", "micro_batch": 7, "max_sequences": 13},
        {"micro_batch": 1, "max_sequences": 2},
        {"micro_batch": 13},
        {"max_sequences": 5, "overlap": False},
    ],
    ids=str,
)
def test_no_schedule_and_no_size_changes_the_text(greedy: list[Result], options: dict[str, Any]) -> None:
    with LLM("demo", device="cpu", **options) as llm:
        results = llm.generate(PROMPTS, [SamplingParams(max_tokens=new) for new in NEW])
    assert [(result.text, result.token_ids) for result in results] == [(one.text, one.token_ids) for one in greedy]


# --- sampled -----------------------------------------------------------------------------------------------------


def sampled(seed: int | None, new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.8, top_p=0.9, top_k=40, seed=seed)


def test_a_sample_does_not_depend_on_its_neighbours(llm: LLM, greedy: list[Result]) -> None:
    params = [sampled(seed, new) for seed, new in enumerate(NEW)]
    together = tokens(llm.generate(PROMPTS, params))
    alone = [tokens(llm.generate(prompt, own))[0] for prompt, own in zip(PROMPTS, params, strict=True)]
    assert alone == together
    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = tokens(llm.generate([PROMPTS[place] for place in order], [params[place] for place in order]))
    assert shuffled == [together[place] for place in order]
    assert sum(one != other for one, other in zip(together, tokens(greedy), strict=True)) > 15


def test_a_row_without_a_seed_keeps_its_sample_in_another_file(tmp_path: Path) -> None:
    options = ("--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", "3")
    whole = {row["id"]: row for row in command(tmp_path, ROWS, *options)}
    part = random.Random(2).sample(ROWS, 11)
    assert command(tmp_path, part, *options) == [whole[row["id"]] for row in part]


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    def run(seed: int) -> bytes:
        command(tmp_path, ROWS[:12], "--temperature", "1", "--seed", str(seed))
        return (tmp_path / "out.jsonl").read_bytes()

    first = run(7)
    assert run(7) == first
    assert run(8) != first


def test_the_same_prompt_is_sampled_anew_in_every_row(llm: LLM) -> None:
    results = llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=16, temperature=1))
    assert len(set(tokens(results))) > 4
    again = llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=16, temperature=1, seed=4))
    assert len(set(tokens(again))) == 1


# --- where a text ends -------------------------------------------------------------------------------------------


def test_stop_strings_across_token_borders(llm: LLM, greedy: list[Result], tokenizer: Any) -> None:
    rng = random.Random(6)
    prompts, params, expected = [], [], []
    across = 0
    for prompt, result, new in zip(PROMPTS, greedy, NEW, strict=True):
        text = result.text
        if len(text) < 8:
            continue
        start = rng.randrange(len(text) - 4)
        stop = text[start : start + rng.randint(2, 4)]

        def shown(count: int, ids: tuple[int, ...] = result.token_ids) -> str:
            return str(tokenizer.decode(ids[:count], skip_special_tokens=True))

        used = next(count for count in range(1, new + 1) if stop in shown(count))
        across += stop not in str(tokenizer.decode(result.token_ids[used - 1]))
        prompts.append(prompt)
        params.append(SamplingParams(max_tokens=new, stop=("never in a story", stop)))
        expected.append((text[: text.find(stop)], result.token_ids[:used], "stop"))
    results = llm.generate(prompts, params)
    assert [(result.text, result.token_ids, result.finish_reason) for result in results] == expected
    assert len(expected) > 15
    assert across > 5


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The demo model with a full stop as a further end-of-sequence token."""
    folder = tmp_path_factory.mktemp("models") / "short"
    shutil.copytree(DEMO, folder)
    full_stop = tokenizer("end.", add_special_tokens=False)["input_ids"][-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [full_stop]}), encoding="utf-8")
    return folder


def test_a_row_ends_at_the_end_of_its_sequence_unless_told_to_go_on(
    tmp_path: Path, short: Path, greedy: list[Result]
) -> None:
    full_stop = json.loads((short / "generation_config.json").read_bytes())["eos_token_id"][0]
    ended = 0
    for row, whole in zip(command(tmp_path, ROWS, model=str(short)), greedy, strict=True):
        ids = list(whole.token_ids)
        if full_stop in ids:
            ended += 1
            assert row["token_ids"] == ids[: ids.index(full_stop) + 1]
            assert row["finish_reason"] == "stop"
        else:
            assert (row["token_ids"], row["finish_reason"]) == (ids, "length")
    assert ended > 10
    for row, whole in zip(command(tmp_path, ROWS, "--ignore-eos", model=str(short)), greedy, strict=True):
        assert (row["token_ids"], row["finish_reason"]) == (list(whole.token_ids), "length")


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_every_token_of_a_prompt_is_scored_as_transformers_does(tmp_path: Path, oracle: Any, tokenizer: Any) -> None:
    rows = [{"id": row["id"], "prompt": row["prompt"], "echo": True, "max_tokens": 0} for row in ROWS]
    for row, result in zip(rows, command(tmp_path, rows, "--logprobs", "3"), strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert (result["token_ids"], result["completion_tokens"], result["error"]) == ([], 0, None)
        found = result["logprobs"]
        assert found["tokens"] == ids
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] == {}
        expected = log_probabilities(oracle, ids)
        own = expected[range(len(ids) - 1), ids[1:]].tolist()
        assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
        for place, top in enumerate(found["top_logprobs"][1:]):
            assert list(top.values()) == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
            assert [expected[place, int(token)].item() for token in top] == pytest.approx(list(top.values()), abs=1e-4)


def test_an_echoed_prompt_and_its_continuation_are_scored_alike(llm: LLM, oracle: Any, tokenizer: Any) -> None:
    params = [SamplingParams(max_tokens=new, logprobs=0, echo=True, temperature=0.9, top_k=5) for new in NEW[:8]]
    for prompt, result in zip(PROMPTS, llm.generate(PROMPTS[:8], params), strict=False):
        assert result.logprobs is not None
        ids = (*tokenizer(prompt)["input_ids"], *result.token_ids)
        assert result.logprobs.tokens == ids
        expected = log_probabilities(oracle, ids)[range(len(ids) - 1), ids[1:]].tolist()
        assert list(result.logprobs.token_logprobs[1:]) == pytest.approx(expected, abs=1e-4)


def test_score_equals_transformers(llm: LLM, oracle: Any, tokenizer: Any) -> None:
    pairs = [
        (prompt, ending) for prompt in PROMPTS[:10] for ending in (" and was happy.", " zebra", " the end of 3 days")
    ]
    pairs.append(("Once upon a time ", "there was"))  # the space goes to the word behind it
    for (context, continuation), score in zip(pairs, llm.score(pairs), strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(context.rstrip())["input_ids"])
        expected = log_probabilities(oracle, ids)[start - 1 :]
        own = expected[range(len(ids) - start), ids[start:]]
        assert score.token_ids == tuple(ids[start:])
        assert list(score.token_logprobs) == pytest.approx(own.tolist(), abs=1e-4)
        assert score.logprob == pytest.approx(own.sum().item(), abs=1e-3)
        assert score.is_greedy == (expected.argmax(-1).tolist() == ids[start:])


def test_score_knows_the_greedy_continuation(llm: LLM, greedy: list[Result]) -> None:
    scores = llm.score([("Once upon a time,", " there was a little girl named Lily."), ("Once upon a time,", " zebra")])
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[0].logprob > scores[1].logprob
