"""InfoNCE with equivalence sets, several positives and hard negatives."""

from __future__ import annotations

import pytest
import torch

from hardbatch.trainer.loss import info_nce, mask_rate

TEMPERATURE = 0.1


def unit(num_rows, seed):
    vectors = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def by_hand(queries, documents, masked, positives=(), negatives=(), owners=()):
    """Mean loss, term by term in float64; `masked` and `positives` are pairs (slot of a query, slot of a document)."""
    queries, documents, negatives = queries.double(), documents.double(), [negative.double() for negative in negatives]
    losses = []
    for i, query in enumerate(queries):
        answers = [i, *(j for k, j in positives if k == i)]
        others = [document for j, document in enumerate(documents) if j not in answers and (i, j) not in masked]
        others += [negative for negative, owner in zip(negatives, owners, strict=True) if owner == i]
        against = sum(torch.exp(query @ other / TEMPERATURE) for other in others)
        scores = [torch.exp(query @ documents[j] / TEMPERATURE) for j in answers]
        losses.append(sum(-torch.log(score / (score + against)) for score in scores) / len(scores))
    return sum(losses) / len(losses)


def mask_of(pairs, size=8):
    mask = torch.zeros(size, size, dtype=torch.bool)
    for i, j in pairs:
        mask[i, j] = True
    return mask


SEVERAL = ((0, 1), (1, 0), (2, 3), (2, 4), (2, 7), (5, 2))
ALL_OF_3 = tuple((3, j) for j in range(8) if j != 3)


@pytest.mark.parametrize("hard", [0, 3])
@pytest.mark.parametrize(
    ("masked", "positives"),
    [
        ((), None),
        (((0, 1), (0, 2), (5, 1)), None),
        (ALL_OF_3, None),
        (SEVERAL, SEVERAL),
        ((*SEVERAL, (0, 2), (6, 1), (7, 7)), SEVERAL),
        ((), SEVERAL),  # a positive is not a negative, even if no mask says so
        (((0, 5),), ()),
        (ALL_OF_3, ((3, 0), (3, 5))),
        (ALL_OF_3, ALL_OF_3),
        (tuple((i, j) for i in range(8) for j in range(8)), ((4, 5),)),
    ],
    ids=[
        "plain",
        "plain and masks",
        "plain, no negative left",
        "positives",
        "and masks",
        "unmasked",
        "own alone",
        "no negative left",
        "all positive",
        "nothing to learn",
    ],
)
def test_loss_and_gradients_against_the_formula(masked, positives, hard):
    sides = [unit(8, 0), unit(8, 1), unit(hard, 2)]
    found, expected = ([side.clone().requires_grad_() for side in sides] for _ in range(2))
    owners = torch.tensor([1, 2, 2][:hard], dtype=torch.int64)

    loss = info_nce(
        *found[:2],
        mask_of(masked),
        temperature=TEMPERATURE,
        positive_BB=None if positives is None else mask_of(positives),
        negatives_MD=found[2],
        negative_owner_M=owners,
    )
    by_formula = by_hand(*expected[:2], masked, positives or (), expected[2], owners)
    assert loss.value.item() == pytest.approx(by_formula.item(), rel=1e-6, abs=1e-12)

    loss.value.backward()
    by_formula.backward()
    for one, other in zip(found, expected, strict=True):
        if one.grad is None:
            assert other.grad is None or not other.grad.any()
            continue
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)


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


def test_one_positive_each_is_the_plain_loss():
    """The gradient as well; and the accuracy compares the own document with negatives alone."""
    found, expected = ([unit(8, seed).requires_grad_() for seed in (0, 1)] for _ in range(2))
    masked = mask_of(SEVERAL)
    one = info_nce(*found, masked, temperature=0.02, positive_BB=mask_of(()))
    plain = info_nce(*expected, masked, temperature=0.02)
    assert one.value.item() == pytest.approx(plain.value.item(), rel=1e-6)
    assert info_nce(*found, masked, temperature=0.02, positive_BB=masked).accuracy == plain.accuracy
    one.value.backward()
    plain.value.backward()
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_positives_do_not_push_each_other_away():
    """Two perfect answers leave nothing to learn; a softmax over both would give log 2."""
    embeddings = torch.eye(4)[[0, 0, 1, 2]]
    positives = mask_of([(0, 1), (1, 0)], 4)
    assert info_nce(embeddings, embeddings, positives, temperature=0.02, positive_BB=positives).value < 1e-6


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
