"""Models: one builder for all of them, reading weights, writing weights. Start with `auto.py`."""

from automodel_trainer.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText, builder

__all__ = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "builder"]
