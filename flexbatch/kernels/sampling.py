"""From logits to tokens: greedy and sampled choice, and log-probabilities, for rows with different settings.

Knows nothing of requests or of where the random numbers come from: each row brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexbatch.sampling import SamplingParams

CHUNK_BYTES = 64 * 1024**2
"""Working memory of one call: rows are processed in chunks of at most this many bytes (one row at least)."""

_ROW_BYTES = 72
"""Working bytes per row and vocabulary entry: the bound that CHUNK_BYTES is divided by."""

_NUCLEUS = 256
"""Candidates looked at first for top-p; nearly every trained model's nucleus lies within, and a sort is avoided."""

NO_TOKEN = -1
"""What ``choose`` returns for a row that has no distribution (NaN, or nothing but -inf)."""


def choose(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Choose one token per row: logits [R, V] of any float type -> int64 [R] on the same device.

    Greedy rows (temperature 0) take the largest raw logit, the smallest id among equals. The others are sampled as
    transformers does it: divide by the temperature in fp32, keep the top-k (all that equal the k-th), of these keep
    the smallest set whose renormalised probability reaches top-p, then invert the cumulative distribution in token-id
    order at the row's number in [0, 1). Of equals at top-p's border the smaller ids stay (transformers leaves this to
    an unstable sort), so that the tightest top-p is greedy. Greedy rows ignore their number.

    Probabilities are exp() in float64, then fixed-point int64 relative to the row's largest: sums of integers are
    exact in any order, so a row's token does not depend on its neighbours, on the number of threads, or on the
    device's way to add. Tokens less likely than the best by more than 2**44 (for V = 262,144; more for smaller V)
    count as impossible.

    A row with NaN or without any finite logit gives NO_TOKEN, as does a sampled row with +inf: the caller decides
    what becomes of that row. Works in chunks of at most CHUNK_BYTES of tensors (72 bytes per row and entry, one row at
    least), beside a copy of the greedy rows when both kinds are mixed.
    """
    rows, vocab = logits.shape
    assert len(params) == len(uniforms) == rows
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    greedy = [row for row, p in enumerate(params) if p.greedy]
    sampled = [row for row, p in enumerate(params) if not p.greedy]
    if greedy:
        index = None if len(greedy) == rows else torch.tensor(greedy, device=logits.device)
        best, token = (logits if index is None else logits[index]).max(dim=-1)
        token = token.masked_fill(best.isnan() | best.isneginf(), NO_TOKEN)
        out[slice(None) if index is None else index] = token
    for part in _chunks(sampled, vocab):
        index = torch.tensor(part, device=logits.device)
        out[index] = _sample(logits[index].float(), [params[row] for row in part], [uniforms[row] for row in part])
    return out


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (natural log, fp32 log-softmax of the raw logits) of given tokens and of the likeliest ones.

    logits [R, V] of any float type, tokens int64 [R] -> the tokens' log-probabilities fp32 [R], the ids int64 [R, K]
    and log-probabilities fp32 [R, K] of the K = min(top, V) most likely tokens: by falling logit, among equals by
    rising id, so that the first is the greedy choice. A logit of -inf gives -inf. Works in chunks of at most
    CHUNK_BYTES (one row at least).
    """
    rows, vocab = logits.shape
    top = min(top, vocab)
    chosen = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, top, dtype=torch.int64, device=logits.device)
    values = torch.empty(rows, top, dtype=torch.float32, device=logits.device)
    for part in _chunks(range(rows), vocab):
        where = slice(part[0], part[-1] + 1)
        scores = logits[where].float()  # [C, V]
        logprobs = scores.log_softmax(dim=-1)  # [C, V]
        chosen[where] = logprobs.gather(1, tokens[where, None]).squeeze(1)
        if top:
            ids[where] = _top_ids(scores, top)
            values[where] = logprobs.gather(1, ids[where])
    return chosen, ids, values


def _chunks(rows: Sequence[int], vocab: int) -> list[Sequence[int]]:
    """Cut ``rows`` into runs whose working memory stays within CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (vocab * _ROW_BYTES))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _top_ids(scores: Tensor, top: int) -> Tensor:
    """[C, V] -> int64 [C, top]: ids by falling score, equals by rising id (torch.topk promises neither)."""
    # One more than asked for shows whether the last one has an equal that was left out.
    values, ids = scores.topk(min(top + 1, scores.shape[1]), dim=-1)
    last = values[:, top - 1, None]
    ids, order = ids[:, :top].sort(dim=-1)
    order = values[:, :top].gather(1, order).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    if values.shape[1] > top:
        for row in (values[:, top] == last[:, 0]).nonzero().flatten().tolist():
            candidates = (scores[row] >= last[row]).nonzero().flatten()  # ids rise
            order = scores[row, candidates].sort(descending=True, stable=True).indices
            ids[row] = candidates[order[:top]]
    return ids


def _sample(scores: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """fp32 [C, V] (overwritten) -> int64 [C]: one sampled token per row."""
    device, vocab = scores.device, scores.shape[1]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)[:, None]
    # So low a temperature that the largest score would overflow is raised until it does not: still one token wins.
    temperatures = torch.maximum(temperatures, scores.amax(dim=-1, keepdim=True).abs() / 1e38)
    scores /= temperatures.clamp_(min=torch.finfo(torch.float32).tiny)
    limited = [row for row, p in enumerate(params) if 0 < p.top_k < vocab]
    if limited:
        index = torch.tensor(limited, device=device)
        some = scores[index]
        ks = torch.tensor([params[row].top_k for row in limited], device=device)
        least = some.topk(int(ks.max()), dim=-1).values.gather(1, ks[:, None] - 1)
        scores[index] = some.masked_fill_(some < least, -torch.inf)
    weights = _weights(scores)  # int64 [C, V]
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1]
    for part in _chunks(nucleus, vocab):
        index = torch.tensor(part, device=device)
        weights[index] = _keep_top_p(scores[index], weights[index], [params[row].top_p for row in part])
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    # Below the total even after rounding: the largest float64 below 1 takes off at least one step of the product.
    target = (torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None] * total).long()
    # The first sum above the target always belongs to a token of positive weight.
    token = torch.searchsorted(sums, target, right=True).squeeze(1)
    return token.masked_fill(total.squeeze(1) == 0, NO_TOKEN)


def _weights(scores: Tensor) -> Tensor:
    """fp32 [C, V] -> int64 [C, V]: exp(score - largest) in fixed point; no row's sum overflows; all 0 where undefined.

    The integers have 63 bits less those that V entries can add.
    """
    scale = 2.0 ** (63 - scores.shape[1].bit_length())
    probabilities = scores.double()
    probabilities -= probabilities.amax(dim=-1, keepdim=True)
    probabilities.exp_().mul_(scale).round_()
    # inf - inf, and NaN, which no integer stands for: any NaN in a row leaves its largest score NaN, so all of them.
    return probabilities.nan_to_num_(nan=0.0).long()


def _keep_top_p(scores: Tensor, weights: Tensor, top_p: Sequence[float]) -> Tensor:
    """fp32 [C, V] scores, int64 [C, V] weights -> the weights, 0 outside each row's nucleus (in place).

    In falling order a token stays while the weights before it have not reached the needed sum, so the nucleus is all
    scores above one boundary score and some of those equal to it.
    """
    total = weights.sum(dim=-1, keepdim=True)
    removed = (1 - torch.tensor(top_p, dtype=torch.float64, device=scores.device))[:, None] * total
    needed = (total - removed.long()).clamp(min=1)  # [C, 1]; at least one token stays
    boundary, each, reached = _boundary(scores, weights, needed, _NUCLEUS)
    wide = (~reached).nonzero().flatten()
    if len(wide):
        boundary[wide], each[wide], _ = _boundary(scores[wide], weights[wide], needed[wide], scores.shape[1])
    weights.masked_fill_(scores < boundary, 0)
    equal = scores == boundary
    above = weights.masked_fill(equal, 0).sum(dim=-1, keepdim=True)
    stay = (needed - above + each - 1) // each.clamp(min=1)  # how many of the equals
    equals = equal.sum(dim=-1, keepdim=True)
    if bool((stay < equals).any()):
        # Of the equals, those stay that have fewer than ``stay`` equals of smaller id.
        weights.masked_fill_(equal & (equal.cumsum(dim=-1) > stay), 0)
    return weights


def _boundary(scores: Tensor, weights: Tensor, needed: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find, among the ``most`` best of each row, where the falling sum of weights reaches ``needed`` [C, 1].

    Returns the score there [C, 1], its weight [C, 1], and whether the sum was reached (bool [C]).
    """
    if most < scores.shape[1]:
        values, ids = scores.topk(most, dim=-1)
    else:
        values, ids = scores.sort(dim=-1, descending=True)
    sums = weights.gather(1, ids).cumsum_(dim=-1)
    place = (sums < needed).sum(dim=-1, keepdim=True)
    reached = (place < sums.shape[1]).squeeze(1)
    place.clamp_(max=sums.shape[1] - 1)
    return values.gather(1, place), weights.gather(1, ids.gather(1, place)), reached
