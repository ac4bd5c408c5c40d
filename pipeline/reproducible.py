"""Settings of the numerical libraries: the same input gives the same bytes on the CPU, beside other work too."""

from __future__ import annotations

import os

_SETTINGS = {
    # MKL: the same product for any number of threads. By default recent Xeons split a float32 product
    # differently for one thread and for two, and round differently.
    "MKL_CBWR": "AUTO,STRICT",
    # oneDNN: no AMX kernels. Their bfloat16 products depend on the number of rows, so a vector would
    # depend on the texts that are embedded in the same batch.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    # OpenMP: threads sleep while they wait for each other. By default they spin, and beside another busy
    # process a spinning thread keeps the one that it waits for from a core: packing took 2.0 s instead of 0.1.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def make_reproducible() -> None:
    """Sets these environment variables, unless they are set already.

    OpenMP reads its one when torch is imported, the others are read at the first product: call this before.
    `AUTO` keeps the code path that MKL chooses for the CPU, and the instruction set is only an upper limit,
    so CPUs with less are not slowed down. Builds of torch without MKL or oneDNN ignore the variables.

    The price is paid on CPUs with AMX: there, embedding 600 texts with MiniLM in bfloat16 took 4.2 times as
    long with AMX off (17 against 4 CPU seconds, one run on two shared cores of a Xeon).
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
