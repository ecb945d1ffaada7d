"""The loss and its gradient by the last hidden states, a chunk of rows at a time: full logits never exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Head = Callable[[Tensor, Tensor], Tensor]
"""Hidden states of some rows, and which rows these are -> their logits."""


def loss_rows(vocab_size: int, budget: int) -> int:
    """Rows of logits, and of what is made of them in place, that ``budget`` bytes hold; at least 16."""
    return max(16, min(1024, budget // (4 * vocab_size)))


def measure(head: Head, x: Tensor, rows: Tensor, targets: Tensor, chunk: int, dx: Tensor | None) -> float:
    """Return the sum of -log p(target) over ``rows`` of x [T, hidden]; targets int64, as many as rows.

    ``dx`` [T, hidden], where given, is filled with the gradient of that sum; what ``head`` trains is trained.
    ``chunk`` rows of logits exist at a time.
    """
    if dx is not None:
        dx.zero_()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, rows.numel(), chunk):
        own, wanted = rows[start : start + chunk], targets[start : start + chunk]
        if dx is None:
            with torch.no_grad():
                total += _negative_log(head(x.index_select(0, own), own).float(), wanted)
            continue
        leaf = x.index_select(0, own).requires_grad_()
        with torch.enable_grad():
            logits = head(leaf, own)
        probabilities = logits.detach().float()
        total += _negative_log(probabilities, wanted)  # which are probabilities from here on
        probabilities.scatter_add_(1, wanted.unsqueeze(1), probabilities.new_full((len(own), 1), -1.0))
        torch.autograd.backward([logits], [probabilities.to(logits.dtype)])
        assert leaf.grad is not None
        dx.index_copy_(0, own, leaf.grad)
    return float(total)


def _negative_log(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log softmax at the targets; ``logits`` [N, vocab], fp32, become probabilities in place."""
    logits.sub_(logits.amax(1, keepdim=True))
    picked = logits.gather(1, targets.unsqueeze(1)).double()
    sums = logits.exp_().sum(1, keepdim=True)
    logits.div_(sums)
    return (sums.double().log() - picked).sum()
