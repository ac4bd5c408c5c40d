"""InfoNCE with equivalence sets and hard negatives."""

from __future__ import annotations

import math

import pytest
import torch

from hardbatch.trainer.loss import info_nce, mask_rate

TEMPERATURE = 0.1


def unit(num_rows, seed):
    vectors = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def by_hand(queries, documents, masked, negatives=(), owners=()):
    """Mean loss in plain Python, float64."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = [
            float(query.double() @ document.double()) / TEMPERATURE
            for j, document in enumerate(documents)
            if j == i or (i, j) not in masked
        ]
        scores += [
            float(query.double() @ negative.double()) / TEMPERATURE
            for negative, owner in zip(negatives, owners, strict=True)
            if owner == i
        ]
        own = float(query.double() @ documents[i].double()) / TEMPERATURE
        total += math.log(sum(math.exp(score - own) for score in scores))
    return total / len(queries)


def mask_of(pairs, size=8):
    mask = torch.zeros(size, size, dtype=torch.bool)
    for i, j in pairs:
        mask[i, j] = True
    return mask


@pytest.mark.parametrize("masked", [(), ((0, 1), (0, 2), (5, 1)), tuple((3, j) for j in range(8))])
def test_against_plain_python(masked):
    queries, documents = unit(8, 0), unit(8, 1)
    found = info_nce(queries, documents, mask_of(masked), temperature=TEMPERATURE)
    assert found.value.item() == pytest.approx(by_hand(queries, documents, set(masked)), rel=1e-5)


def test_hard_negatives_serve_their_own_query():
    queries, documents, negatives = unit(8, 0), unit(8, 1), unit(3, 2)
    owners = torch.tensor([1, 1, 6])
    found = info_nce(
        queries,
        documents,
        mask_of(()),
        temperature=TEMPERATURE,
        negatives_MD=negatives,
        negative_owner_M=owners,
    )
    expected = by_hand(queries, documents, set(), negatives, owners.tolist())
    assert found.value.item() == pytest.approx(expected, rel=1e-5)
    assert expected > by_hand(queries, documents, set())


def test_no_hard_negative_in_the_batch_is_the_plain_loss():
    queries, documents = unit(8, 0), unit(8, 1)
    none = info_nce(
        queries,
        documents,
        mask_of(()),
        temperature=TEMPERATURE,
        negatives_MD=unit(0, 2),
        negative_owner_M=torch.zeros(0, dtype=torch.int64),
    )
    assert torch.equal(none.value, info_nce(queries, documents, mask_of(()), temperature=TEMPERATURE).value)


def test_a_masked_document_has_exactly_no_influence():
    queries, documents = unit(8, 0), unit(8, 1)
    masked = mask_of([(i, 5) for i in range(8)])  # document 5 serves query 5 alone
    with_it = documents.clone().requires_grad_()
    loss = info_nce(queries, with_it, masked, temperature=TEMPERATURE)
    moved = documents.clone()
    moved[5] = -moved[5]
    others = torch.arange(8) != 5
    apart = info_nce(queries[others], documents[others], mask_of((), 7), temperature=TEMPERATURE)

    def per_query(docs):
        scores = (queries @ docs.T / TEMPERATURE).masked_fill(masked & ~torch.eye(8, dtype=torch.bool), -torch.inf)
        return torch.nn.functional.cross_entropy(scores, torch.arange(8), reduction="none")

    assert torch.equal(per_query(documents)[others], per_query(moved)[others])
    assert per_query(documents)[others].mean().item() == pytest.approx(apart.value.item(), rel=1e-6)
    loss.value.backward()
    only_own = documents.clone().requires_grad_()
    (per_query(only_own)[5] / 8).backward()
    assert torch.equal(with_it.grad[5], only_own.grad[5])  # bit for bit: no other query adds to it


def test_a_query_whose_negatives_are_all_masked_learns_nothing():
    queries, documents = unit(4, 0).requires_grad_(), unit(4, 1).requires_grad_()
    loss = info_nce(queries, documents, ~torch.eye(4, dtype=torch.bool), temperature=TEMPERATURE)
    loss.value.backward()
    assert loss.value.item() == 0 and loss.accuracy.item() == 1
    assert not queries.grad.any() and not documents.grad.any()


def test_the_own_document_stays_in_even_if_listed():
    queries, documents = unit(4, 0), unit(4, 1)
    full = info_nce(queries, documents, torch.eye(4, dtype=torch.bool), temperature=TEMPERATURE)
    assert torch.equal(full.value, info_nce(queries, documents, mask_of((), 4), temperature=TEMPERATURE).value)


def test_accuracy_counts_unmasked_documents():
    queries = torch.eye(4)
    documents = torch.eye(4)[[1, 0, 2, 3]]
    assert info_nce(queries, documents, mask_of((), 4), temperature=1.0).accuracy.item() == 0.5
    assert info_nce(queries, documents, mask_of([(0, 1)], 4), temperature=1.0).accuracy.item() == 0.75


def test_float32_under_autocast():
    queries, documents = unit(8, 0), unit(8, 1)
    plain = info_nce(queries, documents, mask_of(()), temperature=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(queries, documents, mask_of(()), temperature=0.02)
    assert inside.value.dtype == torch.float32 and torch.equal(inside.value, plain.value)


def test_mask_rate():
    assert mask_rate(mask_of([(0, 1), (2, 3)], 4)) == pytest.approx(2 / 12)
    assert mask_rate(torch.zeros(1, 1, dtype=torch.bool)) == 0
