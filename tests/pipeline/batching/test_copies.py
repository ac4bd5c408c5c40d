"""Copies: the classes of texts, against a plain verifier, and what must never be joined."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.near_copies import COPIES, OPPOSITES, make_cases
from hardbatch.pipeline.batching.copies import KINDS, KnownTexts, find_copies

LONG = (
    "The library opens in the morning on every day of the week. Visitors leave their coats in the hall. "
    "Quiet rooms are found on the upper floor, where large tables stand near the windows. "
    "Children have a corner of their own, with cushions and wooden puzzles. "
    "Readers may borrow novels, maps and records for a month. The café serves soup and bread at noon."
)


def classes(texts):
    return find_copies([texts]).text_class.tolist()


def compare(text, other):
    """The kind and the overlap by which two texts are copies of each other; None if they are not."""
    joins = find_copies([[text, other]]).joins
    return (KINDS[joins.kind[0]], float(joins.overlap[0])) if len(joins.row) else None


@pytest.mark.parametrize(
    ("text", "other", "kind"),
    [
        ("List the  files", "list the files.", "normal_form"),
        ("“Don’t panic”, he said", "dont panic he said", "normal_form"),
        ("Ｆｕｌｌ width", "full\u00a0width", "normal_form"),
        ("a well-known fact", "A well known fact!", "normal_form"),
        ("COVID-19 in children", "Covid-19 in children", "normal_form"),
        ("x = [1, 2]  \n\ny = 3", "x = [1, 2]\ny = 3\n", "normal_form"),
        ("Save results to a file", "Save the results to file", "function_words"),
        ("How many ounces are in a cup?", "how many ounces in a cup", "function_words"),
        ("Tell me why my account is frozen", "tell me why is my account frozen", "function_words"),
        ("So why do cats hate cold water", "Why cats hate cold water", "function_words"),
        ("I really need to change my pin", "I need to change my pin", "function_words"),
        ("What's the total of my bank accounts", "what is the total of my bank accounts", "normal_form"),
        ("WHAT IS THE TOTAL OF MY BANK ACCOUNTS", "What the total of my bank accounts", "function_words"),
        (LONG, LONG.replace("Visitors leave their coats in the hall. ", ""), "sentences"),
    ],
)
def test_copies_are_joined(text, other, kind):
    found = compare(text, other)
    assert found is not None and found[0] == kind
    assert found[1] == 1 if kind == "normal_form" else 0.5 < found[1] < 1


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("count lines with wc -l", "count lines with wc -L"),
        ("a dose of 1.5 mg", "a dose of 15 mg"),
        ("10² metres", "102 metres"),
        ("take 1½ pills", "take 11/2 pills"),
        ("open it if it rains", "open it if not it rains"),
        ("C++ compilers are slow", "C compilers are slow"),
        ("let x<y hold here", "let x>y hold here"),
        ("flights to Paris", "flights from Paris"),
        ("the capital of France", "the capital of Spain"),
        ("how to turn on the old kitchen lights", "how to turn the old kitchen lights"),
        ("I have to work all day tomorrow", "I have work all day tomorrow"),
        ("convert a length to 5 in metres now", "convert a length to 5 metres now"),
        ("the answer is 5 for most people", "the answer 5 for most people"),
        ("Is there a way to read big files", "There is a way to read big files"),
        ("We came early. Is there any soup left", "We came early. There is any soup left"),
        ("Do you like cats more than dogs", "You like cats more than dogs"),
        ("things to do in the old town", "things to in the old town"),
        ("why is the red door not open", "why is the red door open"),
        ("the show is really not that funny today", "the show is not that funny today"),
        ("an IS attack on the old town today", "an attack on the old town today"),
        ("who is the president of the two chambers", "who was the president of the two chambers"),
        ("God is love", "God love"),
        ("vitamin a deficiency", "vitamin deficiency"),
        ("git checkout: Switch to it.\ngit checkout .", "git checkout: Switch to it.\ngit checkout -"),
        ("su: Switch user.\nsu username", "su: Switch user.\nsu - username"),
        ("chown: Change owner.\nchown user", "chown: Change owner.\nchown user:"),
        ("what is 5!", "what is 5"),
        ("plot f' of x", "plot f of x"),
        ("if x:\n    a()\nb()", "if x:\n    a()\n    b()"),
        ("if x:\n    tab = '  '", "if x:\n    tab = '    '"),
        ("?!", "..."),
        ("👍", "👎"),
        ("the", "of"),
        ("", " ?"),
        (LONG, LONG.replace("near", "from")),
        (LONG, LONG.replace("Visitors leave their coats in the hall. ", "Visitors leave bags in the hall. ")),
        (LONG + " It is not free. Bring some money and come early.", LONG + " Bring some money and come early."),
    ],
)
def test_opposites_are_not_joined(text, other):
    assert compare(text, other) is None


def test_edits_of_known_truth():
    """The editors of the benchmark share no code with the relation."""
    texts = [
        LONG,
        "Find the files that are larger than 10 MB and were changed in the last day",
        "tar: Archive files.\ntar -c -f target.tar --verbose path/to/file",
        "def sign(x):\n    if x < 0 and x != 7:\n        return -1\n    return x + 1",
        "Is there a rule that says where the files of a library are kept",
        "The kidney removes waste from the blood. It is a bean of the size of a fist, and you have two of them.",
    ]
    cases = [case for seed in range(40) for case in make_cases(texts, seed)]
    assert {case.kind for case in cases} == {*COPIES, *OPPOSITES}
    wrong = [case for case in cases if (compare(case.text, case.edited) is not None) != case.is_copy]
    assert wrong == []


def test_items_of_a_list_may_be_left_out():
    items = LONG.replace(". ", ".\n- ")
    assert compare(items, items.replace("- Visitors leave their coats in the hall.\n", "")) is not None
    dashed = items.replace("leave their coats", "leave - or keep - their coats")
    assert compare(dashed, items.replace("- Visitors leave their coats in the hall.\n", "")) is None


def test_a_text_does_not_join_versions_that_contradict_each_other():
    short = LONG.replace("Visitors leave their coats in the hall. ", "")
    other = LONG.replace("their coats", "wet umbrellas")
    assert classes([LONG, short]) == [0, 0]
    assert classes([LONG, short, other]) == [0, 1, 2]
    assert classes([LONG, short, LONG + " Guests are welcome."]) == [0, 0, 0]  # one holds the other


def test_a_sentence_of_function_words_does_not_count() -> None:
    short = LONG.replace("Visitors leave their coats in the hall. ", "")
    assert classes([LONG, f"The. {short}"]) == classes([f"The. {LONG}", short]) == [0, 0]


# A verifier of texts made of plain words and full stops, written from the definition alone.

WORDS = ["red", "blue", "not", "7", "fish", "the"]
SENTENCES = st.lists(st.sampled_from(["long", *WORDS]), min_size=1, max_size=3).map(
    lambda words: " ".join(word if word != "long" else " ".join(["many words of prose"] * 6) for word in words)
)
TEXTS = st.lists(st.lists(SENTENCES, min_size=1, max_size=4), min_size=2, max_size=9)


def content(words):
    return [word for word in words if word not in ("a", "an", "the", "of", "please")]


def keeps(sentences):
    """The content of each sentence that has any, as the definition reads it."""
    return [content(sentence.split()) for sentence in sentences if content(sentence.split())]


def lacks(shorter, longer):
    """Whether one text is the other without a few sentences of plain words."""
    left, right = keeps(shorter), keeps(longer)
    sizes = [sum(len(sentence.split()) for sentence in text) for text in (shorter, longer)]
    if (
        min(sizes) < 40
        or sizes[0] < 0.85 * sizes[1]
        or len(right) - len(left) not in range(max(1, len(right) // 5) + 1)
    ):
        return False
    for number in range(len(right) - len(left) + 1):
        for dropped in combinations(range(len(right)), number):
            rest = [sentence for index, sentence in enumerate(right) if index not in dropped]
            if rest == left and not any({"not", "7"} & set(right[index]) for index in dropped):
                return True
    return False


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_classes_are_the_closure_of_the_relation(texts):
    number = len(texts)
    words = [content(" ".join(text).split()) for text in texts]
    joined = np.eye(number, dtype=bool)
    for i, j in combinations(range(number), 2):
        equal = " ".join(texts[i]).split() == " ".join(texts[j]).split()
        joined[i, j] = joined[j, i] = equal or (words[i] == words[j] != [])
    for i in range(number):
        longer = [j for j in range(number) if words[i] != words[j] and lacks(texts[i], texts[j])]
        longer.sort(key=lambda j: len(" ".join(texts[j]).split()))
        nested = all(
            any(keeps(texts[a]) == list(some) for some in combinations(keeps(texts[b]), len(keeps(texts[a]))))
            for a, b in pairwise(longer)
        )
        for j in longer * nested:
            joined[i, j] = joined[j, i] = True
    for _ in range(number):
        joined = joined @ joined
    expected = np.unique(joined.argmax(axis=1), return_inverse=True)[1]
    assert classes([". ".join(text).capitalize() + "." for text in texts]) == expected.tolist()


def test_fifty_thousand_texts_that_say_the_same():
    texts = [" " * (i % 250) + "Same text here" + "." * (i // 250) for i in range(50_000)]
    started = time.process_time()
    copies = find_copies([texts[:1_000], texts[1_000:]])
    assert copies.text_class.max() == 0
    assert len(copies.joins.row) == 49_999 and set(copies.joins.other_row.tolist()) == {0}
    assert time.process_time() - started < 30


def test_a_bucket_of_thousands_is_not_compared_with_itself():
    texts = [f"{LONG} Room {''.join(chr(97 + int(d)) for d in str(i))} is free." for i in range(4_000)]
    started = time.process_time()
    assert classes(texts) == list(range(4_000))
    assert time.process_time() - started < 20  # 8 million comparisons would take minutes


def test_joins_say_why():
    short = LONG.replace("Visitors leave their coats in the hall. ", "")
    joins = find_copies([["Open a file", "open file", LONG, short, "OPEN A FILE!"]]).joins
    found = {(r, o): KINDS[k] for r, o, k in zip(joins.row, joins.other_row, joins.kind, strict=True)}
    assert found == {(4, 0): "normal_form", (1, 0): "function_words", (3, 2): "sentences"}
    assert joins.overlap.tolist() == [1.0, pytest.approx(2 / 3), pytest.approx(len(short.split()) / len(LONG.split()))]


def test_no_texts():
    assert classes([]) == []


@pytest.mark.parametrize("seed", ["0", "1"])
def test_hash_seed_and_blocks_change_nothing(seed):
    draw = random.Random(7)
    words = LONG.split()
    texts = [" ".join(draw.sample(words, draw.randint(1, 4))) for _ in range(300)]
    expected = find_copies([texts])
    code = (
        "import sys; from hardbatch.pipeline.batching.copies import find_copies\n"
        "texts = sys.stdin.read().split('|')\n"
        "print(find_copies([texts[:7], texts[7:]]).text_class.tolist())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], input="|".join(texts), text=True, capture_output=True, check=True,
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert ended.stdout.strip() == str(expected.text_class.tolist())
    assert len(set(expected.text_class.tolist())) < len(texts)


# known texts


def test_known_texts_are_found_with_their_near_copies() -> None:
    known = KnownTexts()
    assert not known and known.find("anything") is None
    known.add(["What is the fee?", "def f(x):\n    return x"], "one")
    known.add(["what is the fee", "Sorry, not found."], "two")
    assert known
    assert [known.find(text) for text in ("what  is the FEE", "What is fee", "sorry not found")] == [
        "one", "one", "two",
    ]  # fmt: skip
    for other in ("What is the fee of 3?", "Sorry, found.", "def f(y):\n    return y", "fee"):
        assert known.find(other) is None


@given(st.lists(st.sampled_from(["The bus is late.", "the bus is late", "bus late", "A bus", "bus", "not a bus", "!"])))
def test_known_texts_find_what_the_first_two_relations_join(texts: list[str]) -> None:
    for text in texts[1:]:
        known = KnownTexts()
        known.add(texts[:1], "label")
        first, second = find_copies([[texts[0], text]]).text_class
        assert (known.find(text) == "label") == (first == second)
