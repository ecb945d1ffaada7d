"""lm-evaluation-harness with flexbatch against its own Hugging Face backend, on small local tasks of every kind."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM
from flexbatch.checkpoint.locate import ASSETS
from flexbatch.cli.main import main
from flexbatch.errors import InputError

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from flexbatch.evaluation import harness as harness_module
    from flexbatch.evaluation.lm_eval_model import FlexbatchLM

pytestmark = pytest.mark.filterwarnings("ignore")
DEMO = ASSETS / "demo"
WINDOW = 48
_TEXT = (
    "Once upon a time there was a little girl named Lily . She loved to play outside in the park with her dog Tom and "
    "a big red ball . One day the ball rolled away and they ran after it . Mom said : do not go too far !"
)
STORY = _TEXT.split()
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the thousands of tasks that come with the harness takes seconds each time."""
    monkeypatch.setattr(harness_module, "TaskManager", partial(TaskManager, include_defaults=False))


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(STORY) for _ in range(draw.randint(low, high)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    draw = random.Random(1)
    choice = [{"q": words(draw, 3, 60), "options": [words(draw, 2, 4) for _ in range(3)], "a": 1} for _ in range(6)]
    letters = [{"q": words(draw, 3, 60), "options": ["a", "b", "zebra", "ball"], "a": 2} for _ in range(5)]
    texts = [{"text": words(draw, 2, 130)} for _ in range(4)]
    starts = [{"q": words(draw, 1, 50)} for _ in range(5)]
    tasks: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "t_choice": (
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "options",
                "doc_to_target": "a",
                "metric_list": [{"metric": "acc"}],
            },
            choice,
        ),
        "t_letter": (
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "options",
                "doc_to_target": "a",
                "metric_list": [{"metric": "acc"}],
            },
            letters,
        ),
        "t_rolling": (
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            },
            texts,
        ),
        "t_until": (
            {
                "output_type": "generate_until",
                "doc_to_text": "{{q}}",
                "doc_to_target": "",
                "generation_kwargs": {"until": [". ", "He", "</s>"], "max_gen_toks": 12},
                "metric_list": [{"metric": "exact_match"}],
            },
            starts,
        ),
    }
    for name, (settings, documents) in tasks.items():
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **settings}), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> Any:
    return HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=4, max_length=WINDOW)


def evaluate(model: Any, folder: Path, *names: str, chat: bool = False) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, apply_chat_template=chat, bootstrap_iters=0)
    assert found is not None
    return dict(found)


def answers(results: dict[str, Any], name: str) -> list[Any]:
    return [answer for sample in results["samples"][name] for (answer,) in sample["resps"]]


def test_scores_equal_those_of_the_hugging_face_backend(llm: LLM, theirs: Any, folder: Path) -> None:
    names = ("t_choice", "t_letter", "t_rolling", "t_until")
    model = FlexbatchLM(llm, max_length=WINDOW, quiet=True)
    own, other = evaluate(model, folder, *names), evaluate(theirs, folder, *names)
    pairs = [pair for name in names[:2] for pair in zip(answers(own, name), answers(other, name), strict=True)]
    assert len(pairs) == 18 + 20
    for (value, greedy), (expected, is_greedy) in pairs:
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == is_greedy
    assert answers(own, "t_rolling") == pytest.approx(answers(other, "t_rolling"), abs=1e-2, rel=1e-5)
    assert answers(own, "t_until") == answers(other, "t_until")
    assert any(answers(own, "t_until"))


def test_chats_are_rendered_alike(llm: LLM, theirs: Any, folder: Path) -> None:
    own = FlexbatchLM(llm, template=CHAT, max_length=WINDOW, quiet=True)
    theirs.tokenizer.chat_template = CHAT
    chats = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    ]
    assert [own.apply_chat_template(chat) for chat in chats] == [theirs.apply_chat_template(chat) for chat in chats]
    ours = evaluate(own, folder, "t_until", chat=True)
    assert answers(ours, "t_until") == answers(evaluate(theirs, folder, "t_until", chat=True), "t_until")
    assert ours["samples"]["t_until"][0]["arguments"][0][0].endswith("[bot]")


def test_an_interrupted_evaluation_goes_on(
    llm: LLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["t_choice", "t_until"]

    def make() -> harness_module.Harness:
        return harness_module.Harness(names, include=folder, bootstrap=0)

    place = tmp_path / "answers"
    whole = make().evaluate(llm, name="demo", quiet=True)
    assert whole.computed == 23

    score_each = LLM.score_each

    def dies(self: LLM, *given: Any, **named: Any) -> Iterator[Any]:
        for count, item in enumerate(score_each(self, *given, **named)):
            if count == 7:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "score_each", dies)
        with pytest.raises(KeyboardInterrupt):
            make().evaluate(llm, name="demo", answers=place, identity={"model": "a"}, quiet=True)
    with pytest.raises(InputError, match=r"another evaluation \(model\)"):
        make().evaluate(llm, name="demo", answers=place, identity={"model": "b"}, quiet=True)
    rest = make().evaluate(llm, name="demo", answers=place, identity={"model": "a"}, quiet=True)
    assert rest.computed == 23 - 7
    assert rest.results["results"] == whole.results["results"]
    again = make().evaluate(llm, name="demo", answers=place, identity={"model": "a"}, quiet=True)
    assert again.computed == 0  # nothing is lost until the results are written
    again.forget_answers()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from functools import partial
from flexbatch import LLM
from flexbatch.cli.main import main
from flexbatch.evaluation import harness
from lm_eval.tasks import TaskManager
harness.TaskManager = partial(TaskManager, include_defaults=False)

def dying(answers):
    def dies(*given, **named):
        for item in answers(*given, **named):
            if left.pop() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
    return dies

left = list(range(int(sys.argv[1])))
LLM.score_each, LLM.generate_each = dying(LLM.score_each), dying(LLM.generate_each)
sys.exit(main(sys.argv[2:]))
"""


def test_killed_outright_and_given_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before the kill is not computed again."""
    command = ["lm-eval", "--model", "demo", "--device", "cpu", "--include-path", str(folder), "--quiet"]
    command += ["--tasks", "t_choice,t_letter,t_until", "--max-sequences", "1", "-o"]
    kept = tmp_path / "killed.json.part_rank0.db"
    computed: list[int] = []
    evaluate = harness_module.Harness.evaluate

    def counted(self: harness_module.Harness, *given: Any, **named: Any) -> harness_module.Evaluation:
        found = evaluate(self, *given, **named)
        computed.append(found.computed)
        return found

    monkeypatch.setattr(harness_module.Harness, "evaluate", counted)
    assert main([*command, str(tmp_path / "whole.json")]) == 0
    assert computed == [18 + 20 + 5]
    words = [sys.executable, "-c", KILLED, "25", *command, str(tmp_path / "killed.json")]
    child = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    with closing(sqlite3.connect(kept)) as database:
        (known,) = database.execute("select count(*) - 1 from unnamed").fetchone()  # one says whose answers they are
    assert 18 < known < computed[0]
    assert main([*command, str(tmp_path / "killed.json")]) == 0
    assert computed[1] == computed[0] - known
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("whole", "killed"))
    assert again == whole
    assert not kept.exists()


def test_the_command_prints_a_table_and_writes_what_was_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, samples, stats = (tmp_path / name for name in ("results.json", "samples.jsonl", "stats.json"))
    command = ["lm-eval", "--model", "demo", "--device", "cpu", "--include-path", str(folder), "--quiet"]
    command += ["--tasks", "t_choice,t_rolling", "--limit", "3", "-o", str(output)]
    command += ["--samples", str(samples), "--stats", str(stats)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("|")
    assert "t_choice" in printed
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found["results"]) == {"t_choice", "t_rolling"}
    assert found["config"]["model"] == "demo"
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 6
    assert json.loads(stats.read_text(encoding="utf-8"))["prompt_tokens"] > 0
    assert not list(tmp_path.glob("*.part*"))
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


def test_a_name_that_is_no_task_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lm-eval", "--model", "demo", "--device", "cpu", "--include-path", str(folder), "--tasks", "t_none"]
    assert main(command) == 2
    assert "--tasks t_none: no such task" in capsys.readouterr().err
