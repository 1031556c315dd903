"""The losses of one layer's router, and the load that they multiply with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenLosses:
    """The losses of one layer that add up over tokens: the balancing loss and the z-loss.

    Args:
        weights: `[experts]` on the probabilities; empty: no balancing loss.
        z: on the squared log-sum-exp.
    """

    weights: Tensor
    z: Tensor

    def of(self, logits: Tensor, real: Tensor) -> Tensor:
        """Of logits `[n, experts]` where `real` `[n]` is true: 0-dim fp32."""
        logits = logits.float()
        lse = logits.logsumexp(-1)
        loss = (self.z * lse.square() * real).sum()
        if len(self.weights):
            loss = loss + ((logits - lse[:, None]).exp() @ self.weights * real).sum()
        return loss


@dataclass(frozen=True)
class DocumentLoss:
    """The balancing loss of each document in one layer, times its coefficient.

    Args:
        k: experts that a token chooses.
        weight: 0-dim, what a document's loss is multiplied with.
        documents: how many there are at most.
    """

    k: int
    weight: Tensor
    documents: int

    def of(self, logits: Tensor, marks: Tensor, sigmoid: bool, summed: Callable[[Tensor], Tensor]) -> Tensor:
        """Of logits `[n, experts]`: 0-dim.

        Args:
            marks: int64 `[n]`, see `Documents.marks`.
            sigmoid: whether scores are the sigmoid of logits, not their softmax.
            summed: adds counts up over the ranks that share a sequence.
        """
        experts = logits.shape[1]
        real, document = marks >= 0, marks.clamp(min=0)
        with torch.no_grad():
            best = logits.topk(self.k, dim=-1).indices
            flat = (document[:, None] * experts + best).reshape(-1)
            counts = torch.zeros(self.documents * experts, device=logits.device)
            counts.scatter_add_(0, flat, real.float().repeat_interleave(self.k))
            counts = summed(counts).view(-1, experts)
            length = counts.sum(1, keepdim=True) / self.k
            weights = counts * experts / (self.k * length.clamp(min=1).square()) * self.weight
        scores = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
        shares = scores / scores.sum(-1, keepdim=True)
        return (shares * weights[document] * real[:, None]).sum()


def load_of(logits: Tensor, k: int, marks: Tensor) -> Tensor:
    """How often each expert is among the k largest of a token's logits `[n, experts]`: fp32 `[experts]`."""
    best = logits.detach().topk(k, dim=-1).indices
    load = torch.zeros(logits.shape[1], device=logits.device)
    return load.scatter_add_(0, best.reshape(-1), real_tokens(marks).float().repeat_interleave(k))


def real_tokens(marks: Tensor) -> Tensor:
    """Bool `[n]`: which tokens are no padding."""
    return marks.reshape(-1) >= 0
