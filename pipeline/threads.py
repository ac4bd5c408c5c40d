"""How threads of torch wait for each other. To be said before torch is loaded, with its OpenMP library."""

from __future__ import annotations

from collections.abc import MutableMapping

_SPINS = 3_000  # some microseconds


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Lets waiting threads sleep soon, unless the environment says how they wait.

    By default they spin for milliseconds, which takes the cores from whom they wait for where other work runs; where
    they never spin, they are woken thousands of times a second. benchmarks/waiting.py has the figures.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_SPINS))
