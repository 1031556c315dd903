"""Losses and biases that keep the load of a mixture's experts even. They do not depend on how a batch is cut.

`balance.py` runs around an optimizer step and is the file to open first; `losses.py` has the formulas of one layer, and
`biases.py` the update without a loss.

Sources: Switch Transformers, arXiv 2101.03961 (balancing loss); its load over the global batch, arXiv 2501.11873;
arXiv 2412.19437 (loss of a sequence, bias); ST-MoE, arXiv 2202.08906 (z-loss).
"""

from automodel_trainer.modules.balance.balance import Balance, Balanced, balance_of
from automodel_trainer.modules.balance.config import BalanceConfig

__all__ = ["Balance", "BalanceConfig", "Balanced", "balance_of"]
