"""Whole trainings of tiny models against PEFT, autograd and torch's own optimizers; what is written loads in PEFT."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.locate import locate
from flexbatch.errors import AdapterError, UsageError
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.finetune.parameters import Parameters
from tests.finetune.oracle import peft_model
from tests.oracle import assert_equal, generate_row
from tests.tiny import load_oracle, tiny_checkpoint

END = 2


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows_for(vocab: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts whose completion follows from them, so that there is something to learn."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        start, step = rng.randrange(3, vocab), rng.choice([1, 2])
        line = [3 + (start + step * at) % (vocab - 3) for at in range(rng.randint(4, 14))]
        cut = rng.randint(1, len(line) - 2)
        rows.append({"prompt": line[:cut], "completion": line[cut:]})
    return rows


def oracle_losses(model: Any, rows: list[dict[str, Any]], options: dict[str, Any], per_step: int) -> list[float]:
    """The loss of every step as torch, PEFT and transformers' schedules give it; ``model`` is PEFT's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay, steps = options["learning_rate"], options.get("weight_decay", 0.0), options["max_steps"]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    warmup = options.get("warmup_steps", 0)
    schedule = (
        get_constant_schedule_with_warmup(optimizer, warmup)
        if options.get("lr_schedule") == "constant"
        else get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    )
    losses: list[float] = []
    batches = [rows[at : at + per_step] for at in range(0, len(rows), per_step)]
    for step in range(steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=next(iter(trained)).dtype)
        count = 0
        for row in batches[step % len(batches)]:
            tokens = torch.tensor([[*row["prompt"], *row["completion"], END]])
            targets = tokens[0, 1:].clone()
            targets[: len(row["prompt"]) - 1] = -100
            logits = model(tokens).logits[0, :-1]
            total = total + functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, options.get("clip", 1.0))
        optimizer.step()
        schedule.step()
        losses.append(float(total.detach() / count))
    return losses


def test_fifty_steps_follow_peft_and_torch(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "llama")
    rows = rows_for(149, 22)
    options: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "learning_rate": 5e-3,
        "max_steps": 50,
        "warmup_steps": 5,
        "weight_decay": 0.01,
    }
    with LLM(path) as llm:
        trained = llm.finetune(
            rows, tmp_path / "out", batch_size=3, grad_accumulation=2, seed=3, save_every=20, **options
        )
    shape = locate(str(path)).shape
    fresh = Parameters.create(shape, rank=4, alpha=8, target_modules="all-linear", seed=3)
    model = peft_model(path, fresh, rank=4, alpha=8, targets="all-linear").float()
    expected = oracle_losses(model, rows, options, 6)
    assert len(trained.losses) == 50
    worst = max(abs(ours - theirs) for ours, theirs in zip(trained.losses, expected, strict=True))
    print(f"largest difference of 50 losses: {worst:.2e}; {expected[0]:.3f} to {expected[-1]:.3f}")
    assert worst < 1e-4
    assert expected[-1] < 0.6 * expected[0]


@pytest.mark.parametrize(
    ("family", "variant", "targets"),
    [
        ("llama", "plain", ["q_proj", "down_proj"]),
        ("gpt2", "plain", "all-linear"),
        ("opt", "350m", "all-linear"),
        ("qwen2", "plain", ["v_proj"]),
    ],
)
def test_the_folder_loads_in_peft_and_says_the_same(
    family: str, variant: str, targets: list[str] | str, tmp_path: Path
) -> None:
    path = tiny_checkpoint(tmp_path / "model", family, variant)
    vocab = locate(str(path)).shape.vocab_size
    output = tmp_path / "out"
    with LLM(path) as llm:
        prompts = [[5, 6, 7], [9], [20, 22, 24, 26]]
        params = SamplingParams(max_tokens=12)
        base = llm.generate(prompts, params)
        trained = llm.finetune(
            rows_for(vocab, 12), output, rank=3, alpha=9, target_modules=targets, learning_rate=0.02, max_steps=6
        )
        results = llm.generate(prompts, params, lora=trained)
        again = llm.generate(prompts, params)
    assert [result.token_ids for result in again] == [result.token_ids for result in base]
    assert [result.token_ids for result in results] != [result.token_ids for result in base]
    with quiet():
        model = PeftModel.from_pretrained(load_oracle(path), output)
        # Nothing may be left at its start: PEFT only warns of missing factors.
        named = {name for name, _ in model.named_parameters() if "lora_" in name}
        rows = [generate_row(model, tuple(prompt), 12) for prompt in prompts]
    stored = json.loads((output / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["fan_in_fan_out"]) == (3, 9, family == "gpt2")
    assert len(named) == len(Parameters.read(locate(str(path)).shape, output).names())
    assert_equal(results, rows)


def test_training_goes_on_from_an_adapter(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "llama")
    rows = rows_for(149, 16)
    plain: dict[str, Any] = {"optimizer": "sgd", "lr_schedule": "constant", "learning_rate": 0.05, "clip": 0.0}
    with LLM(path) as llm:
        whole = llm.finetune(rows, tmp_path / "whole", max_steps=8, rank=2, alpha=6, **plain)
        first = llm.finetune(rows, tmp_path / "first", max_steps=4, rank=2, alpha=6, **plain)
        second = llm.finetune(rows, tmp_path / "second", max_steps=4, init_from=first.folder, **plain)
        assert [*first.losses, *second.losses] == whole.losses
        assert (tmp_path / "second" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "whole" / "adapter_model.safetensors"
        ).read_bytes()
        config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 6)
        # The same name again is another adapter from then on.
        prompt = [[5, 6, 7]]
        said = llm.generate(prompt, SamplingParams(max_tokens=20), lora=whole)
        other = llm.finetune(rows, tmp_path / "other", name="whole", max_steps=30, learning_rate=0.05, rank=2)
        assert llm.generate(prompt, SamplingParams(max_tokens=20), lora=other)[0].token_ids != said[0].token_ids
        with pytest.raises(UsageError, match="no linear module 'w_proj'"):
            llm.finetune(rows, tmp_path / "none", target_modules="w_proj")
        wrong = tiny_checkpoint(tmp_path / "gpt2", "gpt2")
        with LLM(wrong) as different, pytest.raises(AdapterError):
            different.finetune(rows_for(97, 4), tmp_path / "none", init_from=first.folder)
    assert not (tmp_path / "none.part").exists()


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    """A run that is broken off and resumed draws the masks of an uninterrupted one."""
    path = tiny_checkpoint(tmp_path / "model", "llama")
    rows = rows_for(149, 10)
    options: dict[str, Any] = {"max_steps": 7, "rank": 2, "dropout": 0.3, "batch_size": 2, "save_every": 1}

    class EnoughError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 4:
            raise EnoughError

    with LLM(path) as llm:
        whole = llm.finetune(rows, tmp_path / "whole", **options)
        with pytest.raises(EnoughError):
            llm.finetune(rows, tmp_path / "broken", **options, observe=stop)
        resumed = llm.finetune(rows, tmp_path / "broken", **options)
        plain = llm.finetune(rows, tmp_path / "plain", **{**options, "dropout": 0.0})
    assert resumed.losses == whole.losses
    assert plain.losses != whole.losses
    names = [folder / "adapter_model.safetensors" for folder in (whole.folder, resumed.folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


def fail(results: list[Any]) -> None:
    raise RuntimeError(f"after {len(results)} results")


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("generates", [True, False])
def test_training_beside_generation(loaded: bool, generates: bool, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "llama")
    rows = rows_for(149, 12)
    options: dict[str, Any] = {"rank": 2, "learning_rate": 0.02, "max_steps": 4, "batch_size": 2}
    prompts, params = [[5, 6, 7], [9], [20, 22, 24, 26]] * 3, SamplingParams(max_tokens=9)
    with LLM(path) as llm:
        alone = llm.finetune(rows, tmp_path / "alone", **options)
        base = llm.generate(prompts, params) if loaded else []
        with llm.finetuning(rows, tmp_path / "beside", FinetuneOptions(**options), share=0.5) as adapter:
            results = llm.generate(prompts, params) if generates else []
            with pytest.raises(UsageError, match="another training is under way"), llm.finetuning(rows, tmp_path / "x"):
                pass
        assert adapter().losses == pytest.approx(alone.losses, rel=1e-5)
        if loaded and generates:
            assert [each.token_ids for each in results] == [each.token_ids for each in base]
        tuned = llm.generate(prompts, params, lora=adapter())
        assert [each.token_ids for each in tuned] == [
            each.token_ids for each in llm.generate(prompts, params, lora=alone)
        ]
        with llm.finetuning(rows, tmp_path / "beside", FinetuneOptions(**options)) as again:  # complete already
            pass
        assert again().losses == adapter().losses
        with pytest.raises(RuntimeError), llm.finetuning(rows, tmp_path / "broken", FinetuneOptions(**options)):
            fail(llm.generate(prompts, params))
        assert llm.finetune(rows, tmp_path / "broken", **options).losses == pytest.approx(alone.losses, rel=1e-5)
