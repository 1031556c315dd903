"""Models: the one builder, weights in, weights out."""

from automodel_trainer.models.auto import AutoModelForCausalLM, builder

__all__ = ["AutoModelForCausalLM", "builder"]
