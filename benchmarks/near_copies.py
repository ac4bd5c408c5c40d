"""How well near-copies are told from their opposites: pairs of real texts and edits whose truth is known.

    python benchmarks/near_copies.py DATA [--texts 400] [--json FILE]

DATA holds `train/<domain>.parquet`. Copies differ from the real text in case, punctuation, white space, one
article, one other function word or a dropped sentence. Opposites differ in a number, a flag, a negation, an
operator, a preposition or one word alone, or turn a question into a statement. An edit is made only in a text
where it means what its name says; texts of code, for example, keep their case. The editors share no code with
`copies.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

from hardbatch.pipeline.batching.copies import find_copies

Edit = Callable[[str, random.Random], str | None]

_OTHERS = 4_000  # texts of a side among which the cases are sorted

_CODE = re.compile(r"[_={}\[\]\\|/$#@&*+^~<>`]|(?<!\w)-\w|\w\(|\w\.\w|[a-z][A-Z]|\n\s")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NEGATIVE = re.compile(r"\b(not|cannot|no|never|none|nor|neither|without|only|but|if|unless|except)\b|n't|\d", re.I)


@dataclass(frozen=True)
class Case:
    """A real text and an edit of it; `is_copy` is the truth about the two."""

    kind: str
    is_copy: bool
    text: str
    edited: str


@dataclass
class Score:
    """How many cases of one kind there are, and how many of them were joined."""

    cases: int = 0
    joined: int = 0


def _is_prose(text: str) -> bool:
    """Whether case and punctuation say nothing."""
    return not _CODE.search(text) and len(text.split()) >= 3


def _case(text: str, draw: random.Random) -> str | None:
    if not _is_prose(text):
        return None
    change = draw.choice([str.lower, str.upper, str.title])
    # Titles such as "It'S" are avoided, and the case of units such as "5MB" counts.
    return " ".join(change(word) if re.fullmatch(r"\W*[^\W\d_]+\W*", word) else word for word in text.split())


def _punctuation(text: str, draw: random.Random) -> str | None:
    if not _is_prose(text):
        return None
    edits = [
        lambda: re.sub(r",(?=\s)", "", text),
        lambda: text.rstrip(".!?") + draw.choice(["", ".", "!"]) * (not text.rstrip(".!?")[-1:].isdigit()),
        lambda: re.sub(r"(?<=[a-z])\.(?=\s)", ";", text),
        lambda: re.sub(r"^(\S+)", r'"\1"', text) if text[:1].isalpha() else text,
    ]
    return draw.choice(edits)()


def _white_space(text: str, draw: random.Random) -> str | None:
    if "\n" in text:
        return text.replace("\n", draw.choice(["  \n", "\r\n"])) + "\n"
    return draw.choice([" " + text, text.replace(" ", "\u00a0"), text.replace(". ", ".\n\n"), text + "\t"])


def _article(text: str, draw: random.Random) -> str | None:
    found = [] if not _is_prose(text) else list(re.finditer(r"(?<=[a-z] )(the|a|an)(?= [a-z]{2})", text))
    if not found:
        return None
    chosen = draw.choice(found)
    before, after = text[: chosen.start()], text[chosen.end() :]
    return draw.choice([before + after.lstrip(), before + draw.choice(["a", "the", "an"]) + after])


def _function_word(text: str, draw: random.Random) -> str | None:
    """Drops a word that leaves the question or the title what it is, or begins the text with "So" or "And"."""
    if not _is_prose(text) or len(text.split()) < 7:
        return None
    patterns = [
        r"(?<=[a-z] )(?:is|are) (?=[a-z]{2,} [a-z])",
        r"(?<=\b(?i:how|why|who) )(?:do|does) (?=[a-z])|(?<=\b(?i:what|when) )(?:do|does) (?=[a-z])",
        r"(?<=[a-z] )really (?=[a-z]{2})",
    ]
    found = [list(re.finditer(pattern, text)) for pattern in patterns]
    edits = [
        text[: match.start()] + text[match.end() :]
        for match in (draw.choice(matches) for matches in found if matches)
        if not _NEGATIVE.search(" ".join([*text[: match.start()].split()[-1:], *text[match.end() :].split()[:1]]))
    ]
    if not edits and re.match(r"(I|What|How|Where|Why) [a-z]", text):
        edits = [draw.choice(["So ", "And "]) + text[:1].lower() + text[1:]]
    return draw.choice(edits) if edits else None


def _sentence(text: str, draw: random.Random) -> str | None:
    """Drops a sentence of at most an eighth of a longer text that has neither a number nor a negation."""
    sentences = _SENTENCE.split(text)
    if len(sentences) < 4 or len(text.split()) < 50 or re.search(r"\n\s*\S", text):
        return None
    droppable = [
        number
        for number, sentence in enumerate(sentences[:-1])
        if len(sentence.split()) * 8 <= len(text.split()) and not _NEGATIVE.search(sentence) and _is_prose(sentence)
    ]
    if not droppable:
        return None
    dropped = draw.choice(droppable)
    return " ".join(sentence for number, sentence in enumerate(sentences) if number != dropped)


def _number(text: str, draw: random.Random) -> str | None:
    found = list(re.finditer(r"\d+(?:\.\d+)?", text))
    if not found:
        return None
    chosen = draw.choice(found)
    number = chosen.group()
    edits = [number + "0", number[:-1] + str((int(number[-1]) + 1) % 10)]
    if "." in number:
        edits.append(number.replace(".", ""))
    return text[: chosen.start()] + draw.choice(edits) + text[chosen.end() :]


def _flag(text: str, draw: random.Random) -> str | None:
    found = list(re.finditer(r"(?<=\s)--?[A-Za-z][\w-]*", text))
    if not found:
        return None
    chosen = draw.choice(found)
    flag = chosen.group()
    edits = ["", flag.swapcase(), flag.replace("-", ""), flag + "x"]
    return text[: chosen.start()] + draw.choice(edits) + text[chosen.end() :]


def _negation(text: str, draw: random.Random) -> str | None:
    found = list(
        re.finditer(r"\b(is|are|was|were|can|could|should|would|will|does|do|did|if|has|have)\b(?! not)", text)
    )
    if not found:
        return None
    chosen = draw.choice(found)
    return (
        text[: chosen.end()]
        + draw.choice([" not", " never", "n't"][: 2 + (chosen.group() != "if")])
        + text[chosen.end() :]
    )


def _operator(text: str, draw: random.Random) -> str | None:
    swaps = {"==": "!=", "!=": "==", "<=": ">=", ">=": "<=", "<": ">", ">": "<", "+": "-", "*": "/", "%": "", "!": ""}
    swaps |= {" - ": " + ", " and ": " or ", " or ": " and ", "&": "|", "|": "&", "-": "+", "||": "&&", ">>": ">"}
    operators = sorted(swaps, key=lambda operator: (-len(operator), operator))
    # An exclamation mark or a hyphen of prose is not an operator.
    allowed = [operator for operator in operators if operator not in ("!", "-") or re.search(r"[={}|]|\w\(\w*\)", text)]
    found = list(re.finditer("|".join(map(re.escape, allowed)), text))
    found = [
        each for each in found if each.group() not in ("!", "-") or re.match(r"\s?[!-]\s?[\w$(]", text[each.start() :])
    ]
    found = [each for each in found if each.group() != "-" or text[: each.start()][-1:] in " (="]
    if not found:
        return None
    chosen = draw.choice(found)
    return text[: chosen.start()] + swaps[chosen.group()] + text[chosen.end() :]


def _preposition(text: str, draw: random.Random) -> str | None:
    """Drops a preposition, or replaces it by another: "turn on" is not "turn", and "to" is not "from"."""
    words = ["to", "from", "in", "on", "off", "up", "out", "over", "with", "without", "by", "for", "at", "as"]
    found = list(re.finditer(rf"(?<=\w )({'|'.join(words)}) (?=\w)", text))
    if not found:
        return None
    chosen = draw.choice(found)
    other = draw.choice(["", *(word + " " for word in words if word != chosen.group(1))])
    return text[: chosen.start()] + other + text[chosen.end() :]


def _statement(text: str, draw: random.Random) -> str | None:
    """Turns a question, or another sentence with such a beginning, into a statement."""
    found = re.match(r"(Is|Are|Was|Were|Do|Can|Will|Should|Would) (there|this|it|that|you|they|we|I|he|she|my) ", text)
    if not found:
        return None
    subject = found.group(2).capitalize()
    verb = "" if found.group(1) == "Do" else found.group(1).lower() + " "
    return f"{subject} {verb}{text[found.end() :]}"


def _word(text: str, draw: random.Random) -> str | None:
    """Replaces one word by another one."""
    found = list(re.finditer(r"\b[a-z]{4,}\b", text))
    if not found:
        return None
    chosen = draw.choice(found)
    other = draw.choice(["from", "before", "green", "remove", "highest", "server", "evening", "inside"])
    return None if chosen.group() == other else text[: chosen.start()] + other + text[chosen.end() :]


COPIES: dict[str, Edit] = {
    "case": _case,
    "punctuation": _punctuation,
    "white space": _white_space,
    "article": _article,
    "function word": _function_word,
    "sentence dropped": _sentence,
}
OPPOSITES: dict[str, Edit] = {
    "number": _number,
    "flag": _flag,
    "negation": _negation,
    "operator": _operator,
    "preposition": _preposition,
    "statement": _statement,
    "word": _word,
}


def make_cases(texts: list[str], seed: int = 0) -> Iterator[Case]:
    """Yields for each text one case of every kind that applies to it."""
    draw = random.Random(seed)
    for text in texts:
        for is_copy, edits in ((True, COPIES), (False, OPPOSITES)):
            for kind, edit in edits.items():
                edited = edit(text, draw)
                if edited is not None and edited != text and edited.strip():
                    yield Case(kind, is_copy, text, edited)


def score(texts: list[str], cases: list[Case]) -> tuple[dict[str, Score], list[Case]]:
    """Sorts texts and edits of a side into classes: copies among texts and copies, opposites among all.

    An opposite of the sentence that a copy lacks would hide this copy. Both the text and the opposite are then
    the copy with one sentence more, and since they contradict each other, it is joined to neither.

    Returns:
        The scores by kind, and the cases that went wrong: copies not joined and opposites joined.
    """
    scores: dict[str, Score] = defaultdict(Score)
    wrong = []
    copies = [case for case in cases if case.is_copy]
    for is_copy, edits in ((True, copies), (False, cases)):
        every = list(dict.fromkeys([*texts, *(case.edited for case in edits)]))
        row = {text: number for number, text in enumerate(every)}
        text_class = find_copies([every]).text_class
        for case in edits:
            if case.is_copy == is_copy:
                joined = bool(text_class[row[case.text]] == text_class[row[case.edited]])
                scores[case.kind].cases += 1
                scores[case.kind].joined += joined
                if joined != is_copy:
                    wrong.append(case)
    return scores, wrong


def measure(data: Path, num_texts: int, seed: int = 0) -> tuple[dict[str, dict[str, Score]], list[Case]]:
    """Measures every domain of `data`, `num_texts` texts of each side; returns scores by domain and kind."""
    found: dict[str, dict[str, Score]] = {}
    wrong: list[Case] = []
    for path in sorted((data / "train").glob("*.parquet")):
        total: dict[str, Score] = defaultdict(Score)
        for side in ("query", "document"):
            texts = list(dict.fromkeys(pq.read_table(path, columns=[side])[side].to_pylist()))
            sample = random.Random(seed).sample(texts, min(num_texts, len(texts)))
            scores, mistakes = score([*sample, *texts[:_OTHERS]], list(make_cases(sample, seed)))
            wrong += mistakes
            for kind, part in scores.items():
                total[kind].cases += part.cases
                total[kind].joined += part.joined
        found[path.stem] = dict(total)
    return found, wrong


def summary(scores: dict[str, dict[str, Score]]) -> dict[str, float]:
    """Recall over all copies, and precision where copies and opposites weigh the same."""
    copies, opposites = Score(), Score()
    for by_kind in scores.values():
        for kind, part in by_kind.items():
            total = copies if kind in COPIES else opposites
            total.cases += part.cases
            total.joined += part.joined
    recall, fallout = copies.joined / copies.cases, opposites.joined / opposites.cases
    return {"recall": recall, "precision": recall / (recall + fallout), "opposites joined": opposites.joined}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--texts", type=int, default=400, help="texts of each side of a domain")
    parser.add_argument("--wrong", type=int, default=0, help="print this many mistakes of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scores, wrong = measure(arguments.data, arguments.texts)

    kinds = [*COPIES, *OPPOSITES]
    print(f"joined / cases: {', '.join(COPIES)} should be joined, {', '.join(OPPOSITES)} should not")
    print("  ".join(["domain".ljust(20), *(kind.rjust(16) for kind in kinds)]))
    for domain, by_kind in scores.items():
        parts = [by_kind.get(kind, Score()) for kind in kinds]
        print("  ".join([domain.ljust(20), *(f"{part.joined}/{part.cases}".rjust(16) for part in parts)]))
    for name, value in summary(scores).items():
        print(f"{name}: {value:.4g}")

    for kind in kinds:
        for case in [case for case in wrong if case.kind == kind][: arguments.wrong]:
            print(f"\n[{kind}] {case.text[:300]!r}\n  {case.edited[:300]!r}")
    if arguments.json:
        content = {domain: {kind: asdict(part) for kind, part in by.items()} for domain, by in scores.items()}
        arguments.json.write_text(json.dumps({**summary(scores), "domains": content}, indent=1) + "\n")


if __name__ == "__main__":
    main()
