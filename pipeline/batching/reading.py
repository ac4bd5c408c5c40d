"""Reading: a text as the relations of copies.py compare it.

A text is cut at white space, and each chunk is read by itself: a word, or a *sign* (a number, a flag, an
operator, a name of code), which must agree exactly. Words that turn a meaning ("not", "only") are marked.
A text of code is not read at all: it must agree but for white space that has no meaning.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from typing import NamedTuple

_WEAK = frozenset({"a", "an", "the", "of", "please"})

# These do not count in some places of a text of several words; see `_find_light`. Prepositions and other forms of
# "be" and "do" always count: "turn on" is not "turn", "have to work" not "have work", and "was" not "is".
_LIGHT = frozenset({"is", "are", "do", "does", "really"})
_QUESTIONS = frozenset({"what", "how", "where", "when", "why", "who"})
_MIN_LEFT = 4  # words of a text without weak and light ones, or all light ones count
_CONTRACTED = {
    **{f"{word}s": f"{word} is" for word in ("what", "how", "where", "when", "who", "that", "there", "here")},
    **{f"{word}'re": f"{word} are" for word in ("you", "we", "they")},
    "i'm": "i am",
}

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
_SPELLINGS = {
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
_SPELLED = re.compile(f"[{''.join(_SPELLINGS)}]")  # str.translate takes five times as long

# What a chunk is: a sum of these.
_SIGN = 1  # must agree exactly: a number, a name of code, an operator, punctuation that stands alone
_CODE = 2  # a sign that is neither a number nor a quantity
_TURNS = 4  # holds a word that turns what the text says
_END = 8  # ends a sentence
_A = 16  # the word "a"
_LABEL = 32  # a word after which "a" is a name
_IS_WEAK = 64  # a word that does not count
_IS_LIGHT = 128  # a word, or the end of a contraction, that counts in some places only


def _at(flags: int) -> re.Pattern[bytes]:
    """Finds the chunks that have one of these flags, in the flags of a text as bytes."""
    return re.compile(b"[" + b"".join(re.escape(bytes([value])) for value in range(256) if value & flags) + b"]")


_NOT_CODE = bytes(value for value in range(256) if not value & _CODE)
_AT_CODE_OR_A = _at(_CODE | _A)
_AT_END = _at(_END)
_AT_MARK = _at(_SIGN | _TURNS)
_AT_WEAK = _at(_IS_WEAK)
_AT_LIGHT = _at(_IS_LIGHT)

_MAX_KNOWN_CHUNKS = 200_000  # about 60 MiB

_MIN_WORDS = 40  # of a text that may lack sentences


class Reading(NamedTuple):
    """A text as the relations compare it.

    Attributes:
        words: The normal form. Texts with equal ones are copies of kind `normal_form`.
        content: The normal form without weak words, and without light ones where these say nothing. Texts with
            equal ones are copies of kind `function_words`.
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


class Reader:
    """Reads texts; it remembers the chunks it has met, which most texts share."""

    def __init__(self) -> None:
        self._flags: dict[str, int] = {}
        self._words = _KnownWords(self._flags)

    def read(self, text: str) -> Reading:
        """Reads one text; see `Reading`."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", _SPELLED.sub(lambda found: _SPELLINGS[found.group()], text))
        if ("\n " in text or "\n\t" in text) and _BLOCK.search(text):
            code = _normal_code(text, has_blocks=True)
            return Reading(code, code)
        chunks = text.split()
        if not chunks:
            return Reading("\0", "\0")
        if len(self._words) > _MAX_KNOWN_CHUNKS:
            self._words.clear()
            self._flags.clear()

        words = list(map(self._words.__getitem__, chunks))
        flags = bytearray(map(self._flags.__getitem__, chunks))
        if len(flags.translate(None, _NOT_CODE)) > _CODE_SHARE * len(chunks):
            code = _normal_code(text, has_blocks=False)
            return Reading(code, code)

        content = words.copy()
        for found in _AT_WEAK.finditer(flags):
            content[found.start()] = ""

        # Prose does not end in a colon or a semicolon, but a command may.
        if not flags[-1] & _SIGN and not _ENDS_TEXT.fullmatch(chunks[-1], len(chunks[-1].rstrip(_CLOSING))):
            words[-1] = content[-1] = words[-1] + chunks[-1][-1]
            flags[-1] |= _SIGN
        _read_in_context(words, content, chunks, flags)
        light = _find_light(words, chunks, flags)
        if len(content) - content.count("") - len(light) >= _MIN_LEFT:
            for index in light:
                content[index] = words[index].partition(" ")[0] if " " in words[index] else ""

        joined = " ".join(filter(None, words))
        if len(chunks) >= _MIN_WORDS and _AT_END.search(flags):
            return _with_sentences(joined, content, flags)
        return Reading(joined, " ".join(filter(None, content)) or "\0" + joined)


class _KnownWords(dict[str, str]):
    """The words of the chunks that were met; `flags` is filled beside it.

    Two tables of plain values rather than one of tuples: the garbage collector need not visit them.
    """

    def __init__(self, flags: dict[str, int]) -> None:
        super().__init__()
        self._flags = flags

    def __missing__(self, chunk: str) -> str:
        words, self._flags[chunk] = _read_chunk(chunk)
        self[chunk] = words
        return words


def _read_chunk(chunk: str) -> tuple[str, int]:
    """Reads what stands between two white spaces as prose: its words, separated by a space, and its flags."""
    core = chunk.lstrip(_OPENING).rstrip(_CLOSING)
    if chunk in ('"', ","):
        return "", 0  # as tokenised texts have them
    if not core.strip("-"):
        return chunk, _SIGN  # punctuation that stands alone, as in `su - NAME`

    # 5! is not 5, and f' is not f.
    after = chunk[chunk.find(core) + len(core) :]
    if (after[:1] == "!" and core[-1].isdigit()) or (after[:1] == "'" and chunk[1:2] == "'"):
        core += after[0]
    end = _END if after and chunk.rstrip(_AFTER_SENTENCE)[-1:] in _ENDS else 0

    if core.isalpha() and (core.islower() or core[1:].islower() or core.isupper()):
        word = core.casefold()
        if word in _CONTRACTED:
            return _CONTRACTED[word], end | _IS_LIGHT
        flags = end | (_TURNS if word in _TURNING else 0) | (_LABEL if word in _LABELLED else 0)
        flags |= (_IS_WEAK if word in _WEAK else 0) | (_IS_LIGHT if word in _LIGHT else 0)
        return word, flags | (_A if word == "a" else 0)

    if _INITIALS.fullmatch(core):
        return core.casefold(), 0
    if _WORDS.fullmatch(core) and not _is_camel(core):
        found = [_spell(word) for word in _WORD.findall(core.casefold())]
        words = " ".join(found)
        if words in _CONTRACTED:
            return _CONTRACTED[words], end | (_IS_LIGHT if words != "i'm" else 0)
        turns = 0 if _TURNING.isdisjoint(found) else _TURNS
        return words, end | turns | (_LABEL if found[-1] in _LABELLED else 0)

    if _NUMBERED.fullmatch(core):
        core = core.casefold()
    is_quantity = _NUMBERED.fullmatch(core) or _QUANTITY.fullmatch(core)
    return core, end | (_SIGN if is_quantity else _SIGN | _CODE)


def _is_camel(core: str) -> bool:
    """Whether a capital follows a small letter, as in `getName`."""
    return any(map(lambda first, second: first.islower() and second.isupper(), core, core[1:]))


def _spell(word: str) -> str:
    """The spelling without the apostrophe of "n't" and "'s", which many leave out."""
    return word.replace("'", "") if word.endswith(("n't", "'s")) else word


def _read_in_context(words: list[str], content: list[str], chunks: list[str], flags: bytearray) -> None:
    """Decides, in place, what depends on the chunks beside: words next to code, and "a" as a name."""
    last = len(flags) - 1
    for index in [found.start() for found in _AT_CODE_OR_A.finditer(flags)]:
        if flags[index] & _A:
            is_label = index > 0 and flags[index - 1] & _LABEL
            if is_label or index == last or chunks[index].lower() != "a" or words[index + 1] in ("and", "or"):
                content[index] = "a"
            continue

        # In `wc -l FILE` the words are names: their case and punctuation count, and none is weak.
        for beside in (index - 1, index + 1):
            if 0 <= beside <= last and not flags[beside] & _CODE:
                words[beside] = content[beside] = chunks[beside].rstrip(".,") or chunks[beside]
                flags[beside] |= _SIGN


def _find_light(words: list[str], chunks: list[str], flags: bytearray) -> list[int]:
    """Finds the light words that say nothing where they stand, and the contractions that end in one.

    These are "is" and "are" within a sentence ("what is the fee" asks the same as "what the fee is", but "is there
    a fee" is not "there is a fee"), "do" and "does" after a question word, "really", and "so" and "and" that begin
    the text. A word beside a sign or a turning word is kept, and one with punctuation.
    """
    light = []
    last = len(flags) - 1
    if words[0] in ("so", "and") and last and chunks[0].isalpha() and not flags[1] & (_SIGN | _TURNS):
        light.append(0)
    for found in _AT_LIGHT.finditer(flags):
        index = found.start()
        if index == last or flags[index] & (_SIGN | _END) or flags[index + 1] & (_SIGN | _TURNS):
            continue
        if " " in words[index]:
            light.append(index)
            continue

        # An acronym such as "IS" is not the word.
        if index == 0 or flags[index - 1] & (_SIGN | _TURNS | _END) or not chunks[index].isalpha():
            continue
        if chunks[index].isupper() and not chunks[index - 1].isupper():
            continue
        if words[index] not in ("do", "does") or words[index - 1] in _QUESTIONS:
            light.append(index)
    return light


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


def _with_sentences(words: str, content: list[str], flags: bytearray) -> Reading:
    """Cuts the content of a text into sentences."""
    sentences, sizes, droppable = [], [], []
    start = size = 0
    for index in [found.start() for found in _AT_END.finditer(flags)]:
        if content[start] == "-":  # an item of a list
            flags[start] &= ~_SIGN
        sentence = " ".join(filter(None, content[start : index + 1]))
        size += index + 1 - start
        if sentence:  # one of function words alone is part of the next
            sentences.append(sentence)
            sizes.append(size)
            droppable.append(_AT_MARK.search(flags, start, index + 1) is None)
            size = 0
        start = index + 1
    if start < len(flags):  # an unfinished sentence may be a command, or have been cut
        sentences.append(" ".join(filter(None, content[start:])))
        sizes.append(size + len(flags) - start)
        droppable.append(False)
    kept = " ".join(filter(None, sentences))
    if not kept:
        return Reading(words, "\0" + words)
    marks = [content[found.start()] for found in _AT_MARK.finditer(flags)]
    return Reading(words, kept, tuple(sentences), tuple(sizes), tuple(droppable), "\0".join(marks))
