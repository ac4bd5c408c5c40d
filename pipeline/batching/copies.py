"""Copies: which texts of one side of a domain say the same, so that one may stand for the other.

Three relations join texts to classes. Each keeps the signs (numbers, flags, operators, names of code) and
the words that turn a meaning ("not", "only"), so all texts of a class agree in these and in their order,
however long the chain is that joins them:

- *normal form*: equal after NFKC and white space, in prose also without case and punctuation;
- *function words*: prose whose words agree in order once "a", "an", "the", "of" and "please" are left out, and in
  texts of several words also "is", "are", "do", "does", "really", "so" and "and" in some places (reading.py);
- *sentences*: one text is the other without a few whole sentences that have no sign and no such word.

The first two compare digests, so they find every copy. MinHash proposes the candidates of the third, and
the sentences of each candidate are compared. A text of code must agree exactly; no other copy is sought.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import rensa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.reading import Reader, Reading

KINDS = ("normal_form", "function_words", "sentences")

_MIN_OVERLAP = 0.85  # the share of the words of a text that is left without some of its sentences
_DROPPED_SHARE = 5  # at most max(1, n // 5) of n sentences, so the sets of sentences have a Jaccard >= 1/2
_PERMUTATIONS = 16  # one band each: a copy of Jaccard 1/2 is missed once in 2**16
_WINDOW = 8  # texts of one bucket, ordered by length, are compared with this many that follow


@dataclass(frozen=True, kw_only=True)
class Joins:
    """Pairs of rows of one side that were joined to one class; a chain of them joins all of its rows.

    Attributes:
        row, other_row: The rows (int64), `other_row` < `row`.
        kind: The position in `KINDS` (int8).
        overlap: The share of the longer text's words that both have, in order (float32). Where function words
            differ, none of these is counted as shared.
    """

    row: Array
    other_row: Array
    kind: Array
    overlap: Array


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The classes of the texts of one side (int64 by row, numbered by first appearance), and why."""

    text_class: Array
    joins: Joins


def find_copies(blocks: Iterable[Sequence[str]]) -> Copies:
    """Sorts the texts of one side into classes of copies.

    Time grows as the number of words plus n log n, whatever the texts are. Memory is 150 bytes a text and
    9 a sentence of the texts that have several.

    Args:
        blocks: The texts by row, in blocks of any size.

    Returns:
        The classes, and what joined them. The same texts in the same order give the same result.
    """
    reader = Reader()
    digests: list[bytes] = []
    counts: list[tuple[int, int]] = []  # words of each text, and of its content
    long = _Sentences()
    for block in blocks:
        for text in block:
            reading = reader.read(text)
            key = _digest(reading.words, 16)
            digests.append(key + (key if reading.content == reading.words else _digest(reading.content, 16)))
            counts.append((reading.words.count(" ") + 1, reading.content.count(" ") + 1))
            if reading.sentences:
                long.add(len(digests) - 1, reading)

    num_texts = len(digests)
    keys = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(num_texts, 4)
    del digests
    num_words, num_content = np.array(counts, dtype=np.int64).reshape(-1, 2).T

    # Each text is joined to the first of its normal form, and that one to the first of its content.
    first_of_form = _first_of_equal(keys[:, :2])
    first_of_content = _first_of_equal(keys[:, 2:])
    rows = np.arange(num_texts)
    forms = rows[first_of_form != rows]
    function_words = rows[(first_of_form == rows) & (first_of_content != rows)]
    near = first_of_content[function_words]
    lacking = long.find_joins(first_of_content)

    joins = Joins(
        row=np.concatenate([forms, function_words, lacking.row]),
        other_row=np.concatenate([first_of_form[forms], near, lacking.other_row]),
        kind=np.repeat(np.arange(3, dtype=np.int8), [len(forms), len(function_words), len(lacking.row)]),
        overlap=np.concatenate(
            [
                np.ones(len(forms)),
                num_content[function_words] / np.maximum(num_words[function_words], num_words[near]),
                lacking.overlap,
            ]
        ).astype(np.float32),
    )
    return Copies(text_class=_classes(num_texts, joins), joins=joins)


def no_copies(num_texts: int) -> Copies:
    """Every text in a class of its own."""
    nothing = np.empty(0, dtype=np.int64)
    joins = Joins(row=nothing, other_row=nothing, kind=nothing.astype(np.int8), overlap=nothing.astype(np.float32))
    return Copies(text_class=np.arange(num_texts), joins=joins)


class KnownTexts:
    """Texts that others are compared with: equal ones are found, and near-copies by their normal form or content.

    The third relation of this module, sentences that were left out, is not looked for. Memory is about 150
    bytes a text.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._labels: dict[bytes, str] = {}

    def __bool__(self) -> bool:
        return bool(self._labels)

    def add(self, texts: Iterable[str], label: str) -> None:
        """Adds texts; of equal ones the label of the first is kept."""
        for text in texts:
            for digest in self._digests(text):
                self._labels.setdefault(digest, label)

    def find(self, text: str) -> str | None:
        """The label of a known text that `text` is equal to or a near-copy of; None if there is none."""
        return next((self._labels[digest] for digest in self._digests(text) if digest in self._labels), None)

    def _digests(self, text: str) -> Iterator[bytes]:
        reading = self._reader.read(text)
        yield _digest(reading.words, 16)
        if reading.content != reading.words:
            yield _digest(reading.content, 16)


class _Sentences:
    """The sentences of the texts that have several, as digests, one after another.

    Attributes:
        rows: The row of each text.
        ends: Where its sentences end in `hashes`, `sizes` and `droppable`.
        marks: A digest of its signs and turning words.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ends: list[int] = [0]
        self.marks: list[int] = []
        self.hashes = bytearray()
        self.sizes: list[int] = []
        self.droppable = bytearray()

    def add(self, row: int, reading: Reading) -> None:
        self.rows.append(row)
        self.marks.append(int.from_bytes(_digest(reading.marks, 8), "little"))
        self.hashes += b"".join([_digest(sentence, 8) for sentence in reading.sentences])
        self.sizes += reading.sizes
        self.droppable += bytes(reading.droppable)
        self.ends.append(len(self.sizes))

    def find_joins(self, first_of_content: Array) -> Joins:
        """The pairs of texts of which one is the other without some sentences."""
        hashes = np.frombuffer(bytes(self.hashes), dtype=np.uint64)
        ends = np.array(self.ends, dtype=np.int64)
        rows = np.array(self.rows, dtype=np.int64)
        sizes = np.array(self.sizes, dtype=np.int64)
        num_words = np.diff(np.concatenate([[0], np.cumsum(sizes)])[ends])

        # One text stands for all of the same sentences. Texts of one content may differ in where these end.
        digest = np.array([_fold(hashes[a:b]) for a, b in pairwise(ends)], dtype=np.uint64)
        shape = np.stack([digest, first_of_content[rows].astype(np.uint64)], axis=1)
        kept = np.flatnonzero(_first_of_equal(shape) == np.arange(len(rows)))
        left, right = _candidates(kept, hashes, ends, np.array(self.marks, dtype=np.uint64), num_words)

        # The longer texts of each shorter one, by their number of words.
        listed, may_drop = hashes.tolist(), bytes(self.droppable)
        spans = [slice(start, stop) for start, stop in pairwise(ends.tolist())]
        longer_of: dict[int, list[int]] = {}
        for shorter, longer in zip(left.tolist(), right.tolist(), strict=True):
            if first_of_content[rows[shorter]] == first_of_content[rows[longer]]:
                continue
            if _lacks_only_droppable(listed[spans[shorter]], listed[spans[longer]], may_drop[spans[longer]]):
                longer_of.setdefault(shorter, []).append(longer)

        # A text whose longer versions contradict each other is joined to none of them, or it would join
        # "... Take both and rest." to "... Take both or rest." So every class has one fullest text, which
        # holds the sentences of all others.
        found = []
        for shorter, longer_texts in longer_of.items():
            longer_texts.sort(key=lambda item: (num_words[item], item))
            if all(_is_within(listed[spans[one]], listed[spans[other]]) for one, other in pairwise(longer_texts)):
                for longer in longer_texts:
                    first, second = sorted((int(rows[shorter]), int(rows[longer])))
                    found.append((second, first, num_words[shorter] / num_words[longer]))
        found.sort()
        table = np.array(found, dtype=np.float64).reshape(-1, 3)
        row, other = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        return Joins(row=row, other_row=other, kind=np.full(len(row), 2, np.int8), overlap=table[:, 2])


def _is_within(shorter: list[int], longer: list[int]) -> bool:
    """Whether `shorter` is `longer` without some of its items."""
    remaining = iter(longer)
    return all(item in remaining for item in shorter)


def _candidates(kept: Array, hashes: Array, ends: Array, marks: Array, num_words: Array) -> tuple[Array, Array]:
    """Pairs of texts (shorter, longer) that probably share most sentences and agree in signs and turning words.

    A bucket holds texts with one MinHash and the same signs and turning words. Within a bucket the texts are
    ordered by length, and each is compared with the next `_WINDOW`, so a bucket of n texts gives 8·n pairs.
    """
    if len(kept) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    sets = [hashes[ends[item] : ends[item + 1]] for item in kept]
    offsets = np.cumsum([0, *map(len, sets)])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), offsets.astype(np.uint64), _PERMUTATIONS, 0
    )
    signatures = np.array(matrix.to_rows(), dtype=np.uint32)

    size = num_words[kept]
    pairs = []
    for band in range(_PERMUTATIONS):
        order = np.lexsort((kept, size, marks[kept], signatures[:, band]))
        same = np.zeros(len(order), dtype=bool)
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            first, second = order[:-step], order[step:]
            same = (signatures[first, band] == signatures[second, band]) & (marks[kept[first]] == marks[kept[second]])
            close = size[first] >= _MIN_OVERLAP * size[second]
            pairs.append(first[same & close] * len(kept) + second[same & close])
            if not same.any():
                break
    codes = np.unique(np.concatenate(pairs))
    return kept[codes // len(kept)], kept[codes % len(kept)]


def _lacks_only_droppable(shorter: list[int], longer: list[int], may_drop: bytes) -> bool:
    """Whether `shorter` is `longer` without a few sentences, each of which may be dropped."""
    missing = len(longer) - len(shorter)
    if not 0 <= missing <= max(1, len(longer) // _DROPPED_SHARE):
        return False
    position = 0
    for sentence, droppable in zip(longer, may_drop, strict=True):
        if position < len(shorter) and shorter[position] == sentence:
            position += 1
        elif not droppable:
            return False
    return position == len(shorter)


def _digest(text: str, num_bytes: int) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=num_bytes).digest()


def _fold(hashes: Array) -> int:
    return int.from_bytes(blake2b(hashes.tobytes(), digest_size=8).digest(), "little")


def _first_of_equal(keys: Array) -> Array:
    """For each row of `keys` (uint64, n × 2) the first row that equals it (int64, n)."""
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def _classes(num_texts: int, joins: Joins) -> Array:
    """The connected components, numbered by first appearance (int64)."""
    if num_texts == 0:
        return np.empty(0, dtype=np.int64)
    edges = coo_matrix((np.ones(len(joins.row), dtype=bool), (joins.row, joins.other_row)), (num_texts, num_texts))
    _, labels = connected_components(edges, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)
