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

from hardbatch.trainer.export import open_model
from tests.reliability import warm
from tests.reliability.processes import wait_until
from tests.reliability.trainings import (
    assert_same_training,
    command,
    log_of,
    run,
    run_ranks,
    start,
    start_ranks,
    start_warm,
    steps_logged,
    words_of,
    workers_of,
)
from tests.trainer.shard_formats import write_positive_slots
from tests.trainer_models import CONTEXTUAL_TYPES, tiny_backbone, tiny_config, tiny_encoder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny BERT with dropout."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def flags_of(finished_run, backbone):
    """`flags_of(output)`: flags of a training of 3 epochs of 6 batches of 8 pairs, in chunks, that logs every step."""
    common = {
        "--shards": finished_run[2],
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
    return lambda output: {**common, "--output": output}


@pytest.fixture
def flags(flags_of, tmp_path):
    return flags_of(tmp_path / "out")


@pytest.fixture(autouse=True)
def _no_run_is_left():
    yield
    warm.kill_all()


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


def test_a_model_of_another_context_attention_is_no_start(flags, capsys, tmp_path):
    flags |= {"--context-attention": "shared", "--max-steps": 2}
    assert in_process(flags, capsys)[0] == 0
    other = {**flags, "--output": tmp_path / "other", "--context-attention": "full"}
    code, error = in_process({**other, "--init-from": Path(flags["--output"]) / "export"}, capsys)
    assert code == 2 and "its model has --context-attention shared (contextual), this training asks for full" in error
    code, error = in_process({**flags, "--context-attention": "full", "--resume": "auto"}, capsys)
    assert code == 2 and "--context-attention shared there, full here" in error


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("xlm-roberta", "contextual"), ("distilbert", "contextual"), ("mpnet", "biencoder")],
)
def test_other_backbones(flags, capsys, tmp_path, model_type, architecture):
    """From weights and tokenizer to an export that can be read."""
    backbone = tiny_backbone(tmp_path / "backbone", model_type)
    flags |= {"--backbone": backbone, "--architecture": architecture, "--max-steps": 2}
    code, error = in_process(flags, capsys)
    assert code == 0, error
    assert len(losses_of(flags)) == 2
    encoder, tokenizer = open_model(Path(flags["--output"]) / "export", "--model")
    assert encoder.backbone_config.model_type == model_type and encoder.config.architecture == architecture
    assert tokenizer.pad_id == encoder.backbone_config.pad_token_id


@pytest.fixture(scope="module", params=["full", "shared"])
def two_ranks(request, flags_of, tmp_path_factory):
    """The flags of a finished training of 12 steps by 2 ranks. Read only."""
    flags = flags_of(tmp_path_factory.mktemp("two") / "out") | {"--epochs": 4, "--keep-last": 4}
    flags["--context-attention"] = request.param
    assert [ended.code for ended in run_ranks(flags, 2)] == [0, 0]
    return flags


def test_killed_and_resumed_is_equal_to_the_bit(two_ranks, tmp_path):
    """Both ranks are killed; then torchrun is, whose workers save and leave; then torchrun runs to the end.

    tests/reliability/test_trainer_resume.py kills more often, and 1 rank.
    """
    flags = {**two_ranks, "--output": tmp_path / "out", "--resume": "auto"}
    ranks = start_ranks(flags, 2)
    ranks[0].wait_until(steps_logged(flags, 5))
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert not (tmp_path / "out" / "export").exists()

    process = start(flags, ranks=2)
    assert wait_until(steps_logged(flags, len(log_of(flags)) + 1), process, timeout_s=120)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while workers_of(flags["--output"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(flags["--output"]) == []
    last = log_of(flags)[-1]["step"]
    assert (tmp_path / "out" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()

    elsewhere = subprocess.run(
        list(map(str, command(flags, ranks=2))), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert (
        f"resuming from {tmp_path / 'out' / 'checkpoints' / f'step-{last:08d}'}, step {last}, batch" in elsewhere.stderr
    )
    assert elsewhere.stdout.splitlines()[-1] == str(tmp_path / "out" / "export")
    assert_same_training(flags, two_ranks)


def test_two_ranks_equal_one_that_accumulates(two_ranks, tmp_path):
    alone = {**two_ranks, "--output": tmp_path / "alone", "--accumulate": 2}
    assert run(alone).code == 0
    expected, found = losses_of(alone), losses_of(two_ranks)
    assert len(expected) == 12 and found == pytest.approx(expected, rel=1e-4)


def test_another_number_of_ranks_continues_in_the_same_order(two_ranks, tmp_path):
    """2 ranks to step 8, then 1 that does not accumulate: it reads the batches that 1 rank alone would read."""
    alone = {**two_ranks, "--output": tmp_path / "alone", "--warmup-steps": 6}  # the same number of batches
    assert run(alone).code == 0
    begun = Path(two_ranks["--output"]) / "checkpoints" / "step-00000008"
    shutil.copytree(begun, tmp_path / "resumed" / "checkpoints" / begun.name)
    resumed = {**two_ranks, "--output": tmp_path / "resumed", "--resume": "auto"}
    finished = run(resumed)
    assert finished.code == 0, finished.errors
    assert [record["position"] for record in log_of(alone)] == list(range(1, 25))
    assert [record["position"] for record in log_of(resumed)] == list(range(17, 25))
    for expected, found in zip(log_of(alone)[-8:], log_of(resumed), strict=True):  # the same schedule
        assert found["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-9)


def test_a_second_training_of_the_same_output_is_refused(flags, capsys):
    process = start_warm({**flags, "--epochs": 100_000})
    process.wait_until(steps_logged(flags, 2))
    code, error = in_process({**flags, "--resume": "auto"}, capsys)
    process.kill()
    process.wait()
    assert code == 5 and f"being written by process {process.pid}" in error
    shutil.rmtree(Path(flags["--output"]) / "checkpoints", ignore_errors=True)
    assert in_process({**flags, "--epochs": 1}, capsys)[0] == 0  # the dead one's lock is free


# -- positives ---------------------------------------------------------------------------------------------------------


def test_same_answer_positives(flags, copied_run, capsys, monkeypatch):
    """Refused for shards that have none to give, a warning if there are none, and another loss if there are."""
    shards, output = copied_run[2], flags["--output"]
    flags |= {"--shards": shards, "--epochs": 1}

    def train(name, positives):
        changed = {**flags, "--output": output / name, "--positives": positives}
        code, error = in_process(changed, capsys)
        return code, error, log_of(changed)

    write_positive_slots(shards, None)
    code, error, _ = train("version 2", "same-answer")
    assert code == 2 and error.count("\n") == 1
    assert "--positives same-answer" in error and str(shards) in error and "since format version 3" in error

    write_positive_slots(shards, [[]] * 8)
    code, error, alone = train("none", "same-answer")
    assert code == 0 and "changes nothing: 0 of 6 batches have positive slots" in error

    write_positive_slots(shards, [[7], [], [0, 1], *[[]] * 5])
    code, error, own = train("own", "own")
    assert code == 0 and "positives 1.00" in error and "positives a query" not in error
    assert own[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)

    code, error, several = train("several", "same-answer")
    assert code == 0 and "1.375 positives a query; 6 of 6 batches" in error
    assert abs(several[0]["loss"] - own[0]["loss"]) > 1e-3
    assert [(record["positives"], record["negatives"]) for record in several] == [
        (1.375, pytest.approx(7 * (1 - record["mask_rate"]))) for record in own
    ]


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


def assert_all_ranks_end_with(flags, code, *words):
    """Both ranks end with `code`; the main rank alone says why, in one line."""
    ended = run_ranks(flags, 2)
    assert [one.code for one in ended] == [code, code]
    (line,) = [line for one in ended for line in one.errors.splitlines() if line.startswith("trainer:")]
    assert all(word in line for word in words)


def test_a_loss_that_is_no_number_stops_all_ranks_and_names_the_batch(flags):
    assert_all_ranks_end_with({**flags, "--learning-rate": 1e30, "--warmup-steps": 0}, 1, "batch ", "numbers")


def test_advice_about_a_loss_that_is_no_number():
    """On CUDA attention is suspected before the learning rate."""
    from hardbatch.trainer.loop import divergence_advice

    advice = divergence_advice("sdpa", on_cuda=True)
    assert "was that of --attention sdpa" in advice
    places = [advice.index(word) for word in ("--attention eager", "--precision fp32", "--learning-rate")]
    assert places == sorted(places)
    assert all("try --resume auto" not in divergence_advice(name, on_cuda=True) for name in ("eager", "packed"))
    assert "--attention" not in divergence_advice("sdpa", on_cuda=False)


def test_attention_dropout_is_known_if_rows_are_packed():
    """It makes packed rows slow on CUDA, of which a training warns."""
    from hardbatch.trainer.backbone import _DROPOUTS
    from hardbatch.trainer.training import packed_attention_dropout

    for model_type in CONTEXTUAL_TYPES:
        for attention, expected in (("packed", 0.25), ("sdpa", 0.0)):
            encoder = tiny_encoder(model_type, attention=attention)
            assert packed_attention_dropout(encoder) == 0
            for name in _DROPOUTS:
                if hasattr(encoder.backbone_config, name):
                    setattr(encoder.backbone_config, name, 0.25)
            assert packed_attention_dropout(encoder) == expected


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
    """Found by the rank that reads it; the other one leaves too, and nobody hangs."""
    shards = copied_run[2]
    part = next(shards.glob("data/*.parquet"))
    content = bytearray(part.read_bytes())
    content[200] ^= 1
    part.write_bytes(content)
    assert_all_ranks_end_with({**flags, "--shards": shards}, 4, part.name)


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
        (copied("with-code", with_code), "type 'unheard_of' is not supported; supported: bert"),
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
    pairs = next(plan.shards.parent.parent.glob("pairs/*/*"))
    for name in ("a", "b"):
        shutil.copytree(pairs / "holdout", tmp_path / name / "same")
        shutil.copytree(pairs / "texts", tmp_path / name / "texts")
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
