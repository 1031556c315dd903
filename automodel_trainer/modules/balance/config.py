"""What a user asks for to keep the load of a mixture's experts even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of a mixture's experts even.

    Tokens of padding never count, and neither accumulation nor the layout changes the result.

    Args:
        aux_loss: coefficient of transformers' balancing loss, computed from the load of the global batch. "auto" is the
            config's `router_aux_loss_coef` where the config says `output_router_logits`, and 0 elsewhere.
        sequence_loss: coefficient of a balancing loss of each document (arXiv 2412.19437): summed over layers, mean
            over the documents of the global batch.
        z_loss: coefficient of the squared log-sum-exp of router logits: summed over layers, mean over tokens.
        bias_rate: how far an optimizer step moves the bias of each expert towards an even load, without any loss
            (`e_score_correction_bias`, `expert_bias`; 0.001 in arXiv 2412.19437).

    Raises:
        ValueError: a number is negative, or `aux_loss` is another word.
    """

    aux_loss: float | Literal["auto"] = "auto"
    sequence_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("aux_loss", "sequence_loss", "z_loss", "bias_rate"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < float("inf")) and (name, value) != ("aux_loss", "auto"):
                also = ", or 'auto'" if name == "aux_loss" else ""
                raise ValueError(f"balance: {name}={value!r} is not allowed. Give a number ≥ 0{also}.")
