"""views.html: the page of shards says what is in them, holds all it needs, and shows texts as texts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from hardbatch.pipeline.cli import main
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.pipeline.run import Plan
from hardbatch.pipeline.views import html
from hardbatch.pipeline.views.html import report_html

VOID = {"meta", "circle", "br"}
OPTIONAL = {"th", "td", "li"}  # whose end tags HTML lets one leave out


class Page(HTMLParser):
    """Counts tags, collects texts, and notices a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID | OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.found)


def test_the_page_says_what_is_in_the_shards(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], rows: Callable[..., list]
) -> None:
    broken = [{"query": None, "document": "x"}, {"query": "<script>alert(1)</script>", "document": "a & b"}]
    write_jsonl("one.jsonl", [*rows(70), *broken])
    write_jsonl("two.jsonl", rows(40, start=500))
    plan = run_corpus(
        'corpus = "two"\n[pack]\nbatch_size = 8\n[[dataset]]\nname = "one"\nsource = "one.jsonl"\nholdout = 0.1\n'
        '[[dataset]]\nname = "two"\nsource = "two.jsonl"\n'
    )
    text = report_html(plan.shards)
    page = Page(text)
    assert page.open == []
    assert page.count("h2") == 6 and page.count("svg") == 2 and page.count("details") == 6 + 2
    shown = " ".join(page.texts)
    parts = r"(\d+) in batches, (\d+) held out(?:, (\d+) left over \(.*?\))?, 1 quarantined \(1 null\)"
    counted = re.search(f"72 rows: {parts}", shown)
    assert counted is not None
    assert sum(int(number or 0) for number in counted.groups()) == 71
    assert "40 rows: 40 in batches" in shown
    assert page.count("li") > 2 and shown.count(" masked ") > page.count("circle")  # of each dot, and the list

    index = pl.read_parquet(plan.shards / "index.parquet")
    hardest = index.sort("hardness", "batch_id", descending=[True, False]).row(0, named=True)
    assert f"hardest: batch {hardest['batch_id']} of {hardest['domain']}, hardness {hardest['hardness']:.3f}" in shown

    # Nothing is loaded, and no text becomes a tag.
    assert page.count("script") == page.count("link") == page.count("img") == 0
    assert not re.search(r"(src|href)=|url\(|@import|https?://", text)


def test_texts_are_escaped(run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path]) -> None:
    evil = [{"query": f"<img src=x onerror=alert({i})>", "document": f"</td><script>{i}</script>"} for i in range(8)]
    write_jsonl("evil.jsonl", evil)
    plan = run_corpus('corpus = "c"\n[pack]\nbatch_size = 8\n[[dataset]]\nname = "n"\nsource = "evil.jsonl"\n')
    page = Page(report_html(plan.shards))
    assert page.count("img") == page.count("script") == 0
    assert any("<img src=x onerror=alert(3)>" in text for text in page.texts)


def test_negatives_are_counted_slot_by_slot(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of a corpus: in one, all pairs have the same document, so no query has a negative there."""
    rows = [{"query": f"the river number {i}", "document": "one answer"} for i in range(16)]
    rows += [{"query": f"winter market {i}", "document": f"silver engine {i * 7919}"} for i in range(16)]
    write_jsonl("half.jsonl", rows)
    text = 'corpus = "c"\n[pack]\nbatch_size = 16\ngroup_size = 16\n[[dataset]]\nname = "n"\nsource = "half.jsonl"\n'
    plan = run_corpus(text)
    page = report_html(plan.shards)
    slots = pl.read_parquet(plan.shards / "data" / "*.parquet")["equivalent_slots"].list.len()
    none, all_of_them = int((slots == 15).sum()), int((slots == 0).sum())
    assert f'title="0 to 0.9375: {none}"' in page and f'title="14.06 to 15: {all_of_them}"' in page

    monkeypatch.setattr(html, "_BATCHES_READ", 1)
    assert "Counted in 1 batches, evenly spaced." in report_html(plan.shards)


def test_shards_without_their_workspace_have_no_map(finished_run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(finished_run[2], tmp_path / "shards")
    page = Page(report_html(copy))
    assert page.count("svg") == 0 and page.count("h2") == 6
    assert any("the clusters are gone, or these shards were copied without them" in text for text in page.texts)
    (copy / "index.parquet").write_bytes(b"x")
    with pytest.raises(IntegrityError):
        report_html(copy)


def test_the_command(
    finished_run: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = finished_run[2]
    assert main(["report", str(shards)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == f"report-small-{shards.name}.html"
    assert path.read_text().startswith("<!doctype html>")
    assert main(["report", str(shards), "--output", str(tmp_path / "no" / "such" / "folder.html")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
