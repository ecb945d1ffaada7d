"""Draws a plan with matplotlib: a roofline over tokens that share the weights, and the timeline of a sweep.

Owns the picture; the figures come from the plan's own cost model and simulator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch.errors import UsageError
from flexbatch.jobs.durable import disk_error

if TYPE_CHECKING:
    from flexbatch.policy.candidates import Shop
    from flexbatch.policy.plan import Plan
    from flexbatch.scheduler.timeline import Event

_FORMATS = (".png", ".svg", ".pdf")
_LAYERS_SHOWN = 6
_COLOURS = {
    "weights": "#3f7fbf",
    "KV cache": "#1f7a5c",
    "hidden": "#8064b0",
    "products": "#e07b39",
    "attention": "#c8473f",
}


def require_matplotlib(path: Path) -> None:
    """Raise UsageError unless a picture can be drawn to ``path``: before anything is computed."""
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot {path}: give a name that ends in {', '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib is not installed: pip install 'flexbatch[plot]'")


def draw(path: Path, plan: Plan, shop: Shop, events: Sequence[Event]) -> None:
    """Write the picture of ``plan``; ``events`` are a sweep's, or none if it has too many Steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    figure.suptitle(f"{plan.model} on {plan.hardware}")
    _roofline(upper, plan, shop)
    _timeline(lower, shop, events)
    try:
        figure.savefig(path)
    except OSError as error:
        raise disk_error(error, path) from None


def _roofline(axes: Any, plan: Plan, shop: Shop) -> None:
    """FLOP/s that each resource allows when a sweep's tokens share its weights, and where the plan stands."""
    profile, compute = shop.profile, "gpu" if shop.machine.compute == "gpu" else "cpu"
    flops = shop.size.linear_flops(1, 0)
    sizes = [2**power for power in range(13)]
    curve = profile.processor(compute).products[plan.dtype]
    axes.plot(sizes, [curve.at(rows) for rows in sizes], label=f"{compute} products, {plan.dtype}", color="#e07b39")
    moved = {"h2d": plan.weights.cpu + plan.weights.disk if compute == "gpu" else 0.0, "disk_read": plan.weights.disk}
    stored = sum(unit.nbytes for unit in shop.units) * (plan.weight_bits / 16 if plan.weight_bits < 16 else 1)
    for (link, share), colour in zip(moved.items(), ("#7fb2e5", "#3f7fbf"), strict=True):
        if share > 0:
            bound = [rows * flops / (share * stored / profile.links[link]) for rows in sizes]
            axes.plot(sizes, bound, label=f"{link}: {100 * share:.0f}% of the weights", linestyle="--", color=colour)
    predicted = plan.predicted
    if predicted.get("sweep_s"):
        # A row's tokens, prompt and new, pass once while it is in flight for as many sweeps as it has new tokens.
        tokens = plan.max_sequences * (plan.prompt_len + plan.gen_len) / max(1.0, plan.gen_len)
        done = shop.size.linear_flops(round(tokens), plan.max_sequences) / predicted["sweep_s"]
        axes.plot([tokens], [done], "o", color="black", label="this plan")
    axes.set(xscale="log", yscale="log", xlabel="tokens that share a sweep's weights", ylabel="FLOP/s of products")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="lower right")


def _timeline(axes: Any, shop: Shop, events: Sequence[Event]) -> None:
    """The Steps of a few layers in the middle of a sweep, one row a resource."""
    from flexbatch.scheduler.timeline import RESOURCES

    first = max(1, shop.size.shape.num_layers // 2)
    shown = [event for event in events if first <= event.step.group < first + _LAYERS_SHOWN and event.step.batch >= 0]
    if not shown:
        axes.text(
            0.5, 0.5, "a sweep of this plan has too many steps to be drawn", ha="center", transform=axes.transAxes
        )
        axes.set_axis_off()
        return
    begin, end = min(event.start for event in shown), max(event.end for event in shown)
    visible = [event for event in events if event.end > begin and event.start < end]
    present = [resource for resource in RESOURCES if any(event.step.resource == resource for event in visible)]
    for place, resource in enumerate(reversed(present)):
        for event in visible:
            if event.step.resource == resource:
                bar = (1e3 * (event.start - begin), 1e3 * (event.end - event.start))
                axes.broken_barh([bar], (place - 0.4, 0.8), color=_COLOURS[_family(event.step.kind)], linewidth=0)
    axes.set(
        yticks=range(len(present)),
        yticklabels=list(reversed(present)),
        xlim=(0, 1e3 * (end - begin)),
        xlabel=f"milliseconds, layers {first} to {first + _LAYERS_SHOWN - 1} of a simulated sweep",
    )
    for name, colour in _COLOURS.items():
        axes.plot([], [], color=colour, linewidth=6, label=name)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(_COLOURS), frameon=False)


def _family(kind: str) -> str:
    if kind in ("read", "upload"):
        return "weights"
    if kind.startswith("kv_"):
        return "KV cache"
    if kind in ("attend", "qkv_down", "attended_up"):
        return "attention"
    return "hidden" if kind.startswith("hidden_") else "products"
