"""Gradients in chunks equal those of one graph; several ranks equal one that accumulates."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hardbatch.trainer import attention
from hardbatch.trainer.batch import Batch, Tokens
from hardbatch.trainer.gradcache import GradCache, StepConfig
from hardbatch.trainer.model import Encoder, EncoderConfig, new_backbone
from hardbatch.trainer.ranks import Ranks
from tests.models import VOCABULARY_SIZE
from tests.reliability import warm
from tests.trainer_models import CONTEXTUAL_TYPES, tiny_config

SIZE, CONTEXT_SIZE = 8, 6
BOUND = 1e-5  # of each tensor's norm
STEP = StepConfig(
    chunk_tokens=60,
    temperature=0.05,
    sequence_dropout=0.3,
    no_context_rate=0.0,
    seed=7,
)
WHOLE = replace(STEP, chunk_tokens=10_000)


WAYS = {  # of computing attention: the implementation, and the attention of the context
    "padded": ("sdpa", "full"),
    "packed": ("packed", "full"),
    "shared": ("packed", "shared"),
}


def make_encoder(model_type="bert", context_size=CONTEXT_SIZE, dropout=0.1, pool_prompt=True, way="padded"):
    implementation, context_attention = WAYS[way]
    config = tiny_config(model_type)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "mlp_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    first = new_backbone(config, implementation) if context_size else None
    encoder = Encoder(
        EncoderConfig(
            context_size=context_size,
            max_length_tokens=32,
            pool_prompt=pool_prompt,
            context_attention=context_attention,
        ),
        first,
        new_backbone(config, implementation),
    )
    if encoder.first_stage_model is not None:
        encoder.first_stage_model.initialise_head(encoder.second_stage_model.backbone.get_input_embeddings().weight)
    return encoder.train()


def make_tokens(num_texts, generator):
    lengths = torch.randint(3, 20, (num_texts,), generator=generator)
    ids = torch.randint(5, VOCABULARY_SIZE, (int(lengths.sum()),), generator=generator)
    return Tokens(ids=ids, lengths_N=lengths, prompt_lengths_N=torch.ones_like(lengths))


def make_batch(position, num_negatives=0, masked=True, same_answer=False):
    generator = torch.Generator().manual_seed(1000 + position)
    equivalent = (torch.rand(SIZE, SIZE, generator=generator) < 0.2) & masked
    equivalent.fill_diagonal_(False)
    positive = equivalent & (torch.arange(SIZE) % 2 == 0)
    assert not same_answer or positive.any()
    return Batch(
        position=position,
        batch_id=position,
        domain="random",
        queries=make_tokens(SIZE, generator),
        documents=make_tokens(SIZE, generator),
        negatives=make_tokens(num_negatives, generator) if num_negatives else None,
        negative_owner_M=torch.arange(num_negatives) % SIZE,
        equivalent_BB=equivalent,
        positive_BB=positive if same_answer else None,
    )


def gradients_of(encoder):
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


def worst_error(found, expected):
    """The largest error of a tensor relative to the norm of the expected one.

    The gradient of an attention's key bias is zero but for rounding (the softmax does not see it): tensors of less
    than a millionth of the whole gradient's norm are compared with that.
    """
    assert found.keys() == expected.keys()
    floor = 1e-6 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = [(found[name] - expected[name]).norm() / expected[name].norm().clamp(min=floor) for name in found]
    return max(float(error) for error in errors)


def one_graph(encoder, config, batch):
    """Loss and gradients of one graph over the chunks and draws of `config`."""
    whole = GradCache(encoder, config)
    plan = whole._plan(batch)
    assert len(plan.text_chunks) > 2 and (len(plan.context_chunks) > 1 or encoder.config.context_size == 0)
    loss = whole._loss(plan, whole._embed(plan, whole._embed_context(plan)))
    loss.value.backward()
    return loss.value.detach(), gradients_of(encoder)


@pytest.mark.parametrize(
    ("model_type", "context_size", "way"),
    [
        *((name, CONTEXT_SIZE, "padded") for name in CONTEXTUAL_TYPES),
        *((name, CONTEXT_SIZE, "shared") for name in CONTEXTUAL_TYPES),
        ("bert", CONTEXT_SIZE, "packed"),
        ("modernbert", CONTEXT_SIZE, "packed"),
        ("bert", 0, "padded"),
        ("bert", 0, "packed"),
        ("mpnet", 0, "padded"),
    ],
)
@pytest.mark.parametrize(
    ("num_negatives", "masked", "same_answer"), [(0, True, False), (5, True, True), (0, False, False)]
)
def test_cached_equals_one_graph_over_the_same_chunks_and_draws(
    model_type, context_size, way, num_negatives, masked, same_answer
):
    batch = make_batch(3, num_negatives, masked, same_answer)
    config = STEP if way == "padded" else replace(STEP, chunk_tokens=45)  # several chunks of context too
    expected_loss, expected = one_graph(make_encoder(model_type, context_size, way=way), config, batch)
    encoder = make_encoder(model_type, context_size, way=way)
    loss = GradCache(encoder, config).backward(batch)
    assert torch.equal(loss.value, expected_loss)
    assert worst_error(gradients_of(encoder), expected) < BOUND
    assert all(gradient.any() for name, gradient in expected.items() if "position" not in name)


@pytest.mark.parametrize("chunk_tokens", [1, 60, 100, 250, 600])
@pytest.mark.parametrize("pool_prompt", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_without_dropout_chunks_change_nothing(chunk_tokens, pool_prompt, way):
    batch = make_batch(4, num_negatives=3)
    whole, cached = (make_encoder(dropout=0.0, pool_prompt=pool_prompt, way=way) for _ in range(2))
    expected = GradCache(whole, WHOLE).backward(batch)
    found = GradCache(cached, replace(STEP, chunk_tokens=chunk_tokens)).backward(batch)
    assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-5)
    assert worst_error(gradients_of(cached), gradients_of(whole)) < 10 * BOUND  # other padding, other rounding


@pytest.mark.parametrize("pool_prompt", [True, False])
def test_packed_chunks_give_the_gradients_of_padded_pieces(pool_prompt):
    batch = make_batch(6, num_negatives=3)
    padded, packed = (make_encoder(dropout=0.0, pool_prompt=pool_prompt, way=way) for way in ("padded", "packed"))
    expected, found = (GradCache(encoder, STEP).backward(batch) for encoder in (padded, packed))
    assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-5)
    assert worst_error(gradients_of(packed), gradients_of(padded)) < 10 * BOUND


@pytest.mark.parametrize("same_answer", [False, True])
def test_an_independent_computation_of_the_whole_step(same_answer):
    """No dropout: stages called by hand on padded tensors, the loss in float64, agree with the step."""
    batch = make_batch(5, same_answer=same_answer)
    encoder = make_encoder(dropout=0.0)
    config = replace(STEP, sequence_dropout=0.0)
    loss = GradCache(encoder, config).backward(batch).value

    def padded(tokens, row):
        start = int(tokens.lengths_N[:row].sum())
        ids = tokens.ids[start : start + int(tokens.lengths_N[row])][None].long()
        return ids, torch.ones_like(ids), torch.ones_like(ids)

    documents = range(SIZE)
    with torch.no_grad():
        from hardbatch.trainer.draws import draw_context

        chosen = draw_context(SIZE, CONTEXT_SIZE, seed=STEP.seed, position=5)
        context = torch.cat([encoder.first_stage_model(*padded(batch.documents, int(row))) for row in chosen])
        sides = [
            torch.cat([encoder.second_stage_model(*padded(side, row), context) for row in documents])
            for side in (batch.queries, batch.documents)
        ]
    scores = sides[0].double() @ sides[1].double().T / STEP.temperature
    own = torch.eye(SIZE, dtype=torch.bool)
    positives = own | batch.positive_BB if same_answer else own
    against = scores.exp().masked_fill(batch.equivalent_BB | own, 0).sum(1, keepdim=True)
    losses = torch.where(positives, -torch.log(scores.exp() / (scores.exp() + against)), 0)
    assert loss.item() == pytest.approx((losses.sum(1) / positives.sum(1)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("config", [STEP, WHOLE])
@pytest.mark.parametrize(("model_type", "way"), [("bert", "packed"), ("roberta", "shared"), ("modernbert", "shared")])
def test_a_packed_step_never_waits_for_the_device(monkeypatch, model_type, way, config):
    """Tensors on `meta` have no data, so whatever asks the device for a number or mixes devices raises."""
    monkeypatch.setattr(attention, "_uses_flash", lambda _: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for meta
    encoder = make_encoder(model_type, dropout=0.0, way=way).to("meta")
    loss = GradCache(encoder, config).backward(make_batch(3, 3, same_answer=True))
    assert loss.value.is_meta
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_draws_depend_on_the_position_alone(way):
    losses = []
    for position in (3, 3, 4):
        encoder = make_encoder(way=way)
        torch.manual_seed(len(losses))  # whatever else drew numbers before
        losses.append(GradCache(encoder, STEP).backward(replace(make_batch(3), position=position)).value.item())
    assert losses[0] == losses[1] != losses[2]


def test_the_global_generator_is_left_as_it_was():
    encoder = make_encoder()
    state = torch.get_rng_state()
    GradCache(encoder, STEP).backward(make_batch(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_of_a_shared_context_are_dropped_for_a_whole_batch():
    """Whatever the chunks, so that texts of a batch keep one context."""
    kept = []
    for position in (3, 3, 4):
        for config in (STEP, WHOLE):
            plan = GradCache(make_encoder(way="shared"), config)._plan(replace(make_batch(3), position=position))
            assert plan.keep_NJ.shape == (1, CONTEXT_SIZE)
            kept.append(plan.keep_NJ.tolist())
    assert kept[0] == kept[1] == kept[2] != kept[4]
    assert not all(kept[0][0]) and any(kept[0][0])


@pytest.mark.parametrize("way", WAYS)
def test_no_context_rate_nulls_a_whole_batch(way):
    encoder = make_encoder(way=way)
    GradCache(encoder, replace(STEP, no_context_rate=1.0)).backward(make_batch(1))
    first = [parameter.grad for parameter in encoder.first_stage_model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in first)
    assert encoder.second_stage_model.null_context.grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_bf16_autocast_gives_every_weight_its_gradient(way):
    """A weight cast in the pass without a graph and cached by autocast would get none in the second pass."""
    batch = make_batch(2)
    exact, cast = (make_encoder(dropout=0.0, way=way) for _ in range(2))
    GradCache(exact, STEP).backward(batch)
    loss = GradCache(cast, replace(STEP, autocast=torch.bfloat16)).backward(batch)
    assert loss.value.dtype == torch.float32
    found, expected = gradients_of(cast), gradients_of(exact)
    for name, gradient in expected.items():
        if gradient.norm() > 1e-3:
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.9, name


# -- several ranks -----------------------------------------------------------------------------------------------------

ACCUMULATE, NUM_STEPS = 2, 12


def train_rank(rank, world_size, accumulate, config, batch_at=make_batch, way="padded"):
    """Yields (gradients, parameters) of one rank after each step; batches in the order of the stream."""
    encoder = make_encoder(way=way)
    ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))
    step = GradCache(encoder, config)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    position = 0
    while True:
        for number in range(accumulate):
            step.backward(batch_at(position + number * world_size + rank), scale=1 / accumulate)
        ranks.average_gradients(encoder)
        gradients = gradients_of(encoder)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        position += world_size * accumulate
        yield gradients, {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


def uneven_batch(position):
    """A batch of one pass or, every second time, of chunks; those have hard negatives and several positives.

    Ranks differ in what they do.
    """
    return make_batch(position, 12 * (position % 2), same_answer=bool(position % 2))


UNEVEN = replace(STEP, chunk_tokens=520)
CASES = {  # settings, batches that a rank accumulates, batches, and the attention if it is not padded
    "dropping": (STEP, ACCUMULATE, make_batch),
    "packed": (STEP, ACCUMULATE, make_batch, "packed"),
    "shared": (STEP, ACCUMULATE, make_batch, "shared"),
    "no mask": (STEP, ACCUMULATE, partial(make_batch, masked=False)),
    "one chunk": (WHOLE, ACCUMULATE, make_batch),
    "nothing dropped": (replace(STEP, sequence_dropout=0.0), ACCUMULATE, make_batch),
    "sometimes no context": (replace(STEP, no_context_rate=0.5, sequence_dropout=0.0), ACCUMULATE, make_batch),
    "uneven": (UNEVEN, 1, uneven_batch),
}


def test_a_batch_of_no_more_tokens_than_a_chunk_takes_one_pass():
    """Both stages are in memory at once then, so they count together."""
    encoder, batch = make_encoder(), make_batch(0)
    plan = GradCache(encoder, WHOLE)._plan(batch)
    chosen_M = batch.documents.lengths_N[plan.context_rows_M]
    texts_N = torch.cat([batch.queries.lengths_N, batch.documents.lengths_N])
    most = len(texts_N) * (int(texts_N.max()) + CONTEXT_SIZE) + len(chosen_M) * int(chosen_M.max())
    assert plan.num_tokens == most  # sixteen texts are one piece

    passes = []
    for chunk_tokens in (most, most - 1):
        calls = []
        handle = encoder.second_stage_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        GradCache(encoder, replace(STEP, chunk_tokens=chunk_tokens)).backward(batch)
        handle.remove()
        passes.append(len(calls))
    assert passes == [1, 2]


@pytest.mark.parametrize("way", ["packed", "shared"])
def test_a_packed_batch_counts_no_padding(way):
    batch = make_batch(0)
    plan = GradCache(make_encoder(way=way), STEP)._plan(batch)
    contexts = len(plan.text_chunks) if way == "shared" else 2 * SIZE
    in_context = int(batch.documents.lengths_N[plan.context_rows_M].sum())
    assert plan.num_tokens == batch.num_tokens + contexts * CONTEXT_SIZE + in_context
    for rows_C in plan.text_chunks:
        of_context = CONTEXT_SIZE * (1 if way == "shared" else len(rows_C))
        assert int(plan.texts.lengths_N[rows_C].sum()) + of_context <= STEP.chunk_tokens


def test_uneven_batches_are_uneven():
    step = GradCache(make_encoder(), UNEVEN)
    for position in range(15):
        assert (step._plan(uneven_batch(position)).num_tokens > UNEVEN.chunk_tokens) == bool(position % 2)


def rank_main(rank, world_size, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = {}
    for name, (config, accumulate, *rest) in CASES.items():
        steps = train_rank(rank, world_size, accumulate, config, *rest)
        gradients, parameters = next(steps)
        for _ in range((NUM_STEPS if name == "dropping" else 3) - 1):
            _, parameters = next(steps)
        results[name] = {"gradients": gradients, "digest": digest(parameters)}

    counted = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (counted.append(tensor.numel()), reduce(tensor))
    next(train_rank(rank, world_size, ACCUMULATE, STEP))
    results["reduced"] = sum(counted)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_equal_one_rank_that_accumulates(tmp_path):
    world_size = 3
    warm.run_ranks(rank_main, world_size, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for name, (config, accumulate, *rest) in CASES.items():
        alone, _ = next(train_rank(0, 1, accumulate * world_size, config, *rest))
        assert max(worst_error(of_rank[name]["gradients"], alone) for of_rank in found) < BOUND, name
        assert len({of_rank[name]["digest"] for of_rank in found}) == 1, name
    assert {of_rank["reduced"] for of_rank in found} == {sum(p.numel() for p in make_encoder().parameters())}
