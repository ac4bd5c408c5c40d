"""From manifest to shards: the same bytes again, and keys that change with what an artifact depends on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, read_artifact, verify_artifact
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.stages import embed
from tests import models
from tests.samples import WORDS

LEXICAL = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\nunit_rows = 16\n'


def make_texts(num_rows, seed):
    """Pairs about a few words, with repeated documents and queries."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        words = generator.choice(WORDS, 4)
        query = f"where is {words[0]} {words[1]} {i if i % 5 else ''}"
        rows.append({"query": query, "document": f"{words[0]} lies by {words[2]} and {words[3]} {i if i % 4 else ''}"})
    return rows


def datasets(*names):
    return "".join(f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\n' for name in names)


@pytest.fixture
def corpus(write_jsonl, write_manifest):
    """The manifest of two domains; `corpus.toml` beside their sources."""
    write_jsonl("alpha.jsonl", make_texts(70, 0))
    write_jsonl("beta.jsonl", make_texts(44, 1))
    text = 'corpus = "two"\n' + datasets("alpha", "beta") + "[pack]\nbatch_size = 8\n[write]\nbatches_per_part = 3\n"
    return write_manifest(text + LEXICAL)


def test_the_home_folder_stands_for_a_tilde_and_links_are_followed_on_demand(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plan = plan_corpus(Path("~") / corpus.name, Path("~/ws"), data_root=Path("~"))
    assert plan.corpus == tmp_path / "ws" / "two" and not Path("~").exists()

    (tmp_path / "links").mkdir()
    for name in ("alpha.jsonl", "beta.jsonl"):
        (tmp_path / "links" / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigError, match="--follow-links"):
        plan_corpus(corpus, tmp_path / "ws", data_root=tmp_path / "links")
    followed = plan_corpus(corpus, tmp_path / "ws", data_root=tmp_path / "links", follow_links=True)
    assert followed.shards == plan.shards  # the same names and bytes


@pytest.mark.parametrize("setting", ["limit = 5", "sample = 9", "where = \"query > 'w'\"", 'encoding = "latin-1"'])
def test_how_a_dataset_is_read_is_part_of_its_key(corpus, tmp_path, setting):
    plan = plan_corpus(corpus, tmp_path / "ws")
    corpus.write_text(corpus.read_text().replace('name = "beta"', f'name = "beta"\n{setting}'))
    changed = plan_corpus(corpus, tmp_path / "ws")
    keys = [{step.domain: step.key for step in found.steps if step.stage == "pairs"} for found in (plan, changed)]
    assert keys[0]["alpha"] == keys[1]["alpha"] and keys[0]["beta"] != keys[1]["beta"]


def test_a_condition_that_is_none_is_refused_before_anything_is_read(corpus, tmp_path):
    corpus.write_text(corpus.read_text().replace('name = "beta"', 'name = "beta"\nwhere = "label ="'))
    with pytest.raises(ConfigError, match="'label =' is not a SQL condition"):
        plan_corpus(corpus, tmp_path / "ws")


def run(manifest, workspace, overrides=()):
    """(plan, names of the steps that were not a look-up)."""
    plan = plan_corpus(manifest, workspace, overrides=overrides)
    return plan, [f"{step.stage}/{step.domain}" for step in plan.steps if run_step(step)]


def tree(root):
    """{path: bytes} of all files below `root` but run logs, which tell times."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def assert_same_trees(left, right):
    left, right = tree(left), tree(right)
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []


STAGES = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches")
EVERYTHING = [
    *("pairs/alpha", "pairs/beta"),  # all domains are read first
    *(f"{stage}/{domain}" for domain in ("alpha", "beta") for stage in STAGES if stage != "pairs"),
    "shards/two",
]


def test_two_workspaces_get_the_same_bytes(corpus, tmp_path):
    plans = [run(corpus, tmp_path / name) for name in ("one", "two")]
    assert plans[0][1] == plans[1][1] == EVERYTHING
    assert_same_trees(tmp_path / "one", tmp_path / "two")
    assert len(tree(tmp_path / "one")) > 30
    assert all(verify_artifact(path) == [] for path in iter_artifact_paths(tmp_path / "one"))


def test_a_copy_of_the_corpus_elsewhere_gets_the_same_bytes(corpus, tmp_path):
    first, _ = run(corpus, tmp_path / "one")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (corpus, *tmp_path.glob("*.jsonl")):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    run(elsewhere / corpus.name, tmp_path / "two")
    assert_same_trees(tmp_path / "one" / "two", tmp_path / "two" / "two")
    assert not any(str(tmp_path).encode() in data for data in tree(tmp_path / "one" / "two").values())
    assert first.shards.is_dir()


def test_models_in_two_places_give_the_same_bytes(corpus, tmp_path):
    import shutil

    models.require_minilm()
    found = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        if found:
            shutil.copytree(tmp_path / "here" / "tiny-gtr", tmp_path / place / "tiny-gtr")
        else:
            models.save_gtr(tmp_path / place / "tiny-gtr")
        run(corpus, tmp_path / f"ws-{place}", [f"embed.model={tmp_path / place / 'tiny-gtr'}"])
        found.append(tmp_path / f"ws-{place}" / "two")
    assert_same_trees(*found)


def test_threads_change_nothing(corpus, tmp_path, write_jsonl):
    import torch

    models.require_minilm()
    write_jsonl("alpha.jsonl", make_texts(30, 0))
    write_jsonl("beta.jsonl", make_texts(9, 1))
    models.save_gtr(tmp_path / "tiny-gtr")
    overrides = ["embed.model=tiny-gtr", "embed.surrogate_model=minilm", "embed.dtype=float32", "embed.device=cpu"]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run(corpus, tmp_path / f"threads-{threads}", overrides)
    finally:
        torch.set_num_threads(before)
    assert_same_trees(tmp_path / "threads-1", tmp_path / "threads-2")


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("pack.seed=1", {"batches", "shards"}),
        ("pack.exact_tour_below=1", {"batches", "shards"}),
        ("pack.group_size=4", {"clusters", "batches", "shards"}),
        ("pack.group_size=1", {"batches", "shards"}),
        ("pack.group_size=8", set()),  # the default, which is batch_size
        ("pack.refine_rounds=0", {"batches", "shards"}),
        ("pack.refine_tolerance=0.1", {"batches", "shards"}),
        ("pack.num_packings=2", {"batches", "shards"}),
        ("answers.near_copies=false", {"answers", "consistency", "batches", "shards"}),
        ("cluster.seed=1", {"clusters", "batches", "shards"}),
        ("cluster.balance=0.0", {"clusters", "batches", "shards"}),
        ("cluster.tolerance=0.1", {"clusters", "batches", "shards"}),
        ("cluster.iterations=10", set()),  # the default
        ("hardness.seed=1", {"hardness", "shards"}),
        ("consistency.seed=1", {"consistency", "shards"}),
        ("pack.weak_pair_rank=3", {"batches", "shards"}),
        ("write.margin=0.1", {"shards"}),
        ("write.batches_per_part=5", {"shards"}),
        ("embed.query_prompt=ask", {"vectors", "clusters", "hardness", "batches", "shards"}),
        ("embed.surrogate_query_prompt=ask", {"vectors", "consistency", "batches", "shards"}),
        ("cluster.restarts=9", set()),  # of the other method
        ("ingest.max_quarantined_fraction=0.5", set()),
    ],
)
def test_a_setting_makes_anew_only_what_depends_on_it(corpus, tmp_path, override, stages):
    text = corpus.read_text()
    corpus.write_text(text.replace('"beta"', '"alpha2"').replace("beta.jsonl", "alpha.jsonl"))
    plan = plan_corpus(corpus, tmp_path / "ws")
    changed = plan_corpus(corpus, tmp_path / "ws", overrides=[override])
    before = {step.path for step in plan.steps}
    assert {step.stage for step in changed.steps if step.path not in before} == stages


@pytest.mark.parametrize("override", ["tolerance=0.5", "balance=0.5", "two_level_above=7"])
def test_settings_of_folded_change_nothing_of_doubled(corpus, tmp_path, override):
    pytest.importorskip("faiss", reason="doubled needs FAISS: pip install 'hardbatch[cpu]'")
    doubled = ["cluster.method=doubled"]
    plans = [
        plan_corpus(corpus, tmp_path / "ws", overrides=each) for each in (doubled, [*doubled, "cluster." + override])
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("remainder", ["drop", "mix"])
def test_the_order_of_the_datasets_enters_the_key_of_the_shards(corpus, tmp_path, remainder):
    text = corpus.read_text()
    found = []
    for names in (("alpha", "beta"), ("beta", "alpha")):
        corpus.write_text(text.replace(datasets("alpha", "beta"), datasets(*names)))
        plan, _ = run(corpus, tmp_path / "ws", [f"pack.remainder={remainder}"])
        index = pl.read_parquet(plan.shards / "index.parquet").sort("batch_id")
        order = index["domain"].unique(maintain_order=True).to_list()
        assert order == [*names, *(["mixed"] if remainder == "mix" else [])]
        found.append((plan, index))
        fresh, _ = run(corpus, tmp_path / f"fresh-{names[0]}", [f"pack.remainder={remainder}"])
        assert tree(fresh.shards) == tree(plan.shards)  # what came before in the workspace does not matter
    assert found[0][0].shards != found[1][0].shards
    others = [{s.path for s in plan.steps if s.stage != "shards" and s.domain != "mixed"} for plan, _ in found]
    assert others[0] == others[1]


# The key of the shards changes with the key of any step before them.
CPU_SHARDS_KEYS = {"lexical": "60ce32a014052465", "minilm": "14ca2f9fdbee0f97"}


@pytest.mark.parametrize("model", sorted(CPU_SHARDS_KEYS))
def test_keys_of_a_run_on_the_cpu_are_those_of_earlier_versions(corpus, tmp_path, monkeypatch, model):
    """A workspace of an earlier version is reused whole, unless somebody raises a stage's version."""
    if model == "minilm":
        models.require_minilm()
    monkeypatch.setattr("hardbatch.pipeline.models.resolve.importlib.metadata.version", lambda package: "1.0")
    monkeypatch.setattr("hardbatch.pipeline.models.resolve._digest_of_model", lambda location, digests: "0" * 16)

    names = [f"embed.model={model}", f"embed.surrogate_model={model}"]
    settings = ["embed.device=cpu", "embed.dtype=float32", "pack.remainder=mix"]
    plan = plan_corpus(corpus, tmp_path / "ws", overrides=[*names, *settings])
    assert plan.shards.name == CPU_SHARDS_KEYS[model]


@pytest.fixture
def cuda(monkeypatch):
    """A machine on which torch reports CUDA devices; nothing can run on them."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_the_number_of_a_gpu_is_in_no_key(corpus, tmp_path, cuda):
    models.require_minilm()
    plans = {}
    for device in ("auto", "cuda", "cuda:0", "cuda:1"):
        overrides = ["embed.model=minilm", "embed.surrogate_model=minilm", f"embed.device={device}"]
        plans[device] = plan_corpus(corpus, tmp_path / "ws", overrides=overrides).steps

    keys = {device: [step.key for step in steps] for device, steps in plans.items()}
    assert keys["auto"] == keys["cuda"] == keys["cuda:0"] == keys["cuda:1"]
    for device, runs_on in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        of_stages = {step.stage: step for step in plans[device]}
        for stage in ("vectors", "clusters", "batches"):
            assert of_stages[stage].config["device"] == "cuda"
            assert of_stages[stage].runtime["device"] == runs_on

    on_cpu = ["embed.model=minilm", "embed.surrogate_model=minilm", "embed.device=cpu"]
    from_texts = ("pairs", "answers")
    steps = plan_corpus(corpus, tmp_path / "ws", overrides=on_cpu).steps
    cpu_keys = {step.key for step in steps if step.stage not in from_texts}
    assert not cpu_keys & {step.key for step in plans["cuda"] if step.stage not in from_texts}


def test_stages_run_on_the_gpu_that_was_asked_for(corpus, tmp_path, cuda, monkeypatch):
    """The number reaches the encoder, K-Means and refinement, whose real work is done on the CPU here."""
    models.require_minilm()
    from hardbatch.pipeline.batching import pack
    from hardbatch.pipeline.stages import cluster

    devices = []
    original_open, original_kmeans, original_refine = embed.open_encoder, cluster.kmeans, pack.refine

    def open_encoder(spec, corpus=()):
        if spec.name == "minilm":
            devices.append(("vectors", spec.runs_on))
        return original_open(replace(spec, runs_on="cpu"), corpus)

    def kmeans(*arguments, device, **options):
        devices.append(("clusters", device))
        return original_kmeans(*arguments, device="cpu", **options)

    def refine(*arguments, device, **options):
        devices.append(("batches", device))
        return original_refine(*arguments, device="cpu", **options)

    monkeypatch.setattr(embed, "open_encoder", open_encoder)
    monkeypatch.setattr(cluster, "kmeans", kmeans)
    monkeypatch.setattr(pack, "refine", refine)
    run(corpus, tmp_path / "ws", ["embed.model=minilm", "embed.dtype=float32", "embed.device=cuda:1"])
    assert set(devices) == {(stage, "cuda:1") for stage in ("vectors", "clusters", "batches")}


def test_planning_writes_no_artifact(corpus, tmp_path):
    plan = plan_corpus(corpus, tmp_path / "ws")
    assert [f"{step.stage}/{step.domain}" for step in plan.steps] == EVERYTHING
    assert [path.name for path in (tmp_path / "ws").rglob("*")] == [".digests.json"]
    made = set()
    for step in plan.steps:
        assert set(step.inputs.values()) <= made  # inputs come before what needs them
        made.add(step.path)


def test_what_cannot_be_planned(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"--data-root .*: no such folder"):
        plan_corpus(corpus, tmp_path / "ws", data_root=tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"--workspace .*choose another folder"):
        plan_corpus(corpus, tmp_path / "file" / "ws")
    with pytest.raises(ConfigError, match="unknown model '/nowhere'"):
        plan_corpus(corpus, tmp_path / "ws", overrides=["embed.model=/nowhere"])


def test_a_domain_without_any_vector(corpus, tmp_path, write_jsonl):
    write_jsonl("beta.jsonl", [{"query": f"{'?' * (i + 1)}", "document": f"{'!' * (i + 1)}"} for i in range(20)])
    plan, _ = run(corpus, tmp_path / "ws")
    counts = read_artifact(plan.shards).manifest.counts["domains"]
    assert counts["beta"]["batches"] == 0
    assert counts["beta"]["leftover"] == {"invalid_vector": 20}
    assert counts["alpha"]["batches"] == 8


def test_packing_beats_shuffling_on_real_pairs(tmp_path, write_manifest, monkeypatch):
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/medical.parquet")
    models.require_minilm()
    from hardbatch.pipeline.artifacts.vectors import load_pairs, open_vectors
    from hardbatch.pipeline.batching.hardness import Bounds, measure_batch

    rows = pl.read_parquet(Path(os.environ["HARDBATCH_DATA"]) / "train" / "medical.parquet").head(600)
    (tmp_path / "medical.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows.select("query", "document").iter_rows(named=True))
    )
    manifest = write_manifest(
        'corpus = "real"\n' + datasets("medical") + "[pack]\nbatch_size = 16\n[embed]\nmax_length_tokens = 64\n"
    )
    plan, _ = run(manifest, tmp_path / "ws")
    figures = read_artifact(plan.shards).manifest.counts["domains"]["medical"]
    steps = {step.stage: step for step in plan.steps}
    pairs = load_pairs(read_artifact(steps["pairs"].path))
    vectors = open_vectors(steps["vectors"].path)
    bounds = Bounds(random=figures["hardness_random"], knn=figures["hardness_knn"])
    shuffled = []
    for batch in np.random.default_rng(0).permutation(len(pairs))[: len(pairs) // 16 * 16].reshape(-1, 16):
        sides = vectors.queries.take(pairs.query_row[batch]), vectors.documents.take(pairs.document_row[batch])
        shuffled.append(bounds.share(measure_batch(*sides, np.zeros((16, 16), dtype=bool), *sides).hardness))
    assert abs(np.mean(shuffled)) < 0.05
    assert figures["share"] > np.mean(shuffled) + 0.3
