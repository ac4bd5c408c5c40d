"""Settings of the numerical libraries under which the same input gives the same bytes on the CPU."""

from __future__ import annotations

import os

_SETTINGS = {
    # MKL: the same product for any number of threads. By default recent Xeons split a float32 product
    # differently for one thread and for two, and round differently.
    "MKL_CBWR": "AUTO,STRICT",
    # oneDNN: no AMX kernels. Their bfloat16 products depend on the number of rows, so a vector would
    # depend on the texts that are embedded in the same batch.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
}


def make_reproducible() -> None:
    """Sets the environment variables that make products on the CPU reproducible, unless they are set already.

    The libraries read them at their first product, so call this before torch or numpy computes anything.
    `AUTO` keeps the code path that MKL chooses for the CPU, and the instruction set is only an upper limit,
    so CPUs with less are not slowed down. Builds of torch without MKL or oneDNN ignore the variables.

    The price is paid on CPUs with AMX: there, embedding 600 texts with MiniLM in bfloat16 took 4.2 times as
    long with AMX off (17 against 4 CPU seconds, one run on two shared cores of a Xeon).
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
