"""lm-evaluation-harness with flexbatch as its model: tasks in, scores out, answers kept on the way.

Knows the harness's calls and its file of answers, nothing of the command line; needs the package lm_eval.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from sqlitedict import SqliteDict

from flexbatch.api import LLM
from flexbatch.errors import FlexbatchError, InputError, UsageError
from flexbatch.evaluation.lm_eval_model import FlexbatchLM
from flexbatch.jobs.durable import replace_file

_IDENTITY = "flexbatch"
_SUFFIX = "_rank0.db"  # what the harness appends to the name that it is given


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The harness's results.

    ``computed``: how many requests were answered now, not taken from earlier ones. ``answers``: the file that keeps
    them all until ``forget_answers``.
    """

    results: dict[str, Any]
    computed: int
    answers: Path | None = None

    def table(self) -> str:
        """The harness's table of scores, and of groups if there are any."""
        parts = [make_table(self.results)]
        if self.results.get("groups"):
            parts.append(make_table(self.results, "groups"))
        return "\n".join(parts).strip()

    def write(self, path: Path, options: Mapping[str, Any]) -> None:
        """Write everything but the samples as JSON, with the ``options`` that led there. Raises DoesNotFitError."""
        kept = {name: value for name, value in self.results.items() if name != "samples"}
        text = json.dumps({**kept, "options": dict(options)}, indent=1, default=handle_non_serializable)
        replace_file(path, [text.encode() + b"\n"], len(text))

    def write_samples(self, path: Path) -> None:
        """Write every document with its answers and metrics, one JSON line each."""
        lines = [
            json.dumps({"task": task, **sample}, default=handle_non_serializable).encode() + b"\n"
            for task, samples in self.results.get("samples", {}).items()
            for sample in samples
        ]
        replace_file(path, lines, sum(map(len, lines)))

    def forget_answers(self) -> None:
        """Remove the kept answers: whatever was to be written of them is written."""
        if self.answers is not None:
            self.answers.unlink(missing_ok=True)


class Harness:
    """The tasks ``names`` and how their prompts are made. Raises UsageError for a name that is no task."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        include: Path | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        generation: Mapping[str, Any] | None = None,
        chat: bool = False,
        system: str | None = None,
        multiturn: bool = True,
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        self._tasks = TaskManager(include_path=None if include is None else str(include))
        self._names = list(names)
        self._settings: dict[str, Any] = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "gen_kwargs": None if generation is None else dict(generation),
            "apply_chat_template": chat,
            "fewshot_as_multiturn": multiturn and chat,
            "system_instruction": system,
            "bootstrap_iters": bootstrap,
        }
        self._seed = seed
        for name in self._names:
            if not self._tasks.match_tasks([name]):
                raise UsageError(f"--tasks {name}: no such task: see lm-eval ls tasks, or add --include-path DIR")

    def evaluate(
        self,
        llm: LLM,
        *,
        name: str,
        lora: str | None = None,
        template: str | None = None,
        max_length: int | None = None,
        answers: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        fresh: bool = False,
        quiet: bool = False,
    ) -> Evaluation:
        """Answer all requests, taking from ``answers`` what stands there and adding to it.

        Raises InputError if ``answers`` belongs to another ``identity`` (unless ``fresh``), UsageError where the data
        of a task cannot be loaded, and the FlexbatchErrors of the model.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR if quiet else logging.WARNING)
        kept = None if answers is None else Path(f"{answers}{_SUFFIX}")
        if kept is not None:
            _claim(kept, dict(identity or {}), fresh=fresh)
        model = FlexbatchLM(
            llm, name=name, lora=lora, template=template, seed=self._seed, max_length=max_length, quiet=quiet
        )
        try:
            results = simple_evaluate(
                model,
                tasks=self._names,
                task_manager=self._tasks,
                use_cache=None if answers is None else str(answers),
                **self._settings,
            )
        except FlexbatchError:
            raise
        except (OSError, ConnectionError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"--tasks {','.join(self._names)}: a task's data cannot be loaded ({type(error).__name__}: {reason}): "
                "fetch it where there is a network, or describe local data with --include-path"
            ) from error
        finally:
            if model.cache_hook.dbdict is not None:
                model.cache_hook.dbdict.commit(blocking=True)
                model.cache_hook.dbdict.close()
        assert results is not None
        results["config"]["model"] = name
        return Evaluation(results, model.computed, kept)


def _claim(path: Path, identity: dict[str, Any], *, fresh: bool) -> None:
    """Make the file of answers this evaluation's own, or refuse one of another model or other settings."""
    if fresh:
        path.unlink(missing_ok=True)
    try:
        with SqliteDict(str(path), autocommit=True) as answers:
            recorded = answers.get(_IDENTITY)
            if recorded is None:
                answers[_IDENTITY] = identity
                answers.commit(blocking=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be used ({error}): move it away, or start anew with --overwrite") from None
    if recorded is not None and recorded != identity:
        different = ", ".join(sorted(key for key in identity if recorded.get(key) != identity[key]))
        raise InputError(f"{path}: holds answers of another evaluation ({different}): start anew with --overwrite")
