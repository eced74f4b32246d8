"""Finds the folder `speed/`, which is optional: without it everything runs with the same results, slower."""

import importlib
import importlib.util


def speed(flag: str | None = None):
    """The package `speed`, or None where it was removed; raises ValueError then if `flag` needs it."""
    if importlib.util.find_spec("speed"):
        return importlib.import_module("speed")
    if flag:
        raise ValueError(f"{flag}: needs the folder speed/, which is missing here")
    return None


def for_sampling(network, compiled: bool = False):
    """A network that needs no gradients, made faster in place if `speed/` is there."""
    found = speed("--compile" if compiled else None)
    return found.for_sampling(network, compiled) if found else network
