"""The ``quantization_config`` of a ``config.json``: which 4-bit checkpoints can be read; others are refused by name.

Knows the fields of GPTQ (AutoGPTQ, GPTQModel, optimum) and AWQ (AutoAWQ); not how their tensors are laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexbatch.config_fields import REQUIRED, Field, flag, read_fields, refuse, words

GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the 4-bit linears of a checkpoint are stored.

    ``zero_offset`` is added to a stored zero point (GPTQ's first format stores it less one). ``symmetric``: all zero
    points are the middle code. ``act_order``: each input names its group. ``skipped``: modules (parts of their names)
    that were left as they are. ``flexbatch``: what ``convert`` wrote; each tensor says itself how it is packed.
    """

    method: Literal["gptq", "awq", "flexbatch"]
    group: int
    zero_offset: int = 0
    symmetric: bool = False
    act_order: bool = False
    skipped: tuple[str, ...] = ()


def _one_of(*allowed: Any, default: Any = REQUIRED) -> Field:
    def check(value: Any) -> str | None:
        value = value.lower() if isinstance(value, str) else value
        if any(type(value) is type(known) and value == known for known in allowed):
            return None
        return " or ".join(str(known) for known in allowed) + " (nothing else is supported)"

    return Field(check, default, null=default is None)


def _anything() -> Field:
    return Field(lambda _: None, None, null=True)


def _empty() -> Field:
    """A field that changes how tensors are stored as soon as it says anything."""
    return Field(
        lambda value: None if value in (False, {}, []) else "empty (nothing else is supported)", None, null=True
    )


# What a checkpoint tells of how it was made, and of kernels that other programs should use.
_RECORDS = (
    "quant_method method meta quantizer dataset tokenizer backend damp_percent damp_auto_increment true_sequential "
    "static_groups act_group_aware hyb_act mse failsafe fallback offload_to_disk model_seqlen model_name_or_path "
    "model_file_base_name block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize "
    "inside_layer_modules batch_size pad_token_id max_input_length cache_block_outputs use_cuda_fp16 use_exllama "
    "disable_exllama exllama_config do_fuse fuse_max_seq_len modules_to_fuse awq_gemv_config ccl desc"
)
_COMMON: dict[str, Field] = {
    **{name: _anything() for name in _RECORDS.split()},
    "bits": _one_of(4),
    "group_size": _one_of(*GROUPS),
    "modules_to_not_convert": words(),
    "lm_head": _empty(),
    "dynamic": _empty(),
    "adapter": _empty(),
    "rotation": _empty(),
    "is_marlin_format": _empty(),
    "pack_dtype": _one_of("int32", default="int32"),
}
_GPTQ: dict[str, Field] = {
    **_COMMON,
    "desc_act": flag(False),
    "sym": flag(True),
    "checkpoint_format": _one_of("gptq", "gptq_v2", default=None),
    "format": _one_of("gptq", "gptq_v2", default=None),
}
_AWQ: dict[str, Field] = {
    **_COMMON,
    "zero_point": _one_of(True, default=True),
    "version": _one_of("gemm", default=None),
    "format": _one_of("gemm", default=None),
    "checkpoint_format": _one_of("gemm", default=None),
    "sym": _one_of(False, default=False),
    "desc_act": _one_of(False, default=False),
}
_OWN: dict[str, Field] = {
    "quant_method": _anything(),
    "version": _one_of(1),
    "bits": _one_of(4),
    "group_size": _one_of(*GROUPS),
}
_METHODS = {"gptq": _GPTQ, "awq": _AWQ, "flexbatch": _OWN}


def read_quantization(architecture: str, config: Mapping[str, Any]) -> Quantization | None:
    """Return how a configuration's weights are quantized, or None for one that says nothing of it.

    Raises ModelError, naming method, field and value, on everything that cannot be read exactly.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(method, str) or method.lower() not in _METHODS:
        reason = "only gptq and awq are supported; use the original 16-bit checkpoint"
        raise refuse(architecture, "quantization_config.quant_method", method, reason)
    method = method.lower()
    where = f"{architecture}: quantization_config ({method})"
    fields = _METHODS[method]
    for name in given:
        if name not in fields:
            raise refuse(where, name, given[name], "this field is not known, and may change what the tensors mean")
    values = read_fields(where, fields, given)
    if method == "flexbatch":
        return Quantization("flexbatch", values["group_size"])
    skipped = tuple(values["modules_to_not_convert"] or ())
    if method == "awq":
        return Quantization("awq", values["group_size"], skipped=skipped)
    formats = {str(values[name]).lower() for name in ("checkpoint_format", "format") if values[name] is not None}
    if len(formats) > 1:
        raise refuse(where, "checkpoint_format", values["checkpoint_format"], f"but format is {values['format']!r}")
    offset = 0 if "gptq_v2" in formats else 1
    return Quantization("gptq", values["group_size"], offset, values["sym"], values["desc_act"], skipped)
