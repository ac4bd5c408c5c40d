"""A training from the command line: steps, ranks, kills, resumes, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.reliability.processes import wait_until
from tests.reliability.trainings import command, kill_all, log_of, run, start, steps_logged, words_of, workers_of
from tests.trainer_models import tiny_backbone, tiny_config


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny BERT with dropout."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def flags(finished_run, backbone, tmp_path):
    """Flags of a training of 3 epochs of 6 batches of 8 pairs, in chunks, that logs every step."""
    return {
        "--shards": finished_run[2],
        "--output": tmp_path / "out",
        "--backbone": backbone,
        "--context-size": 6,
        "--max-length": 24,
        "--warmup-steps": 3,
        "--learning-rate": 1e-3,
        "--sequence-dropout": 0.1,
        "--chunk-tokens": 120,
        "--precision": "fp32",
        "--log-every": 1,
        "--save-every": 4,
    }


def losses_of(flags):
    return {record["step"]: record["loss"] for record in log_of(flags)}


def in_process(flags, capsys):
    """Runs a training in this process; returns (exit code, standard error)."""
    from hardbatch.trainer.main import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code = main(words_of(flags))
    torch.set_num_threads(threads)
    return code, capsys.readouterr().err


def test_a_whole_training(flags, finished_run, write_jsonl, run_corpus, rows, capsys):
    """Loss falls on a corpus that can be learned; what was promised lies in the output."""
    write_jsonl("held.jsonl", rows(80))
    plan = run_corpus(
        'corpus = "held"\n[[dataset]]\nname = "numbers"\nsource = "held.jsonl"\nholdout = 0.2\n[pack]\nbatch_size = 8\n'
    )
    flags |= {"--shards": plan.shards, "--eval": "holdout", "--epochs": 12, "--eval-every": 30}
    code, error = in_process(flags, capsys)
    assert code == 0, error
    losses = list(losses_of(flags).values())
    assert len(losses) == 12 * 8 and sum(losses[-8:]) < 0.8 * sum(losses[:8])
    rates = [record["learning_rate"] for record in log_of(flags)]
    assert rates[0] == pytest.approx(1e-3 / 3) and max(rates) == pytest.approx(1e-3) and rates[-1] < 2e-5
    evaluations = log_of(flags, "eval/numbers_holdout")
    assert [record["step"] for record in evaluations] == [0, 30, 60, 90, 96]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] and 0 < evaluations[-1]["ndcg_at_10_no_context"] <= 1
    output = Path(flags["--output"])
    assert list((output / "tensorboard").glob("events*"))
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == ["step-00000092", "step-00000096"]
    context = json.loads((output / "export" / "context.json").read_text())
    assert context["origin"] == f"drawn from the shards {plan.shards.name}, seed 0"
    assert len(context["documents"]) == 6
    assert "numbers_holdout: loss" in error and "pairs/s" in error


def test_biencoder_bf16_random_weights_and_init_from(flags, capsys, tmp_path):
    flags |= {"--architecture": "biencoder", "--precision": "bf16", "--random-weights": "", "--epochs": 1}
    assert in_process(flags, capsys)[0] == 0
    first = Path(flags["--output"])
    del flags["--random-weights"]
    flags |= {"--output": tmp_path / "second", "--init-from": first / "export"}
    code, error = in_process(flags, capsys)
    assert code == 0, error
    again = {**flags, "--output": tmp_path / "third", "--init-from": first / "checkpoints" / "step-00000006"}
    assert in_process(again, capsys)[0] == 0
    assert losses_of(flags) == losses_of(again)  # the same weights, from both
    code, error = in_process({**again, "--output": tmp_path / "fourth", "--architecture": "contextual"}, capsys)
    assert code == 2 and "its model has --context-size 0 (biencoder), this training asks for 6" in error


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_and_resumed_losses_are_equal_to_the_bit(flags, nproc, tmp_path):
    flags |= {"--epochs": 6 * nproc, "--save-every": 3}
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run(unbroken, ranks=nproc).code == 0
    for kill_after in (5, 9):  # twice in a row
        process = start({**flags, "--resume": "auto"}, ranks=nproc)
        wait_until(steps_logged(flags, kill_after), process, timeout_s=120)
        kill_all(process, flags["--output"])
    finished = run({**flags, "--resume": "auto"}, ranks=nproc)
    assert finished.code == 0, finished.errors
    begun_at = re.search(r"resuming from .*, step (\d+), batch", finished.errors)
    assert begun_at and 0 < int(begun_at[1]) < 36  # the kills did kill
    expected, found = losses_of(unbroken), losses_of(flags)
    assert len(expected) == 36 and found == expected
    ends = [Path(run_flags["--output"]) / "export" / "model.safetensors" for run_flags in (unbroken, flags)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_another_number_of_ranks_goes_on_in_the_same_order(flags, tmp_path):
    """2 ranks to step 4, then 1 that does not accumulate: the batches are those of 1 rank alone, each once an epoch."""
    flags |= {"--epochs": 2}
    alone = {**flags, "--output": tmp_path / "alone", "--warmup-steps": 6}  # the same number of batches
    assert run(alone).code == 0
    begun = run({**flags, "--save-every": 2}, ranks=2)
    assert begun.code == 0
    checkpoints = Path(flags["--output"]) / "checkpoints"
    fresh = tmp_path / "fresh" / "checkpoints"
    fresh.mkdir(parents=True)
    shutil.copytree(sorted(checkpoints.glob("step-*"))[0], fresh / "step-00000004")
    went_on = {**flags, "--output": fresh.parent, "--resume": "auto"}
    finished = run(went_on)
    assert finished.code == 0, finished.errors
    assert [record["position"] for record in log_of(alone)] == list(range(1, 13))
    assert [record["position"] for record in log_of(went_on)] == [9, 10, 11, 12]
    for expected, found in zip(log_of(alone)[-4:], log_of(went_on), strict=True):  # the same places, the same schedule
        assert found["position"] == expected["position"]
        assert found["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-9)


def test_two_ranks_equal_one_that_accumulates(flags, tmp_path):
    alone = {**flags, "--output": tmp_path / "alone", "--accumulate": 2}
    assert run(alone).code == 0
    elsewhere = subprocess.run(list(map(str, command(flags, ranks=2))), cwd=tmp_path, capture_output=True, check=False)
    assert elsewhere.returncode == 0, elsewhere.stderr
    expected, found = losses_of(alone), losses_of(flags)
    assert expected.keys() == found.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in expected)


def test_workers_save_and_leave_when_their_launcher_is_killed(flags):
    process = start({**flags, "--epochs": 100_000}, ranks=2)
    assert wait_until(steps_logged(flags, 4), process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while workers_of(flags["--output"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(flags["--output"]) == []
    last = log_of(flags)[-1]["step"]
    assert (Path(flags["--output"]) / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()


def test_a_second_training_of_the_same_output_is_refused(flags, capsys):
    process = start({**flags, "--epochs": 100_000})
    assert wait_until(steps_logged(flags, 2), process)
    code, error = in_process({**flags, "--resume": "auto"}, capsys)
    process.kill()
    process.wait()
    assert code == 5 and f"being written by process {process.pid}" in error
    shutil.rmtree(Path(flags["--output"]) / "checkpoints", ignore_errors=True)
    assert in_process({**flags, "--epochs": 1}, capsys)[0] == 0  # the dead one's lock is free


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(flags, tmp_path, capsys, copied_run, backbone):
    shards = copied_run[2]
    (tmp_path / "empty").mkdir()
    part = next(shards.glob("data/*.parquet"))
    cases = {
        "nothing there": ({"--shards": tmp_path / "empty"}, "empty"),
        "no such eval": ({"--eval": tmp_path / "nowhere"}, "no such folder"),
        "too long": ({"--max-length": 129}, "reads at most 128 tokens"),
        "too many layers": ({"--num-layers": 9}, "has 2 layers"),
        "too few batches": ({"--accumulate": 7}, "6 batches"),
        "no negatives": ({"--hard-negatives": 2}, "no hard negatives"),
        "no backbone": ({"--backbone": tmp_path / "empty"}, "config.json"),
        "no gpu": ({"--device": "cuda"}, "no CUDA device") if not torch.cuda.is_available() else ({}, ""),
        "flash in fp32": ({"--attention": "flash_attention_2"}, "give --precision bf16"),
        "no flash": ({"--attention": "flash_attention_2", "--precision": "bf16"}, "--backbone"),
    }
    for name, (changed, message) in cases.items():
        if not changed:
            continue
        code, error = in_process({**flags, **changed}, capsys)
        assert code in (2, 3, 4), name
        assert message in error and error.count("\n") == 1 and "Traceback" not in error, (name, error)
    part.write_bytes(part.read_bytes()[:-9])
    code, error = in_process({**flags, "--shards": shards}, capsys)
    assert code == 4 and part.name in error


def test_a_tokenizer_that_does_not_match(flags, tmp_path, backbone, capsys):
    config = tiny_config("bert")
    config.vocab_size = 100
    from hardbatch.trainer.model import new_backbone

    folder = shutil.copytree(backbone, tmp_path / "small")
    new_backbone(config).save_pretrained(folder)
    code, error = in_process({**flags, "--backbone": folder}, capsys)
    assert code == 2 and "do not belong together" in error


def test_a_loss_that_is_no_number_stops_all_ranks_and_names_the_batch(flags):
    finished = run({**flags, "--learning-rate": 1e30, "--warmup-steps": 0}, ranks=2)
    assert finished.code != 0
    told = [line for line in finished.errors.splitlines() if line.startswith("trainer:")]
    assert len(told) == 1 and "batch " in told[0] and "numbers" in told[0]


def test_advice_about_a_loss_that_is_no_number():
    """On CUDA attention is suspected before the learning rate."""
    from hardbatch.trainer.loop import divergence_advice

    advice = divergence_advice("sdpa", on_cuda=True)
    assert "was that of --attention sdpa" in advice
    places = [advice.index(word) for word in ("--attention eager", "--precision fp32", "--learning-rate")]
    assert places == sorted(places)
    assert "try --resume auto" not in divergence_advice("eager", on_cuda=True)
    assert "--attention" not in divergence_advice("sdpa", on_cuda=False)


def test_a_step_that_does_not_fit_the_memory_ends_in_one_line(flags, capsys, monkeypatch):
    from hardbatch.trainer.gradcache import GradCache

    calls = []

    def backward(self, batch, *, scale=1.0):
        calls.append(batch)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward_of(self, batch, scale=scale)

    backward_of = GradCache.backward
    monkeypatch.setattr(GradCache, "backward", backward)
    code, error = in_process(flags, capsys)
    told = [line for line in error.splitlines() if line.startswith("trainer:")]
    assert code == 1 and len(told) == 1 and "Traceback" not in error
    assert "a step ran out of memory (cpu); give --chunk-tokens 60 in place of 120" in told[0]
    assert max(losses_of(flags), default=0) <= 2


def test_chunks_may_change_when_a_training_is_resumed(flags, tmp_path, capsys):
    """Without dropout the size of a chunk changes rounding alone."""
    flags |= {"--dropout": 0, "--epochs": 2}
    whole = {**flags, "--output": tmp_path / "whole", "--chunk-tokens": "auto"}
    assert in_process(whole, capsys)[0] == 0

    code, error = in_process(flags, capsys)
    assert code == 0
    assert re.search(r"^chunks of at most 120 tokens, about 0\.\d\d GiB, beside 0\.\d\d GiB of weights", error, re.M)
    checkpoints = Path(flags["--output"]) / "checkpoints"
    fresh = tmp_path / "fresh" / "checkpoints"
    fresh.mkdir(parents=True)
    shutil.copytree(checkpoints / "step-00000008", fresh / "step-00000008")
    resumed = {**flags, "--output": fresh.parent, "--resume": "auto", "--chunk-tokens": 300}
    code, error = in_process(resumed, capsys)
    assert code == 0 and "chunks of at most 300 tokens" in error

    expected = losses_of(whole)
    assert losses_of(flags) == pytest.approx(expected, rel=1e-4)
    assert losses_of(resumed) == pytest.approx({step: expected[step] for step in range(9, 13)}, rel=1e-4)


def test_a_damaged_batch_ends_all_ranks_together(flags, copied_run):
    """Found as it is read, by the rank that reads it; the other one leaves too, and nobody hangs."""
    shards = copied_run[2]
    part = next(shards.glob("data/*.parquet"))
    content = bytearray(part.read_bytes())
    content[200] ^= 1
    part.write_bytes(content)
    finished = run({**flags, "--shards": shards}, ranks=2)
    assert finished.code != 0
    told = [line for line in finished.errors.splitlines() if line.startswith("trainer:")]
    assert len(told) == 1 and part.name in told[0]


def test_other_settings_and_other_shards_are_not_resumed(flags, capsys, copied_run):
    assert in_process({**flags, "--epochs": 1}, capsys)[0] == 0
    code, error = in_process({**flags, "--epochs": 1}, capsys)
    assert code == 2 and "already holds checkpoints" in error
    code, error = in_process({**flags, "--epochs": 2, "--resume": "auto"}, capsys)
    assert code == 2 and "--epochs 1 there, 2 here" in error
    code, error = in_process({**flags, "--epochs": 1, "--context-size": 5, "--resume": "auto"}, capsys)
    assert code == 2 and "--context-size 6 there, 5 here" in error
    code, error = in_process({**flags, "--epochs": 1, "--resume": "auto"}, capsys)  # finished already
    assert code == 0


def test_models_that_cannot_be_used_are_told(flags, backbone, tmp_path, capsys):
    def copied(name, change):
        folder = shutil.copytree(backbone, tmp_path / name)
        change(folder)
        return {**flags, "--backbone": folder, "--output": tmp_path / f"{name}-out"}

    def without_tokenizer(folder):
        for path in folder.glob("*token*"):
            path.unlink()

    def truncated(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def changed(**keys):
        def change(folder):
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**content, **keys}))

        return change

    def with_code(folder):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        changed(model_type="unheard_of", auto_map={"AutoConfig": "evil.Evil"})(folder)

    cases = [
        (copied("no-tokenizer", without_tokenizer), "has no vocabulary"),
        (copied("truncated", truncated), "--backbone"),
        (copied("odd-width", changed(hidden_size=33)), "--backbone"),
        (copied("no-heads", changed(num_attention_heads=0)), "--backbone"),
        (copied("with-code", with_code), "config.json cannot be read"),
    ]
    for given, message in cases:
        code, error = in_process(given, capsys)
        assert code == 2 and message in error and error.count("\n") == 1, (given["--backbone"], error)
    assert not (tmp_path / "ran").exists()


def test_what_would_spoil_the_end_is_refused_at_the_start(flags, tmp_path, capsys, run_corpus, write_jsonl, rows):
    (tmp_path / "out" / "export").mkdir(parents=True)
    (tmp_path / "out" / "export" / "notes.txt").write_text("mine")
    code, error = in_process(flags, capsys)
    assert code == 2 and "is not an export" in error
    write_jsonl("held.jsonl", rows(80))
    plan = run_corpus('corpus = "held"\n[[dataset]]\nname = "numbers"\nsource = "held.jsonl"\nholdout = 0.2\n')
    holdout = next(plan.shards.parent.parent.glob("pairs/*/*/holdout"))
    for name in ("a", "b"):
        shutil.copytree(holdout, tmp_path / name / "same")
    both = f"{tmp_path / 'a' / 'same'},{tmp_path / 'b' / 'same'}"
    code, error = in_process({**flags, "--output": tmp_path / "other", "--eval": both}, capsys)
    assert code == 2 and "two folders are named same" in error


def test_a_damaged_checkpoint_is_no_start(flags, tmp_path, capsys):
    assert in_process({**flags, "--epochs": 1}, capsys)[0] == 0
    checkpoint = Path(flags["--output"]) / "checkpoints" / "step-00000006"
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    code, error = in_process({**flags, "--output": tmp_path / "next", "--init-from": checkpoint}, capsys)
    assert code == 4 and "model.safetensors" in error


def test_the_learning_rate_never_exceeds_its_peak():
    from hardbatch.trainer.loop import learning_rate_factor

    for step_size, warmup, end in ((4, 16, 30), (10, 80, 100), (1, 0, 5), (3, 7, 7), (4, 50, 20)):
        factors = [
            learning_rate_factor(position, step_size, warmup_batches=warmup, end_position=end)
            for position in range(end)
        ]
        assert all(0 < factor <= 1 for factor in factors), (step_size, warmup, end)
    assert learning_rate_factor(0, 1, warmup_batches=4, end_position=8) == 0.25
    assert learning_rate_factor(3, 1, warmup_batches=4, end_position=8) == 1.0
    assert learning_rate_factor(6, 1, warmup_batches=4, end_position=8) == 0.5
