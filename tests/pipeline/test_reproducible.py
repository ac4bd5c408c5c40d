"""reproducible: what a user has set stays. That products are reproducible is shown in test_run and test_encoders."""

from __future__ import annotations

import os

import pytest

from hardbatch.pipeline.reproducible import make_reproducible


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    make_reproducible()
    assert os.environ["MKL_CBWR"] == "COMPATIBLE" and os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
