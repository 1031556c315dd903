"""Checks of the options of data modules, before any work."""

from __future__ import annotations

from numbers import Integral


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError if an option is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__} and must be a whole number.")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{name}={value} must be at least {least}.")


def check_packing(packing: object) -> None:
    """Raise ValueError if `packing` is none of its values."""
    if packing not in (True, False, "auto"):
        raise ValueError(f"packing={packing!r} is unknown. Allowed: true, false, auto.")


def check_global_batch(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Check that the rows of a step are whole micro-batches on every data-parallel rank.

    Raises:
        ValueError: they are not; the message has the nearest sizes that work.
    """
    unit = micro_batch_size * dp_size
    if global_batch_size % unit:
        lower = global_batch_size // unit * unit
        near = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be split into micro-batches: it must be a multiple of "
            f"micro_batch_size={micro_batch_size} times dp_size={dp_size} (= {unit}). The nearest sizes that work: "
            f"{near}."
        )
