"""A plan as a table that a person reads at a glance. Knows the plan's JSON and its gains, nothing behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexbatch.units import format_duration, format_size

if TYPE_CHECKING:
    from flexbatch.policy.whatif import Insight

_TIERS = {"gpu": "GPU", "cpu": "RAM", "disk": "disk"}
_RESOURCES = {
    "gpu": "GPU",
    "cpu": "CPU",
    "h2d": "RAM to GPU",
    "d2h": "GPU to RAM",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
}
_WORTH_SAYING = 0.0005


def plan_table(plan: dict[str, Any], insight: Insight) -> str:
    """Return placement per tier, block, prediction, what binds, and what more hardware would give."""
    tiers = [tier for tier in _TIERS if plan["memory"].get(tier, {}).get("budget")]
    work = plan["workload"]
    lengths = f"{work['prompt_len']:.0f} + {work['gen_len']:.0f} tokens"
    lines = [
        f"{plan['model']} on {plan['hardware']}",
        f"{work['num_requests']} rows of {lengths}" + (" on average" if work["prompt_len"] % 1 else ""),
        "",
        *_memory(plan, tiers),
        "",
    ]
    rows = {
        "block": _block(plan),
        "precision": f"{plan['dtype']}, weights {plan['weight_bits']} bit, KV cache {plan['kv_bits']} bit",
        "prediction": _prediction(plan["predicted"]),
        "busy": _busy(plan["predicted"]),
        "binds": _binds(plan["predicted"], insight),
        "one more GB": _gains(insight.more, _TIERS),
        "twice as fast": _gains(insight.faster, _RESOURCES),
        "finetuning": _finetuning(plan.get("finetune")),
    }
    width = max(map(len, rows)) + 2
    return "\n".join(lines + [f"{name.ljust(width)}{text}" for name, text in rows.items() if text])


def _finetuning(found: dict[str, Any] | None) -> str:
    """How a training would share the sweeps, and how fast it would be alone."""
    if found is None:
        return ""
    both, alone = found["together"], found["alone"]
    how = {"riding": "rides on the sweeps", "reverse": "goes between the sweeps"}[both["order"]]
    rate = f"{both['predicted']['tokens_per_s']:.1f} tokens/s"
    alone_rate = "does not fit alone" if alone is None else f"{alone['predicted']['tokens_per_s']:.1f} alone"
    return (
        f"{how}, {both['tokens_per_sweep']} tokens at a time, {rate} ({alone_rate}); inputs of layers in "
        f"{_TIERS[both['kept']]}; {both['reason']}"
    )


def _memory(plan: dict[str, Any], tiers: list[str]) -> list[str]:
    """Shares and bytes of everything on every tier that there is."""
    table = [["", *(_TIERS[tier] for tier in tiers)]]
    for name, key in (("weights", "weights"), ("KV cache", "kv"), ("hidden states", "hidden")):
        cells = [_cell(plan["memory"][tier][key], plan[key][tier]) for tier in tiers]
        table.append([name, *cells])
    for name, key in (
        ("adapters", "adapters"),
        ("working memory", "working"),
        ("total", "total"),
        ("budget", "budget"),
    ):
        if key != "adapters" or any(plan["memory"][tier][key] for tier in tiers):
            table.append([name, *(_cell(plan["memory"][tier][key], None) for tier in tiers)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "   ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in pairs).rstrip()
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in table)
    ]


def _cell(nbytes: int, share: float | None) -> str:
    size = format_size(nbytes) if nbytes else "-"
    if share is None:
        return size
    if not share:
        return size
    # Weights on disk are read where the checkpoint lies: no bytes of the tier's budget.
    return f"{100 * share:5.1f}%  {(size if nbytes else 'in place').rjust(9)}"


def _block(plan: dict[str, Any]) -> str:
    if plan["schedule"] == "block":
        return f"{plan['max_sequences']} sequences in micro-batches of {plan['micro_batch_sequences']}, fixed block"
    attended = ""
    if plan["memory"]["gpu"]["budget"]:
        attended = f", {100 * plan['cpu_attention']:.0f}% of the KV cache attended to on the CPU"
    return f"{plan['max_sequences']} sequences, micro-batches of {plan['micro_batch_tokens']} tokens{attended}"


def _prediction(predicted: dict[str, Any]) -> str:
    if not predicted:
        return ""
    whole = f", {format_duration(predicted['job_s'])} for the job" if "job_s" in predicted else ""
    rate = predicted["throughput_tok_s"]
    shown = f"{rate:.2f}" if rate < 10 else f"{rate:.1f}"
    sweep = predicted["sweep_s"]
    each = format_duration(sweep) if sweep >= 1 else f"{1000 * sweep:.0f} ms"
    return f"{shown} tokens/s, {each} a sweep{whole}"


def _busy(predicted: dict[str, Any]) -> str:
    if not predicted or predicted["sweep_s"] <= 0:
        return ""
    shares = sorted(predicted["resource_s"].items(), key=lambda item: -item[1])
    percent = {name: 100 * spent / predicted["sweep_s"] for name, spent in shares}
    parts = [f"{_RESOURCES[name]} {part:.0f}%" for name, part in percent.items() if part >= 0.5]
    return ", ".join(parts) + " of a sweep"


def _binds(predicted: dict[str, Any], insight: Insight) -> str:
    parts = [_RESOURCES[name] for name, gain in _ordered(insight.faster) if gain > _WORTH_SAYING]
    if not parts and predicted:
        parts = [_RESOURCES[predicted["bottleneck"]]]
    parts += [f"memory of the {_TIERS[tier]} tier" for tier in insight.full]
    if insight.short_job:
        parts.append("the number of rows")
    return ", ".join(parts)


def _gains(gains: Any, names: dict[str, str]) -> str:
    if not gains:
        return ""
    shown = [f"{names[key]} +{100 * gain:.1f}%" for key, gain in _ordered(gains) if gain > _WORTH_SAYING]
    rest = [names[key] for key, gain in gains.items() if gain <= _WORTH_SAYING]
    nothing = [f"nothing from {', '.join(rest)}"] if rest else []
    return "; ".join([*([", ".join(shown)] if shown else []), *nothing])


def _ordered(gains: Any) -> list[tuple[str, float]]:
    return sorted(gains.items(), key=lambda item: -item[1])
