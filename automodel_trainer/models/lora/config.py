"""The `lora:` section."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from automodel_trainer.models.quantization import mxfp4, nf4

INITS = ("kaiming", "pissa", "orthogonal")
QUANTIZE = (*nf4.SCHEMES, mxfp4.SCHEME)


@dataclass
class LoRAConfig:
    """Low-rank adapters on a frozen base model.

    Args:
        rank: of the update B·A, for every adapted weight.
        alpha: the update is scaled by alpha / rank (rsLoRA: alpha / √rank). None: 2 · rank.
        dropout: of an adapter's input; not for fused expert weights.
        target_modules: `all-linear` (every linear layer and every fused expert weight, but not the head), a list of
            names or globs (`q_proj`, `layers.*.mlp.*`), or a regular expression over the full name.
        exclude: names or globs to leave out of these.
        use_rslora: scale by alpha / √rank (arXiv 2312.03732).
        use_dora: train magnitude and direction separately (DoRA, arXiv 2402.09353).
        init: `kaiming` (A random, B zero); `pissa`: the principal singular vectors, taken out of the base weight
            (arXiv 2404.02948); `orthogonal`: A and B random with B·A = 0.
        modules_to_save: names or globs of modules to train in full and to save with the adapter (embeddings, head).
        lr_ratio: the learning rate of B as a multiple of A's (LoRA+, arXiv 2402.12354).
        modules_to_save_lr: learning rate of modules_to_save; None: that of the adapters.
        quantize: `nf4` holds the adapted base weights (linear layers and fused experts) in 4 bits (QLoRA, arXiv
            2305.14314) and needs torchao; `bnb-nf4` is bitsandbytes' form of the same. `mxfp4` holds the
            experts of an mxfp4 checkpoint as its files have them, adapted or not, without rounding.
        adapter: folder or Hub id of an adapter in PEFT's format to continue from. It decides rank, alpha, dropout,
            targets and the kind of adapter; leave these out.
        seed: of the adapters' initial values.

    Raises:
        ValueError: a value out of range, or settings that exclude each other.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["kaiming", "pissa", "orthogonal"] = "kaiming"
    modules_to_save: list[str] = field(default_factory=list)
    lr_ratio: float = 1.0
    modules_to_save_lr: float | None = None
    quantize: Literal["nf4", "bnb-nf4", "mxfp4"] | None = None
    adapter: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise ValueError(f"lora rank={self.rank!r} is a {type(self.rank).__name__} and must be a whole number.")
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank} adapts nothing: give a positive rank (8, 16 and 64 are usual).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout} is not a probability in [0, 1).")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora alpha={self.alpha} would switch the adapters off: give a positive number, or null.")
        if self.init not in INITS:
            raise ValueError(f"lora init={self.init!r} is unknown. Allowed: {', '.join(INITS)}.")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"lora init='orthogonal' splits the rank in two halves: rank={self.rank} must be even.")
        if not self.target_modules:
            raise ValueError("lora target_modules is empty. Give 'all-linear', a list of names, or a regex.")
        if self.lr_ratio <= 0 or (self.modules_to_save_lr is not None and self.modules_to_save_lr < 0):
            raise ValueError("lora lr_ratio must be positive and modules_to_save_lr not negative.")
        if self.modules_to_save_lr is not None and not self.modules_to_save and not self.adapter:
            raise ValueError("lora modules_to_save_lr is given, but modules_to_save names nothing.")
        if self.quantize not in (None, *QUANTIZE):
            raise ValueError(f"lora quantize={self.quantize!r} is unknown. Allowed: {', '.join(QUANTIZE)}, or null.")
        if self.quantize and self.init == "pissa":
            raise ValueError(
                "lora init='pissa' takes the adapter out of the base weight: that weight cannot be quantized."
            )

    @property
    def scale(self) -> float:
        """alpha: what the update is multiplied by, before it is divided by the rank."""
        return float(2 * self.rank if self.alpha is None else self.alpha)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """The factor of an update of this rank."""
        return (self.scale if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)
