"""Random numbers from (seed, position) alone."""

from __future__ import annotations

import torch

from hardbatch.trainer.draws import derive_seed, draw_context, draw_kept_context, replayed

KEEP = {"sequence_dropout": 0.25, "no_context_rate": 0.0, "seed": 3, "position": 9}


def test_seeds_are_fixed_for_good():
    assert derive_seed(0, 1, "context") == derive_seed(0, 1, "context") == 6372631433090106584
    assert len({derive_seed(*parts) for parts in [(0, 1), (1, 0), (0, "1", ""), (0, 1, 0), (0, 11), (1, 1)]}) == 6


def test_context_is_drawn_without_repetition_and_in_full_where_there_is_little():
    drawn = draw_context(50, 12, seed=1, position=2)
    assert len(drawn) == len(set(drawn.tolist())) == 12 and drawn.max() < 50
    assert torch.equal(drawn, draw_context(50, 12, seed=1, position=2))
    for other in (draw_context(50, 12, seed=2, position=2), draw_context(50, 12, seed=1, position=3)):
        assert not torch.equal(drawn, other)
    assert draw_context(12, 12, seed=1, position=2).tolist() == draw_context(12, 99, seed=1, position=2).tolist()
    assert draw_context(12, 99, seed=1, position=2).tolist() == list(range(12))


def test_every_document_is_drawn_as_often():
    counts = torch.zeros(20)
    for position in range(2_000):
        counts[draw_context(20, 5, seed=0, position=position)] += 1
    assert (counts - 500).abs().max() < 100  # five standard deviations


def test_sequence_dropout_has_its_rate():
    kept = draw_kept_context(400, 100, **KEEP)
    assert abs(1 - kept.float().mean().item() - 0.25) < 0.01
    assert torch.equal(kept, draw_kept_context(400, 100, **KEEP))
    assert not torch.equal(kept, draw_kept_context(400, 100, **{**KEEP, "position": 10}))
    assert draw_kept_context(40, 10, **{**KEEP, "sequence_dropout": 0.0}).all()


def test_no_context_rate_counts_batches():
    empty = sum(
        not draw_kept_context(4, 3, **{**KEEP, "no_context_rate": 0.3, "sequence_dropout": 0.0, "position": p}).any()
        for p in range(1_000)
    )
    assert 250 < empty < 350


def test_replayed_draws_are_the_same_and_leave_no_trace():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with replayed(torch.device("cpu"), 1, 2, "stage", 0):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    with replayed(torch.device("cpu"), 1, 2, "stage", 0):
        assert torch.equal(torch.rand(4), first)
    with replayed(torch.device("cpu"), 1, 2, "stage", 1):
        assert not torch.equal(torch.rand(4), first)
