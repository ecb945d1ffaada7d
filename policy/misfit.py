"""What to say when nothing fits: which tier lacks how many bytes, and what would cost least to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexbatch.errors import DoesNotFitError
from flexbatch.policy.candidates import Shop, Trial, realise
from flexbatch.policy.memory import sized
from flexbatch.policy.program import shortfall
from flexbatch.policy.steady import Choice
from flexbatch.units import MIB, format_size

_GROWTH = 1.02
_ATTEMPTS = 200


def does_not_fit(shop: Shop, choices: Sequence[Choice]) -> DoesNotFitError:
    """The error with the least that has to be added to one tier for one row to run.

    Every choice with the smallest micro-batch is asked what each tier lacks; the smallest answer is made exact by
    trying it.
    """
    rows = min(choice.rows for choice in choices)
    asked = [replace(choice, least=0) for choice in choices if choice.rows == rows]
    least: tuple[float, str, Choice] | None = None
    for choice in asked:
        problem = shop.problem(choice)
        for tier in ("gpu", "cpu", "disk"):
            if tier not in problem.limits:
                continue
            missing = shortfall(problem, tier, shop.mean(choice).tokens)
            if missing is not None and (least is None or missing < least[0]):
                least = (missing, tier, choice)
    if least is None:
        return _more_than_one(shop, asked[0])
    missing, tier, choice = least
    exact = _exact(shop, choice, tier, missing)
    there = shop.machine.whole(tier)
    wanted = f"raise --{tier}-memory to {format_size(there + exact)}"
    packed = sum(unit.nbytes for unit in sized(shop.units, 4))
    stored = sum(unit.nbytes for unit in shop.units)
    if choice.weight_bits == 16 and shop.options.weight_bits == 16 and stored - packed > exact and tier != "disk":
        wanted += " or use --weight-bits 4"
    return DoesNotFitError(
        f"{shop.name} does not fit: its smallest plan needs {format_size(there + exact)} on the {tier} tier, which "
        f"has {format_size(there)}: {format_size(exact)} are missing: {wanted}, or shorten the rows",
        tier=tier,
        missing=exact,
        remedy=f"--{tier}-memory",
    )


def _exact(shop: Shop, choice: Choice, tier: str, missing: float) -> int:
    """``missing`` raised until the account of memory accepts a plan with one row."""
    step = max(MIB, int(0.005 * missing))
    amount = max(1, int(missing))
    for _ in range(_ATTEMPTS):
        larger = _with_more(shop, tier, amount)
        if realise(larger, [Trial(choice, None, 1.0, larger.machine)]):
            return amount
        amount = int(_GROWTH * amount) + step
    return amount


def _with_more(shop: Shop, tier: str, amount: int) -> Shop:
    machine = shop.machine.with_budget(tier, shop.machine.budget(tier) + amount)
    own = (shop.name, shop.size, shop.units, shop.workload, shop.options)
    return Shop(*own, machine, shop.profile, shop.stored_dtype, shop.placed)


def _more_than_one(shop: Shop, choice: Choice) -> DoesNotFitError:
    """Several tiers are too small at once: name the tier of the products and what everything there would need."""
    tier = shop.machine.compute
    missing = max(1, sum(unit.nbytes for unit in shop.resized(choice)) - shop.machine.budget(tier))
    return DoesNotFitError(
        f"{shop.name} does not fit: several tiers are too small at once, the {tier} tier among them, which has "
        f"{format_size(shop.machine.whole(tier))}: {format_size(missing)} are missing there: raise --gpu-memory, "
        "--cpu-memory and --disk-memory, or give --weights, --kv and --hidden other shares",
        tier=tier,
        missing=missing,
        remedy=f"--{tier}-memory",
    )
