"""trainer.batch and trainer.tokens: ids as transformers gives them, padding chunk by chunk, batches of tokens."""

from __future__ import annotations

import importlib.util
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.batch import (
    Batch,
    TextTokenizer,
    Tokenizer,
    Tokens,
    chunk_by_length,
    chunk_by_tokens,
    computed_tokens,
    concat,
    load_tokenizer,
    pad,
    padding_ratio,
    split_tightly,
)
from hardbatch.trainer.shards import TextBatch
from tests.models import VOCABULARY_SIZE
from tests.samples import WORDS
from tests.trainer_models import save_tokenizer

TEXTS = [
    "a river bank",
    "",
    " \t\n",
    "\u0301",  # a lone combining sign, which some normalizers drop
    "Ünïcödé 漢字 \U0001f600 emoji and \u200b zero width",
    "special [SEP] tokens [MASK] </s> in a text <unk>",
    "long " * 200,
    "x" * 300,
    "number 12,345.67 (and signs) -- #hash @at",
]


KINDS = {"wordpiece": "bert", "bytes with specials": "roberta", "unigram": "xlm-roberta", "bytes": ""}


def save_bytes(folder: Path) -> Path:
    """A byte-level BPE tokenizer trained on a few words, without special tokens and padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(WORDS, vocab_size=320, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folders(kind)`: a tokenizer of one of KINDS on the disk."""
    root = tmp_path_factory.mktemp("tokenizers")

    def folder(kind: str) -> Path:
        path, model_type = root / kind, KINDS[kind]
        if path.exists():
            return path
        return save_tokenizer(path, model_type) if model_type else save_bytes(path)

    return folder


def rows_of(tokens: Tokens) -> list[list[int]]:
    """Ids of each text."""
    return [part.tolist() for part in torch.split(tokens.ids, tokens.lengths_N.tolist())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length_tokens", [3, 8, 32, 512])
@pytest.mark.parametrize("prompt", ["", "search_query: "])
def test_ids_are_those_of_transformers(
    folders: Callable[[str], Path], kind: str, max_length_tokens: int, prompt: str
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders(kind))
    tokenizer = load_tokenizer(folders(kind), max_length_tokens=max_length_tokens)
    assert tokenizer.pad_id == (theirs.pad_token_id or 0)
    tokens = tokenizer.tokenize(TEXTS, prompt)
    expected = theirs([prompt + text for text in TEXTS], truncation=True, max_length=max_length_tokens)["input_ids"]
    for ids, of_theirs in zip(rows_of(tokens), expected, strict=True):
        assert ids == of_theirs or (of_theirs == [] and len(ids) == 1)
    assert tokens.ids.dtype == tokens.lengths_N.dtype == torch.int64
    assert max(tokens.lengths_N.tolist()) <= max_length_tokens


def test_calls_of_the_original_change_nothing_here(folders: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders("wordpiece"))
    tokenizer = TextTokenizer(theirs, 16)
    before = rows_of(tokenizer.tokenize(TEXTS))
    theirs(TEXTS, truncation=True, max_length=4, padding="max_length")
    assert rows_of(tokenizer.tokenize(TEXTS)) == before


def test_truncation_takes_the_side_of_the_tokenizer(folders: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders("wordpiece"), truncation_side="left")
    tokens = TextTokenizer(theirs, 6).tokenize(["one two three four five six seven"])
    assert rows_of(tokens) == [theirs("four five six seven")["input_ids"]]


# prompts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "search_query: ", "x"])
def test_prompt_lengths_are_those_of_sentence_transformers(
    folders: Callable[[str], Path], kind: str, prompt: str
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders(kind))
    tokens = load_tokenizer(folders(kind), max_length_tokens=64).tokenize(["a river bank"] * 2, prompt)
    ids = theirs(prompt)["input_ids"]
    expected = len(ids) - (ids[-1] in theirs.all_special_ids) if prompt else 0
    assert tokens.prompt_lengths_N.tolist() == [expected] * 2
    assert (expected > 0) == bool(prompt)


def test_a_prompt_for_each_text(folders: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(folders("wordpiece"), max_length_tokens=64)
    tokens = tokenizer.tokenize(["river", "stone", "bread"], ["", "search_query: ", "query: "])
    alone = [tokenizer.tokenize([t], p) for t, p in [("river", ""), ("stone", "search_query: "), ("bread", "query: ")]]
    assert rows_of(tokens) == [rows_of(one)[0] for one in alone]
    assert tokens.prompt_lengths_N.tolist() == [int(one.prompt_lengths_N[0]) for one in alone]
    with pytest.raises(ValueError, match="zip"):
        tokenizer.tokenize(["river", "stone"], ["query: "])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_as_long_as_the_limit_leaves_a_token(folders: Callable[[str], Path], kind: str) -> None:
    tokens = load_tokenizer(folders(kind), max_length_tokens=4).tokenize(["river"], "a much too long prompt: ")
    assert tokens.lengths_N.tolist() == [4] and tokens.prompt_lengths_N.tolist() == [3]
    assert pad(tokens, torch.tensor([0]), 0).without_prompt_CT().tolist() == [[False, False, False, True]]


# padding


def make_tokens(lengths: list[int], prompt_lengths: list[int] | None = None) -> Tokens:
    """Texts of distinct ids from 1 up."""
    return Tokens(
        ids=torch.arange(1, sum(lengths) + 1),
        lengths_N=torch.tensor(lengths),
        prompt_lengths_N=torch.tensor(prompt_lengths or [0] * len(lengths)),
    )


lengths_of_texts = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@given(lengths=lengths_of_texts, data=st.data())
def test_padding_is_restored_by_the_mask(lengths: list[int], data: st.DataObject) -> None:
    tokens = make_tokens(lengths, [length - 1 for length in lengths])
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    padded = pad(tokens, torch.tensor(rows), pad_id=-7)
    assert padded.ids_CT.shape == padded.mask_CT.shape == (len(rows), max(lengths[row] for row in rows))
    assert padded.mask_CT.dtype == torch.bool
    texts = rows_of(tokens)
    for place, row in enumerate(rows):
        assert padded.ids_CT[place][padded.mask_CT[place]].tolist() == texts[row]
        assert padded.mask_CT[place].tolist() == sorted(padded.mask_CT[place].tolist(), reverse=True)
        assert (padded.ids_CT[place][~padded.mask_CT[place]] == -7).all()
        assert padded.ids_CT[place][padded.without_prompt_CT()[place]].tolist() == texts[row][-1:]


@given(lengths=st.lists(st.integers(1, 9), max_size=30), chunk_size=st.integers(1, 12))
def test_chunks_hold_every_row_once_longest_first(lengths: list[int], chunk_size: int) -> None:
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    chunks = chunk_by_length(lengths_N, chunk_size)
    rows = [row for chunk in chunks for row in chunk.tolist()]
    assert rows == sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_size] * (len(chunks) - 1)
    assert all(1 <= len(chunk) <= chunk_size for chunk in chunks)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    chunk_tokens=st.integers(1, 600),
    context_size=st.integers(0, 9),
)
def test_chunks_by_tokens_are_full_and_never_too_full(lengths: list[int], chunk_tokens: int, context_size: int) -> None:
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    chunks = chunk_by_tokens(lengths_N, chunk_tokens, context_size=context_size)
    rows = [row for chunk in chunks for row in chunk.tolist()]
    assert rows == sorted(range(len(lengths)), key=lambda row: -lengths[row])

    for number, rows_C in enumerate(chunks):
        pieces = rows_C.split(split_tightly(lengths_N[rows_C]))
        computed = sum(len(piece) * (int(lengths_N[piece].max()) + context_size) for piece in pieces)
        assert computed == computed_tokens(lengths_N, [rows_C], context_size=context_size)
        assert computed <= chunk_tokens or len(rows_C) == 1
        if number + 1 < len(chunks):  # the next text had no room
            more_C = torch.cat([rows_C, chunks[number + 1][:1]])
            assert computed_tokens(lengths_N, [more_C], context_size=context_size) > chunk_tokens


def test_chunks_by_tokens_by_hand() -> None:
    lengths_N = torch.tensor([5, 9, 9])
    assert [rows.tolist() for rows in chunk_by_tokens(lengths_N, 24, context_size=3)] == [[1, 2], [0]]
    assert [rows.tolist() for rows in chunk_by_tokens(lengths_N, 36, context_size=3)] == [[1, 2, 0]]
    assert [rows.tolist() for rows in chunk_by_tokens(lengths_N, 27)] == [[1, 2, 0]]
    assert chunk_by_tokens(lengths_N[:0], 5) == []


def test_padding_ratio() -> None:
    lengths_N = torch.tensor([4, 1, 2, 1])
    assert padding_ratio(lengths_N, [torch.arange(4)]) == 16 / 8
    assert padding_ratio(lengths_N, chunk_by_length(lengths_N, 2)) == 10 / 8
    assert padding_ratio(lengths_N, chunk_by_length(lengths_N, 1)) == 1


@given(parts=st.lists(lengths_of_texts, min_size=1, max_size=3))
def test_concat_keeps_every_text(parts: list[list[int]]) -> None:
    tokens = [make_tokens(lengths, [length - 1 for length in lengths]) for lengths in parts]
    joined = concat(tokens)
    assert rows_of(joined) == [row for part in tokens for row in rows_of(part)]
    assert joined.prompt_lengths_N.tolist() == [length - 1 for lengths in parts for length in lengths]
    assert len(joined) == sum(map(len, tokens))


# batches


def text_batch(num_negatives: list[int] | None = None) -> TextBatch:
    size = 4
    equivalent_BB = np.zeros((size, size), dtype=bool)
    equivalent_BB[0, 1:3] = True
    positive_BB = np.zeros((size, size), dtype=bool)
    positive_BB[0, 2] = True
    return TextBatch(
        position=11,
        batch_id=5,
        domain="words",
        queries=WORDS[:size],
        documents=[f"{word} {word}" for word in WORDS[size : 2 * size]],
        query_prompts=["search_query: "] * size,
        document_prompts=["search_document: "] * (size - 1) + [""],
        negatives=None
        if num_negatives is None
        else [[f"no {slot} {i}" for i in range(number)] for slot, number in enumerate(num_negatives)],
        equivalent_BB=equivalent_BB,
        positive_BB=positive_BB,
    )


@pytest.mark.parametrize("num_negatives", [None, [0, 3, 1, 2]])
@pytest.mark.parametrize("hard_negatives", [0, 1, 2, 9])
def test_a_batch_is_its_texts_with_their_prompts(
    folders: Callable[[str], Path], num_negatives: list[int] | None, hard_negatives: int
) -> None:
    tokenizer = load_tokenizer(folders("wordpiece"), max_length_tokens=32, hard_negatives=hard_negatives)
    texts = text_batch(num_negatives)
    batch = tokenizer(texts)
    assert (batch.position, batch.batch_id, batch.domain) == (11, 5, "words")
    expected = [tokenizer.tokenize(texts.queries, texts.query_prompts)]
    expected.append(tokenizer.tokenize(texts.documents, texts.document_prompts))
    owners = [slot for slot, number in enumerate(num_negatives or []) for _ in range(min(number, hard_negatives))]
    assert batch.negative_owner_M.tolist() == owners
    assert batch.negative_owner_M.dtype == torch.int64
    if owners:
        assert texts.negatives is not None
        kept = [text for of_slot in texts.negatives for text in of_slot[:hard_negatives]]
        expected.append(tokenizer.tokenize(kept, [texts.document_prompts[slot] for slot in owners]))
    else:
        assert batch.negatives is None
    assert len(batch.sides) == len(expected)
    for found, wanted in zip(batch.sides, expected, strict=True):
        assert rows_of(found) == rows_of(wanted)
        assert found.prompt_lengths_N.tolist() == wanted.prompt_lengths_N.tolist()
    assert batch.num_tokens == sum(int(tokens.lengths_N.sum()) for tokens in expected)
    assert batch.equivalent_BB.tolist() == texts.equivalent_BB.tolist()
    assert batch.positive_BB is None and batch.num_positives == 4


def test_positive_slots_are_positives_only_if_they_are_asked_for(folders: Callable[[str], Path]) -> None:
    batch = load_tokenizer(folders("wordpiece"), max_length_tokens=32, same_answer=True)(text_batch())
    assert batch.positive_BB is not None and batch.positive_BB.argwhere().tolist() == [[0, 2]]
    assert batch.num_positives == 5


def tensors(batch: Batch) -> list[torch.Tensor]:
    assert batch.positive_BB is not None
    return [*(side.ids for side in batch.sides), batch.equivalent_BB, batch.positive_BB, batch.negative_owner_M]


def full_batch(folder: Path) -> Batch:
    """A batch with every tensor that there can be."""
    tokenizer = load_tokenizer(folder, max_length_tokens=32, hard_negatives=2, same_answer=True)
    return tokenizer(text_batch([1, 2, 0, 1]))


def test_a_batch_moves_and_its_lengths_stay(folders: Callable[[str], Path]) -> None:
    batch = full_batch(folders("wordpiece"))
    moved = batch.to("meta")
    assert len(tensors(moved)) == 6
    assert all(tensor.device.type == "meta" for tensor in tensors(moved))
    assert all(side.lengths_N.device.type == "cpu" for side in moved.sides)
    assert (moved.position, len(moved.queries), moved.num_tokens) == (11, 4, batch.num_tokens)
    bare = replace(batch, negatives=None, positive_BB=None).to("meta")
    assert bare.negatives is None and bare.positive_BB is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_batch_pads_on_the_gpu_as_on_the_cpu(folders: Callable[[str], Path]) -> None:
    batch = full_batch(folders("wordpiece"))
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors(pinned))
    moved = pinned.to("cuda", non_blocking=True)
    for side, of_gpu in zip(batch.sides, moved.sides, strict=True):
        for rows_C in chunk_by_length(side.lengths_N, 3):
            ours, theirs = pad(side, rows_C, 0), pad(of_gpu, rows_C, 0)
            assert theirs.ids_CT.is_cuda
            for name in ("ids_CT", "mask_CT", "prompt_lengths_C"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name).cpu())


def test_threads_may_share_a_tokenizer(folders: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(folders("wordpiece"), max_length_tokens=16)
    texts = [[" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(start, start + 50)] for start in range(8)]
    expected = [rows_of(tokenizer.tokenize(of_thread, f"{len(of_thread)}: ")) for of_thread in texts]
    found: dict[int, list[Any]] = {}

    def tokenize(number: int) -> None:
        found[number] = [rows_of(tokenizer.tokenize(texts[number], "50: ")) for _ in range(5)]

    threads = [threading.Thread(target=tokenize, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [rows] * 5 for number, rows in enumerate(expected)}


# loading


def test_a_tokenizer_beyond_the_vocabulary_of_the_backbone_is_refused(folders: Callable[[str], Path]) -> None:
    folder = folders("wordpiece")
    assert load_tokenizer(folder, max_length_tokens=8, vocab_size=VOCABULARY_SIZE).largest_id == VOCABULARY_SIZE - 1
    with pytest.raises(ConfigError, match=r"ids up to 30521, the backbone a vocabulary of 30521"):
        load_tokenizer(folder, max_length_tokens=8, vocab_size=VOCABULARY_SIZE - 1)


@pytest.mark.parametrize(("kind", "least"), [("wordpiece", 3), ("bytes with specials", 3), ("bytes", 1)])
def test_a_limit_that_leaves_no_room_is_refused(folders: Callable[[str], Path], kind: str, least: int) -> None:
    assert load_tokenizer(folders(kind), max_length_tokens=least).max_length_tokens == least
    with pytest.raises(ConfigError, match=rf"{least - 1} tokens leave no room .*give {least} or more"):
        load_tokenizer(folders(kind), max_length_tokens=least - 1)


def test_a_folder_without_a_whole_tokenizer_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    broken = shutil.copytree(folders("bytes"), tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    for folder in (tmp_path, tmp_path / "nowhere", broken):
        with pytest.raises(ConfigError, match=f"^{folder}: no tokenizer that transformers can load: ") as caught:
            load_tokenizer(folder, max_length_tokens=8)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="the package is installed")
def test_a_sentencepiece_model_alone_needs_its_package(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"not read")
    with pytest.raises(ConfigError, match=r"sentencepiece\.bpe\.model needs a package: pip install sentencepiece$"):
        load_tokenizer(tmp_path, max_length_tokens=8)


def test_no_text_gives_no_token(folders: Callable[[str], Path]) -> None:
    tokens = load_tokenizer(folders("wordpiece"), max_length_tokens=8).tokenize([], "query: ")
    assert len(tokens) == len(tokens.ids) == len(tokens.prompt_lengths_N) == 0


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(ValueError, match="object is not a fast tokenizer"):
        Tokenizer(object(), 8)


def test_pieces_hold_little_padding_and_every_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 15, 40, 500):
        lengths_N = torch.randint(1, 400, (size,), generator=generator)
        (rows_C,) = chunk_by_length(lengths_N, size)
        sizes = split_tightly(lengths_N[rows_C])
        assert sum(sizes) == size and all(piece >= 16 for piece in sizes[:-1]) and sizes[-1] >= 1
        pieces = list(torch.split(rows_C, sizes))
        assert padding_ratio(lengths_N, pieces) <= padding_ratio(lengths_N, [rows_C])
        if size == 500:
            assert padding_ratio(lengths_N, pieces) < 1.15 < padding_ratio(lengths_N, [rows_C])
    assert split_tightly(torch.tensor([10] * 50)) == [50]
    assert split_tightly(torch.tensor([10] * 16 + [8] * 5 + [7] * 20)) == [21, 20]
