"""benchmarks/gpu.py at toy size on the CPU: every part runs, and what it compares agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import models
from tests.samples import make_rows
from tests.trainer.test_evaluate import write_collection

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
MANIFEST = 'corpus = "toy"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 16\n'


def test_every_part_runs_and_agrees(
    tmp_path: Path, run_corpus: Callable[..., object], write_jsonl: Callable[..., Path]
) -> None:
    models.require_minilm()
    write_jsonl("pairs.jsonl", make_rows(96))
    shards = run_corpus(MANIFEST).shards
    collection = write_collection(tmp_path / "collection")
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(GPU), "--toy", "--shards", str(shards), "--collection", str(collection)]
    command += ["--json", str(figures), "--work", str(tmp_path / "work"), "--seconds", "3600"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert figures.exists(), result.stderr
    found = json.loads(figures.read_text())
    assert {name: part["error"] for name, part in found.items() if "error" in part} == {}
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(found) == 14

    assert found["packed"]["full_packed_to_padded_gradient_cosine"] > 0.9999
    assert found["clustering"]["nearest_different_labels"] == 0
    assert found["clustering"]["kmeans_different_labels"] == 0
    assert found["masks"]["different_mask_places"] == 0
    assert found["masks"]["hardness_difference"] < 1e-5
    assert found["masks"]["loss_difference"] < 1e-3
    assert found["embed"]["minilm_shape_largest_distance_to_cpu"] < 0.01
    for model_type in ("bert", "nomic_bert", "modernbert"):
        assert found["gradcache"][f"{model_type}_gradient_relative_error"] < 1e-4
    for case in ("plain", "null", "window"):
        assert max(found["attention"][f"{case}_relative_error"].values()) < 1e-4

    trainer = found["trainer"]
    assert (trainer["first_exit_code"], trainer["second_exit_code"]) == (143, 0)
    assert trainer["export_norm"] == pytest.approx(1, abs=1e-5)
