"""Short names of well-known models, and fetching a model's files from the Hugging Face hub.

Knows names and which files are wanted; not what stands in them.
"""

from __future__ import annotations

import os
from pathlib import Path

from flexbatch.errors import ModelError

_CONFIG_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
_BIN = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")


def _sizes(pattern: str, sizes: str) -> dict[str, str]:
    """``{}`` of both parts of ``short=owner/name`` filled with each size."""
    short, full = pattern.split("=")
    return {short.format(size.lower()): full.format(size) for size in sizes.split()}


SHORT_NAMES: dict[str, str] = {
    **_sizes("opt-{}=facebook/opt-{}", "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b"),
    **_sizes("opt-iml-{}=facebook/opt-iml-{}", "1.3b 30b"),
    "gpt2": "openai-community/gpt2",
    **_sizes("gpt2-{}=openai-community/gpt2-{}", "medium large xl"),
    "distilgpt2": "distilbert/distilgpt2",
    **_sizes("llama-2-{}=meta-llama/Llama-2-{}-hf", "7b 13b 70b"),
    **_sizes("llama-2-{}-chat=meta-llama/Llama-2-{}-chat-hf", "7b 13b 70b"),
    **_sizes("llama-3-{}=meta-llama/Meta-Llama-3-{}", "8B 70B"),
    **_sizes("llama-3-{}-instruct=meta-llama/Meta-Llama-3-{}-Instruct", "8B 70B"),
    **_sizes("llama-3.1-{}=meta-llama/Llama-3.1-{}", "8B 70B 405B"),
    **_sizes("llama-3.1-{}-instruct=meta-llama/Llama-3.1-{}-Instruct", "8B 70B 405B"),
    **_sizes("llama-3.2-{}=meta-llama/Llama-3.2-{}", "1B 3B"),
    **_sizes("llama-3.2-{}-instruct=meta-llama/Llama-3.2-{}-Instruct", "1B 3B"),
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    **_sizes("qwen2-{}=Qwen/Qwen2-{}", "0.5B 1.5B 7B 72B"),
    **_sizes("qwen2-{}-instruct=Qwen/Qwen2-{}-Instruct", "0.5B 1.5B 7B 72B"),
    **_sizes("qwen2.5-{}=Qwen/Qwen2.5-{}", "0.5B 1.5B 3B 7B 14B 32B 72B"),
    **_sizes("qwen2.5-{}-instruct=Qwen/Qwen2.5-{}-Instruct", "0.5B 1.5B 3B 7B 14B 32B 72B"),
    **_sizes("qwen3-{}=Qwen/Qwen3-{}", "0.6B 1.7B 4B 8B 14B 32B"),
    **_sizes("smollm2-{}=HuggingFaceTB/SmolLM2-{}", "135M 360M 1.7B"),
    **_sizes("smollm2-{}-instruct=HuggingFaceTB/SmolLM2-{}-Instruct", "135M 360M 1.7B"),
}
"""Short name (lower case) to hub id."""


def canonical(model: str) -> str:
    """Return what different ways of writing one model have in common: a folder's path, or the hub id in lower case."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else SHORT_NAMES.get(model.lower(), model).lower()


def fetch(model: str, repo: str, *, weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing: configuration, tokenizer, weights.

    ``.bin`` weights are fetched only where no safetensors exist. With ``HF_HUB_OFFLINE=1`` or no network, a model
    that is not cached raises ModelError naming what would be fetched.
    """
    patterns = (*_CONFIG_FILES, *_SAFETENSORS) if weights else _CONFIG_FILES
    folder = _snapshot(model, repo, patterns)
    if weights and not any(any(folder.glob(pattern)) for pattern in _SAFETENSORS):
        folder = _snapshot(model, repo, _BIN)
    return folder


def _snapshot(model: str, repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    try:
        return Path(
            snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=["*/*"], local_files_only=offline)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"model {model}: {repo} is gated on the Hugging Face hub: accept its licence there and log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {model}: the Hugging Face hub has no (public) model {repo}") from error
    except HFValidationError as error:
        raise ModelError(f"model {model}: {repo!r} is no valid hub id (owner/name)") from error
    except Exception as error:  # the client's own errors, and those of whichever HTTP library it is built on
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
        raise ModelError(
            f"model {model} is not on this machine and {reason}: {', '.join(patterns)} of {repo} would be fetched; "
            "connect once, or give a folder that holds the model"
        ) from error
