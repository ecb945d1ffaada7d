"""The trained adapter as a folder that PEFT loads: settings, factors and a model card.

Knows PEFT's names and files; nothing of how the factors came about beyond what the card says.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.errors import UsageError
from flexbatch.finetune.optimizer import NamedTensors
from flexbatch.finetune.tensor_file import write_tensors
from flexbatch.jobs.durable import disk_error, replace_file, sync_folder
from flexbatch.lora.folders import CONFIG, SAFETENSORS

CARD = "README.md"
_PREFIX = "base_model.model."
_SHOWN = (
    *("rank", "alpha", "dropout", "optimizer", "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "clip"),
    *("batch_size", "grad_accumulation", "max_length", "base_bits", "seed"),
)
_FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What ``adapter_config.json`` says of an adapter. ``base`` names the model; ``modules`` are PEFT's targets.

    ``transposed``: the base stores these weights [in, out]. ``inherited`` are the settings of the adapter that the
    training began from; they win over rank, alpha and modules.
    """

    base: str
    rank: int
    alpha: float
    modules: tuple[str, ...]
    dropout: float = 0.0
    transposed: bool = False
    inherited: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as PEFT keeps them."""
        own = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "target_modules": list(self.modules),
            "bias": "none",
            "fan_in_fan_out": self.transposed,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        always = {"base_model_name_or_path": self.base, "lora_dropout": self.dropout, "inference_mode": True}
        return {**own, **(self.inherited or {}), **always}


def module_names(names: Iterable[str]) -> list[str]:
    """Return the modules that factors of these names belong to, in their order."""
    found: dict[str, None] = {}
    for name in names:
        for factor in _FACTORS:
            if name.endswith(factor):
                found.setdefault(name.removeprefix(_PREFIX).removesuffix(factor))
    return list(found)


def target_names(adapted: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest PEFT ``target_modules`` that mean exactly the modules ``adapted`` out of ``every`` linear."""
    short = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name in every if name.rpartition(".")[2] in short}
    return tuple(sorted(short if meant == set(adapted) else adapted))


def write_adapter(folder: Path, settings: AdapterSettings, trained: NamedTensors, card: str | None = None) -> None:
    """Write the adapter into the existing ``folder``. Raises DoesNotFitError on a full disk, UsageError otherwise."""
    shapes = {name: tuple(trained.parameter(name).shape) for name in trained.names()}
    write_tensors(folder / SAFETENSORS, shapes, ((name, trained.parameter(name)) for name in shapes))
    write_text(folder / CONFIG, json.dumps(settings.to_json(), indent=2, sort_keys=True) + "\n")
    if card is not None:
        write_text(folder / CARD, card)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all. Raises as ``replace_file`` does."""
    data = text.encode()
    replace_file(path, [data], len(data))


def check_output(output: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Raise UsageError unless ``output`` can become an adapter's folder (and is none yet, without ``overwrite``).

    ``option`` is what gave it.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{option} {output}: is a file: give a folder, which must not exist yet")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{option} {output}: there is no folder {parent}: make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {output}: the folder {parent} cannot be written: choose another")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise UsageError(f"{option} {output}: is a folder with other things in it: give one that does not exist yet")
    if not overwrite:
        raise UsageError(f"{option} {output}: exists: choose another name, or replace it with --overwrite")


def remove_output(output: Path) -> None:
    """Take the adapter away that ``check_output`` has found to be one, if any."""
    if output.is_dir():
        shutil.rmtree(output, ignore_errors=True)


def move_into_place(made: Path, output: Path) -> None:
    """Give the finished folder ``made`` the name ``output``, where at most an empty folder is."""
    try:
        made.rename(output)
    except OSError as error:
        raise disk_error(error, output) from None
    sync_folder(output.absolute().parent)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the model card says: the base, what was trained on, how, and how it ended."""

    name: str
    base: str
    data: str
    rows: int
    steps: int
    epochs: float
    tokens: int
    trained_tokens: int
    parameters: int
    modules: tuple[str, ...]
    settings: Mapping[str, Any]
    first_loss: float
    last_loss: float
    made_by: str


def model_card(facts: CardFacts) -> str:
    """Return the README.md of an adapter, its YAML head included."""
    table = [f"| {name.replace('_', ' ')} | {facts.settings[name]} |" for name in _SHOWN]
    base = json.dumps(facts.base, ensure_ascii=False)
    head = ["---", f"base_model: {base}", "library_name: peft", "pipeline_tag: text-generation"]
    head += ["tags:", "- lora", "- flexbatch", "---"]
    lines = [
        *head,
        "",
        f"# {facts.name}",
        "",
        f"A LoRA adapter for `{facts.base}`, trained with {facts.made_by}: {facts.parameters:,} numbers on "
        f"{', '.join(f'`{name}`' for name in facts.modules)}.",
        "",
        "## Training",
        "",
        f"{facts.rows} rows of `{facts.data}`, {facts.epochs:.3g} times over, in file order: {facts.tokens:,} tokens, "
        f"the loss over {facts.trained_tokens:,} of them, {facts.steps} steps. The loss (mean over the tokens of a "
        f"step, before its update) was {facts.first_loss:.4f} at the first step and {facts.last_loss:.4f} at the last.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *table,
        "",
        "## Use",
        "",
        "```bash",
        f"flexbatch run --model {facts.base} --lora {facts.name}=FOLDER --input rows.jsonl --output results.jsonl",
        "```",
        "",
        f'with rows such as `{{"prompt": "...", "lora": "{facts.name}"}}`, or in Python',
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), FOLDER)",
        "```",
    ]
    return "\n".join(lines) + "\n"
