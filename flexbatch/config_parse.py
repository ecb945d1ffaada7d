"""Reading a ``config.json`` into a ``ModelShape``: every field is accounted for, refused, or warned about.

A field is implemented; or known and without effect on inference; or known and required to have one value; or unknown
to transformers' own class (a warning). Knows nothing of files or weights; each architecture's table is in
``config_families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbatch.config_families import ARCHITECTURES, Architecture, Reading
from flexbatch.config_fields import read_fields, refuse
from flexbatch.config_quantization import read_quantization
from flexbatch.config_rope import ROPE_FIELDS
from flexbatch.errors import ModelError
from flexbatch.shapes import ModelShape

# Fields of transformers' base class, its generation settings, and bookkeeping: none changes a forward pass.
_IRRELEVANT = frozenset(
    {
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "name_or_path",
        "auto_map",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "use_bfloat16",
        "chunk_size_feed_forward",
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "use_cache",
        "tf_legacy_loss",
        "is_decoder",
        "tie_encoder_decoder",
        "attn_implementation",
        "experts_implementation",
        "tie_last_hidden_states",
        "return_dict_in_generate",
        "output_scores",
        "max_length",
        "min_length",
        "max_new_tokens",
        "min_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "min_p",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "suppress_tokens",
        "begin_suppress_tokens",
        "exponential_decay_length_penalty",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        "attention_dropout",
        "initializer_range",
    }
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
}
# Fields that no class of transformers reads but that well-known checkpoints carry: silent at these values.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "is_llama_config": (True, False),
}
_DTYPES = ("float16", "bfloat16", "float32")


def parse_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> tuple[ModelShape, tuple[str, ...]]:
    """Return the shape that a ``config.json`` describes, and warnings.

    End-of-sequence ids are the union of what both files name. Raises ModelError, naming architecture, field and
    value, on anything unknown to flexbatch that transformers would act on, and on wrong types or sizes.
    """
    name = _architecture_name(config)
    row = ARCHITECTURES[name]
    _check_fixed(name, config)
    values = read_fields(name, row.fields, config)
    warnings: list[str] = []
    reading = Reading(
        architecture=name,
        family=row.family,
        values=values,
        stored_dtype=_stored_dtype(name, config),
        eos=_eos(name, row, config, generation_config),
        config=config,
        warnings=warnings,
    )
    shape = row.build(reading)
    for field in config:
        if field in _known_fields(row) or field.startswith("_"):
            continue
        if field in _HARMLESS and config[field] in _HARMLESS[field]:
            continue
        warnings.append(f"config.json: {name} does not know the field {field}; it is ignored")
    return shape, tuple(warnings)


def _architecture_name(config: Mapping[str, Any]) -> str:
    supported = ", ".join(ARCHITECTURES)
    listed = config.get("architectures")
    model_type = config.get("model_type")
    if listed is None:
        name = next((name for name, row in ARCHITECTURES.items() if row.family == model_type), None)
        if name is None:
            raise ModelError(
                f"config.json: no architectures are named and model_type is {model_type!r} (supported: {supported})"
            )
        return name
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise ModelError(f"config.json: architectures must be a list with a name (supported: {supported})")
    name = listed[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"config.json: architecture {name} is not supported (supported: {supported})")
    if model_type is not None and model_type != ARCHITECTURES[name].family:
        raise refuse(name, "model_type", model_type, f"it must be {ARCHITECTURES[name].family}")
    return name


def _check_fixed(name: str, config: Mapping[str, Any]) -> None:
    read_quantization(name, config)
    for field, allowed in _FIXED.items():
        if field in config and config[field] not in allowed:
            raise refuse(name, field, config[field], f"only {allowed[0]!r} is supported")


def _known_fields(row: Architecture) -> set[str]:
    known = {key for field, spec in row.fields.items() for key in (field, *spec.aliases)}
    known |= _IRRELEVANT | row.irrelevant | set(_FIXED) | {"quantization_config"}
    return known | ROPE_FIELDS if row.rope else known


def _stored_dtype(name: str, config: Mapping[str, Any]) -> str:
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(field)
    if dtype is None:
        return "float32"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refuse(name, field, dtype, "it must be one of " + ", ".join(_DTYPES))
    return dtype


def _eos(
    name: str, row: Architecture, config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> tuple[int, ...]:
    found: set[int] = set()
    for source in (config, generation or {}):
        named = source.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise refuse(name, "eos_token_id", named, "it must be a token id or a list of them")
            if token >= 0:
                found.add(token)
    if generation is None and "eos_token_id" not in config and row.default_eos is not None:
        found.add(row.default_eos)  # the class's own default is all there is
    return tuple(sorted(found))
