"""Fixtures of the tests of `batching/`."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def same_each_way(monkeypatch):
    """`same_each_way(function, *patches)`: its arrays, asserted to be the same with 1 and 2 threads and any patch.

    A patch is {"module.CONSTANT": value} of modules of `batching/`.
    """

    def run(function, *patches):
        found = []
        for threads, patch in ((1, {}), (2, {}), *((1, patch) for patch in patches)):
            torch.set_num_threads(threads)
            with monkeypatch.context() as patched:
                for name, value in patch.items():
                    patched.setattr(f"hardbatch.pipeline.batching.{name}", value)
                found.append(function())
            assert all(map(np.array_equal, found[-1], found[0])), (threads, patch)
        return found[0]

    before = torch.get_num_threads()
    yield run
    torch.set_num_threads(before)
