"""Copies: which texts of one side of a domain say the same, so that one may stand for the other.

Three relations join texts to classes. Each keeps the signs (numbers, flags, operators, names of code) and
the words that turn a meaning ("not", "only"), so all texts of a class agree in these and in their order,
however long the chain is that joins them:

- *normal form*: equal after NFKC and white space, in prose also without case and punctuation;
- *articles*: prose whose words agree in order once "a", "an", "the", "of" and "please" are left out;
- *sentences*: one text is the other without a few whole sentences that have no sign and no such word.

The first two compare digests, so they find every copy. MinHash proposes the candidates of the third, and
the sentences of each candidate are compared. A text of code must agree exactly; no other copy is sought.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import rensa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hardbatch.pipeline.arrays import Array

KINDS = ("normal_form", "articles", "sentences")

_WEAK = frozenset({"a", "an", "the", "of", "please"})
# Words that turn or limit what a text says. All texts of a class have the same ones, in the same order.
# fmt: off
_TURNING = frozenset(
    {
        "not", "no", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor",
        "cannot", "without", "unless", "except", "false", "but", "however", "instead", "only",
        "if", "before", "after", "although", "though", "rather", "otherwise", "cant", "wont",
        "dont", "doesnt", "didnt", "isnt", "arent", "wasnt", "werent", "hasnt", "havent",
        "hadnt", "wouldnt", "shouldnt", "couldnt", "mustnt",
    }
)
# After these words "a" is a name, as in "vitamin A", and not an article.
_LABELLED = frozenset(
    {
        "vitamin", "hepatitis", "influenza", "type", "group", "grade", "class", "part",
        "section", "schedule", "plan", "level", "team", "option", "point", "side", "strain",
        "protein", "factor", "step", "appendix", "title", "chapter", "figure", "table",
        "exhibit", "form", "version", "model", "series", "league", "layer", "column", "row",
        "variable", "drive", "key", "letter", "note", "string",
    }
)
# fmt: on

_CODE_SHARE = 0.25  # a text in which more of the chunks are code is read as code
_BLOCK = re.compile(r"[:{]\s*\n[ \t]+\S")  # an indented line after a colon or a brace
_SPACES_IN_QUOTES = re.compile(r"\"[^\"]*  [^\"]*\"|'[^']*  [^']*'")

_LETTERS = r"[^\W\d_]+(?:'[^\W\d_]+)*"
_WORD = re.compile(_LETTERS)
_WORDS = re.compile(rf"{_LETTERS}(?:(?:[-,;!?\"]+|\.\.+){_LETTERS})*")
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")  # U.S or e.g, whose last full stop has been stripped
_NUMBERED = re.compile(r"[^\W\d_]{2,}-\d+")  # covid-19
_QUANTITY = re.compile(r"(?=.*\d)[#$€£+]?[^\W_]+(?:[.,:/%°€£+-]+[^\W_]*)*!?|%")
_OPENING = "\"'(«¿¡"
_CLOSING = "\"').,;:!?»"
_ENDS = frozenset(".!?")
_AFTER_SENTENCE = "\"')»"
_ENDS_TEXT = re.compile(r"[.!?\"')»]*")

# NFKC would turn x² into x2 and 1½ into 11/2. Other spellings of quotes and dashes become one.
_SPELLINGS = str.maketrans(
    {
        **{character: "^" + unicodedata.normalize("NFKC", character) for character in "²³¹"},
        **{chr(code): "^" + unicodedata.normalize("NFKC", chr(code)) for code in (0x2070, *range(0x2074, 0x207F))},
        **{chr(code): "_" + unicodedata.normalize("NFKC", chr(code)) for code in range(0x2080, 0x208F)},
        **{chr(code): " " + chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))},
        **dict.fromkeys("‘’ʼ´", "'"),
        **dict.fromkeys("“”„″", '"'),
        **dict.fromkeys("‐‑‒–", "-"),
        "—": " - ",
        "―": " - ",
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", ""),
    }
)

# What a chunk is: a sum of these.
_SIGN = 1  # must agree exactly: a number, a name of code, an operator, punctuation that stands alone
_CODE = 2  # a sign that is neither a number nor a quantity
_TURNS = 4  # holds a word that turns what the text says
_END = 8  # ends a sentence
_A = 16  # the word "a"
_LABEL = 32  # a word after which "a" is a name


def _at(flags: int) -> re.Pattern[bytes]:
    """Finds the chunks that have one of these flags, in the flags of a text as bytes."""
    return re.compile(b"[" + b"".join(re.escape(bytes([value])) for value in range(256) if value & flags) + b"]")


_AT_CODE_OR_A = _at(_CODE | _A)
_AT_END = _at(_END)
_AT_MARK = _at(_SIGN | _TURNS)

_MAX_KNOWN_CHUNKS = 200_000  # about 60 MiB

_MIN_WORDS = 40  # of a text that may lack sentences
_MIN_OVERLAP = 0.85  # the share of its words that is left
_DROPPED_SHARE = 5  # at most max(1, n // 5) of n sentences, so the sets of sentences have a Jaccard >= 1/2
_PERMUTATIONS = 16  # one band each: a copy of Jaccard 1/2 is missed once in 2**16
_WINDOW = 8  # texts of one bucket, ordered by length, are compared with this many that follow


class _Chunk(NamedTuple):
    """What stands between two white spaces, read as prose.

    `words` are its words and signs, separated by a space; `content` are those but for weak ones; `exact`
    keeps case and punctuation.
    """

    words: str
    content: str
    exact: str
    flags: int


class Reading(NamedTuple):
    """A text as the relations compare it.

    Attributes:
        words: The normal form. Texts with equal ones are copies of kind `normal_form`.
        content: The normal form without weak words. Texts with equal ones are copies of kind `articles`.
        sentences: The content of each sentence; empty if no sentence may be missing.
        sizes: The number of words of each sentence.
        droppable: Whether each sentence has neither a sign nor a turning word.
        marks: The signs and turning words in order; filled in only if there are sentences.
    """

    words: str
    content: str
    sentences: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    droppable: tuple[bool, ...] = ()
    marks: str = ""


@dataclass(frozen=True, kw_only=True)
class Joins:
    """Pairs of rows of one side that were joined to one class; a chain of them joins all of its rows.

    Attributes:
        row, other_row: The rows (int64), `other_row` < `row`.
        kind: The position in `KINDS` (int8).
        overlap: The share of the longer text's words that both have, in order (float32). Where articles differ,
            none of these is counted as shared.
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


class Reader:
    """Reads texts; it remembers the chunks it has met, which most texts share."""

    def __init__(self) -> None:
        self._known = _KnownChunks()

    def read(self, text: str) -> Reading:
        """Reads one text; see `Reading`."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text.translate(_SPELLINGS))
        if _BLOCK.search(text):
            code = _normal_code(text, has_blocks=True)
            return Reading(code, code)
        chunks = text.split()
        if not chunks:
            return Reading("\0", "\0")
        if len(self._known) > _MAX_KNOWN_CHUNKS:
            self._known.clear()

        columns = zip(*map(self._known.__getitem__, chunks), strict=True)
        words, content, exact = map(list, (next(columns), next(columns), next(columns)))
        flags = bytearray(next(columns))
        num_code = sum(flags.count(flag) for flag in set(flags) if flag & _CODE)
        if num_code > _CODE_SHARE * len(chunks):
            code = _normal_code(text, has_blocks=False)
            return Reading(code, code)

        # Prose does not end in a colon or a semicolon, but a command may.
        if not flags[-1] & _SIGN and not _ENDS_TEXT.fullmatch(exact[-1], len(exact[-1].rstrip(_CLOSING))):
            words[-1] = content[-1] = words[-1] + exact[-1][-1]
            flags[-1] |= _SIGN
        _read_in_context(words, content, exact, flags)

        joined = " ".join(filter(None, words))
        kept = " ".join(filter(None, content))
        if not kept:
            return Reading(joined, "\0" + joined)
        if len(chunks) < _MIN_WORDS or not _AT_END.search(flags):
            return Reading(joined, kept)
        return _with_sentences(joined, kept, content, flags)


class _KnownChunks(dict[str, _Chunk]):
    def __missing__(self, chunk: str) -> _Chunk:
        self[chunk] = read = _read_chunk(chunk)
        return read


def _read_chunk(chunk: str) -> _Chunk:
    """Reads what stands between two white spaces as prose."""
    core = chunk.lstrip(_OPENING).rstrip(_CLOSING)
    after = chunk[chunk.find(core) + len(core) :]
    if chunk in ('"', ","):
        return _Chunk("", "", chunk, 0)  # as tokenised texts have them
    if not core.strip("-"):
        return _Chunk(chunk, chunk, chunk, _SIGN)  # punctuation that stands alone, as in `su - NAME`

    # 5! is not 5, and f' is not f.
    if (after.startswith("!") and core[-1].isdigit()) or (after.startswith("'") and chunk[1:2] == "'"):
        core += after[0]
    end = _END if chunk.rstrip(_AFTER_SENTENCE)[-1:] in _ENDS else 0

    if core.isalpha() and (core.islower() or core[1:].islower() or core.isupper()):
        word = core.casefold()
        flags = end | (_TURNS if word in _TURNING else 0) | (_LABEL if word in _LABELLED else 0)
        return _Chunk(word, "" if word in _WEAK else word, chunk, flags | (_A if word == "a" else 0))

    if _INITIALS.fullmatch(core):
        return _Chunk(core.casefold(), core.casefold(), chunk, 0)
    if _WORDS.fullmatch(core) and not _is_camel(core):
        found = [_spell(word) for word in _WORD.findall(core.casefold())]
        words = " ".join(found)
        turns = 0 if _TURNING.isdisjoint(found) else _TURNS
        return _Chunk(words, words, chunk, end | turns | (_LABEL if found[-1] in _LABELLED else 0))

    if _NUMBERED.fullmatch(core):
        core = core.casefold()
    is_quantity = _NUMBERED.fullmatch(core) or _QUANTITY.fullmatch(core)
    return _Chunk(core, core, chunk, end | (_SIGN if is_quantity else _SIGN | _CODE))


def _is_camel(core: str) -> bool:
    """Whether a capital follows a small letter, as in `getName`."""
    return any(map(lambda first, second: first.islower() and second.isupper(), core, core[1:]))


def _spell(word: str) -> str:
    """The spelling without the apostrophe of "n't" and "'s", which many leave out."""
    return word.replace("'", "") if word.endswith(("n't", "'s")) else word


def _read_in_context(words: list[str], content: list[str], exact: list[str], flags: bytearray) -> None:
    """Decides, in place, what depends on the chunks beside: words next to code, and "a" as a name."""
    last = len(flags) - 1
    for index in [found.start() for found in _AT_CODE_OR_A.finditer(flags)]:
        if flags[index] & _A:
            is_label = index > 0 and flags[index - 1] & _LABEL
            if is_label or index == last or exact[index].lower() != "a" or words[index + 1] in ("and", "or"):
                content[index] = "a"
            continue

        # In `wc -l FILE` the words are names: their case and punctuation count, and none is weak.
        for beside in (index - 1, index + 1):
            if 0 <= beside <= last and not flags[beside] & _CODE:
                words[beside] = content[beside] = exact[beside].rstrip(".,") or exact[beside]
                flags[beside] |= _SIGN


def _normal_code(text: str, *, has_blocks: bool) -> str:
    """Code without blank lines and trailing white space; indentation counts where there are blocks.

    Within a line white space is one space, unless there is more of it between quotes.
    """
    lines = [line.rstrip() for line in text.expandtabs().splitlines() if line.strip()]
    if has_blocks:
        lines = textwrap.dedent("\n".join(lines)).split("\n")
    found = []
    for line in lines:
        code = line.lstrip()
        if "  " in code and not _SPACES_IN_QUOTES.search(code):
            code = " ".join(code.split())
        indent = line[: len(line) - len(line.lstrip())] if has_blocks else ""
        found.append(indent + code)
    return "\1" + ("\n" if has_blocks else " ").join(found)


def _with_sentences(words: str, kept: str, content: list[str], flags: bytearray) -> Reading:
    """Cuts the content of a text into sentences."""
    sentences, sizes, droppable = [], [], []
    start = 0
    for index in [found.start() for found in _AT_END.finditer(flags)]:
        sentences.append(" ".join(filter(None, content[start : index + 1])))
        sizes.append(index + 1 - start)
        droppable.append(_AT_MARK.search(flags, start, index + 1) is None)
        start = index + 1
    if start < len(flags):  # an unfinished sentence may be a command, or have been cut
        sentences.append(" ".join(filter(None, content[start:])))
        sizes.append(len(flags) - start)
        droppable.append(False)
    marks = [content[found.start()] for found in _AT_MARK.finditer(flags)]
    return Reading(words, kept, tuple(sentences), tuple(sizes), tuple(droppable), "\0".join(marks))


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
    articles = rows[(first_of_form == rows) & (first_of_content != rows)]
    near = first_of_content[articles]
    lacking = long.find_joins(first_of_content)

    joins = Joins(
        row=np.concatenate([forms, articles, lacking.row]),
        other_row=np.concatenate([first_of_form[forms], near, lacking.other_row]),
        kind=np.repeat(np.arange(3, dtype=np.int8), [len(forms), len(articles), len(lacking.row)]),
        overlap=np.concatenate(
            [
                np.ones(len(forms)),
                num_content[articles] / np.maximum(num_words[articles], num_words[near]),
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


def compare(text: str, other: str) -> tuple[str, float] | None:
    """The kind in `KINDS` and the overlap by which two texts are copies of each other; None if they are not.

    Two texts of one class need not be copies themselves, if others stand between them.
    """
    copies = find_copies([[text, other]])
    if len(copies.joins.row) == 0:
        return None
    return KINDS[int(copies.joins.kind[0])], float(copies.joins.overlap[0])


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
