"""Measure on one GPU what runs, how fast, and whether it agrees with the CPU, in about eight minutes.

    python benchmarks/gpu.py --shards DIR --json FILE [--only PART,PART] [--seconds 480] [--toy]

DIR has shards with batches of 512 real pairs. Each part runs in a process of its own under its own time limit, so a
failure costs that part alone, and what the part measured before it is kept. `--toy` runs every part at toy size on
any device. The model has the shape of NomicBERT (137M), or of a toy, and random weights: speed and agreement do not
depend on the weights, and nothing is downloaded.

device      versions, and the peaks that other figures are compared with: products, copies
sdpa        what cuDNN's attention costs at new shapes, and whether its gradients are finite
attention   packed attention on flash kernels against float32, and its speed
gradcache   loss and gradients of a chunked step on CUDA against the CPU, three backbones
clustering  labels, K-Means and refined batches on CUDA against the CPU
padded      the training step on padded texts, with cuDNN's attention off and on
packed      the training step on packed rows: full and shared context, eager and compiled
chunks      speed and memory of the compiled step with shared context, by tokens of a chunk
trainer     trainer/main.py interrupted and resumed, and its export loaded by sentence-transformers
embed       the embed stage against `SentenceTransformer.encode`
kmeans      assignment of a million points, as the pipeline does it and with the points resident on the device
masks       masks and hardness, as the pipeline does it and as batched products on the device
syncs       lines that make the CPU wait for the GPU in one training step and one unit of embedding
nccl        NCCL beside a gloo group
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before a fork

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Note = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of a run, and the folders that it reads and writes."""

    shards: Path
    work: Path
    collection: Path | None
    toy: bool

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def size(self, real: int, toy: int) -> int:
        """Return the size to use: `real`, or `toy` under --toy."""
        return toy if self.toy else real

    @property
    def context_size(self) -> int:
        return self.size(512, 8)

    @property
    def max_length(self) -> int:
        return self.size(512, 32)


# ---------------------------------------------------------------------------------------------------------------- parts


def measure_device(setting: Setting, note: Note) -> None:
    import pyarrow
    import sentence_transformers
    import transformers

    note("torch", torch.__version__)
    note("transformers", transformers.__version__)
    note("sentence_transformers", sentence_transformers.__version__)
    note("pyarrow", pyarrow.__version__)
    note("cudnn", torch.backends.cudnn.version())
    note("device", device_name(setting))
    side = setting.size(8_192, 256)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
        note(f"product_{name}_tflops", 2 * side**3 / median_seconds(lambda a=a, b=b: a @ b, setting) / 1e12)
    values = torch.randn(setting.size(2**30, 2**20), device=setting.device, dtype=torch.float16)
    copied = torch.empty_like(values)
    note("copy_tb_per_s", 4 * len(values) / median_seconds(lambda: copied.copy_(values), setting) / 1e12)
    host = torch.empty(setting.size(2**28, 2**16), dtype=torch.float32)
    pinned = host.pin_memory() if setting.device == "cuda" else host
    for name, source in (("pageable", host), ("pinned", pinned)):
        taken = median_seconds(lambda source=source: source.to(setting.device, non_blocking=True), setting, rounds=3)
        note(f"host_to_device_{name}_gb_per_s", 4 * len(host) / taken / 1e9)


def measure_sdpa(setting: Setting, note: Note) -> None:
    def attention(num_texts: int, length: int, *, gradient: bool) -> Callable[[], None]:
        shape = (num_texts, 12, length, 64)
        qkv = [
            torch.randn(shape, device=setting.device, dtype=torch.bfloat16, requires_grad=gradient) for _ in range(3)
        ]
        mask = torch.ones(num_texts, 1, length, length, dtype=torch.bool, device=setting.device)
        mask[0, :, :, -1] = False

        def once() -> None:
            with torch.set_grad_enabled(gradient):
                out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
            if gradient:
                out.sum().backward()

        return once

    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for gradient in (False, True):
            new, again = [], []
            for number in range(setting.size(8, 2)):
                once = attention(17 + number, setting.size(200, 20) + 8 * number, gradient=gradient)
                new.append(seconds_of(once, setting))
                again.append(seconds_of(once, setting))
            label = f"cudnn_{'on' if cudnn else 'off'}_{'gradient' if gradient else 'forward'}"
            note(f"{label}_new_shape_ms", 1e3 * float(np.median(new)))
            note(f"{label}_same_shape_ms", 1e3 * float(np.median(again)))

    # cuDNN's backward pass gave NaN for a row whose scores are all far below zero, at a length of 64 modulo 128.
    torch.manual_seed(0)
    length, width = setting.size(704, 64), 64
    q = torch.randn(1, 1, length, width, device=setting.device, dtype=torch.bfloat16) * 0.1
    k, v = torch.randn_like(q) * 0.1, torch.randn_like(q)
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(width)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=setting.device)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        query = q.clone().requires_grad_()
        F.scaled_dot_product_attention(query, k, v, attn_mask=mask).sum().backward()
        assert query.grad is not None
        note(f"cudnn_{'on' if cudnn else 'off'}_nonfinite_gradients", int((~query.grad.isfinite()).sum()))


def measure_attention(setting: Setting, note: Note) -> None:
    from hardbatch.trainer import attention

    size, num_texts = setting.size(512, 8), setting.size(24, 4)
    torch.manual_seed(0)
    lengths = torch.randint(3, setting.max_length + 1, (num_texts,))
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    states = torch.randn(4, size + int(bounds[-1]), 12, 64)

    def run(device: str, dtype: torch.dtype, null_weight: int, window: int) -> list[Tensor]:
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in states[:3])
        out, _ = attention.packed_attention(
            torch.nn.Identity(),
            *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)),
            None,
            bounds=bounds.to(device),
            longest=int(lengths.max()),
            num_context=size,
            null_weight=null_weight,
            sliding_window=window,
        )
        out[0].backward(states[3].to(device, dtype))
        return [tensor.detach().double().cpu() for tensor in (out[0], q.grad, k.grad, v.grad)]

    for name, null_weight, window in (("plain", 0, None), ("null", 100, None), ("window", 0, 65)):
        expected = run("cpu", torch.float32, null_weight, window)
        found = run(setting.device, torch.bfloat16 if setting.device == "cuda" else torch.float32, null_weight, window)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        note(f"{name}_relative_error", dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)))
    if setting.device != "cuda":
        return

    num_tokens, length = 100_000, 200
    bounds = torch.arange(num_tokens // length + 1, device="cuda", dtype=torch.int32) * length
    q, k, v = (
        torch.randn(num_tokens + size, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    work = 4 * 12 * 64 * ((num_tokens + size) * size + num_tokens * length)
    eager_merge, splits = attention._merge, attention._CONTEXT_SPLITS
    for merge, merge_name in ((eager_merge, "eager"), (torch.compile(eager_merge, dynamic=True), "compiled")):
        attention._merge = merge
        for attention._CONTEXT_SPLITS in (1, 4, 8, 16):
            if merge_name == "eager" and splits != attention._CONTEXT_SPLITS:
                continue

            def forward() -> Tensor:
                return torch.ops.hardbatch.attention(q, k, v, bounds, length, size, 0, 0.125, -1)[0]

            def both() -> None:
                forward().backward(q.detach())

            label = f"merge_{merge_name}_splits_{attention._CONTEXT_SPLITS}"
            taken = median_seconds(forward, setting), median_seconds(both, setting)
            note(f"{label}_ms", {"forward": 1e3 * taken[0], "both": 1e3 * taken[1]})
            note(f"{label}_tflops", {"forward": work / taken[0] / 1e12, "both": 3.5 * work / taken[1] / 1e12})
    attention._merge, attention._CONTEXT_SPLITS = eager_merge, splits


def measure_gradcache(setting: Setting, note: Note) -> None:
    for model_type in ("bert", "nomic_bert", "modernbert"):
        results = []
        for device in ("cpu", setting.device):
            training = start_training(
                setting,
                f"gradcache-{model_type}-{device}",
                *("--device", device, "--precision", "fp32", "--context-size", "16", "--max-length", "32"),
                *("--chunk-tokens", "2048"),
                backbone=backbone_folder(setting, model_type, toy=True),
            )
            batch = first_batches(training, 1)[0]
            loss = training.gradients().backward(batch)
            gradients = [p.grad.double().cpu() for p in training.encoder.parameters() if p.grad is not None]
            results.append((float(loss.value), torch.cat([gradient.flatten() for gradient in gradients])))
        (loss_a, gradient_a), (loss_b, gradient_b) = results
        note(f"{model_type}_loss_difference", abs(loss_a - loss_b))
        note(f"{model_type}_gradient_relative_error", float((gradient_a - gradient_b).norm() / gradient_a.norm()))


def measure_clustering(setting: Setting, note: Note) -> None:
    from hardbatch.pipeline.batching.kmeans import kmeans
    from hardbatch.pipeline.batching.nearest import Nearest
    from hardbatch.pipeline.batching.points import InMemory
    from hardbatch.pipeline.batching.refine import refine

    generator = np.random.default_rng(0)
    n, k, dimension = setting.size(40_000, 2_000), setting.size(640, 32), setting.size(384, 32)
    centres = generator.standard_normal((k, dimension), dtype=np.float32)
    points = centres[generator.integers(0, k, n)] + generator.standard_normal((n, dimension), dtype=np.float32)
    points *= 2 / np.linalg.norm(points, axis=1, keepdims=True)

    labels = [Nearest(points[:k].copy(), device=device)(points) for device in ("cpu", setting.device)]
    note("nearest_different_labels", int((labels[0] != labels[1]).sum()))
    found = [
        kmeans(InMemory(points), k, iterations=8, tolerance=0.0, balance=0.02, seed=0, device=device)
        for device in ("cpu", setting.device)
    ]
    note("kmeans_different_labels", int((found[0].labels != found[1].labels).sum()))
    note("kmeans_objective_ratio", found[1].objective[-1] / found[0].objective[-1])

    batch_size = setting.size(64, 16)
    batches = generator.permutation(n // batch_size * batch_size).reshape(-1, batch_size)
    vectors = torch.from_numpy(points)[torch.from_numpy(batches.flatten())]
    refined = [
        refine(vectors.clone(), batches, rounds=6, tolerance=0.0, device=device) for device in ("cpu", setting.device)
    ]
    note("refine_different_places", int((refined[0].batches != refined[1].batches).sum()))
    note("refine_objective_ratio", refined[1].objective[-1] / refined[0].objective[-1])


def measure_padded(setting: Setting, note: Note) -> None:
    training = start_training(setting, "padded", "--precision", "bf16" if setting.device == "cuda" else "fp32")
    note("chunk_tokens", training.chunk_tokens)
    batches = first_batches(training, setting.size(5, 2))
    peak = device_peaks(setting)
    gradients = training.gradients()
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        steps = []
        for batch in batches[: len(batches) if not cudnn else 2]:
            steps.append(seconds_of(lambda batch=batch: one_step(training, gradients, batch), setting))
            note(f"cudnn_{'on' if cudnn else 'off'}_step_s", steps)
        taken = float(np.median(steps[1:]))
        flops = float(np.mean([flops_of(setting, training.encoder, batch) for batch in batches[1:]]))
        label = f"cudnn_{'on' if cudnn else 'off'}"
        note(f"{label}_pairs_per_s", len(batches[0].queries) / taken)
        note(f"{label}_model_flop_utilisation", flops / taken / peak if peak else None)
        note(f"{label}_peak_gib", peak_gib(setting))


class PackedTraining:
    """A training whose encoder begins on padded texts, and changes to packed rows with a full or a shared context."""

    def __init__(self, setting: Setting, note: Note, *, num_batches: int) -> None:
        self.setting, self._note = setting, note
        self.half = setting.device == "cuda"
        precision = "bf16" if self.half else "fp32"
        self.training = start_training(
            setting, "packed", *("--sequence-dropout", "0", "--precision", precision, "--chunk-tokens", "98304")
        )
        self.encoder = self.training.encoder
        self.batches = [batch.to(setting.device) for batch in first_batches(self.training, num_batches)]
        self.stages = [self.encoder.first_stage_model, self.encoder.second_stage_model]
        note("pairs", len(self.batches[0].queries))
        note("text_tokens", [batch.num_tokens for batch in self.batches])

    def pack(self) -> None:
        """Change both stages from padded texts to packed rows."""
        from hardbatch.trainer import attention

        for stage in self.stages:
            stage.backbone.set_attn_implementation(attention.PACKED)
        self._optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=2e-5, fused=self.half)

    def compile(self) -> None:
        """Compile the layers, which share their graphs, and the merge of the two parts of attention."""
        from hardbatch.trainer import attention

        attention._merge = torch.compile(attention._merge, dynamic=True)
        for stage in self.stages:
            for layer in layers_of(stage.backbone):
                layer.compile(dynamic=True, fullgraph=True)

    def step(self, *, shared: bool, chunk_tokens: int) -> Any:
        """Return the trainer's step with that context and that chunk size."""
        context_attention = "shared" if shared else "full"
        self.encoder.config = replace(self.encoder.config, context_attention=context_attention)
        self.encoder.second_stage_model.context_attention = context_attention
        self.training.chunk_tokens = chunk_tokens
        return self.training.gradients()

    def measure(self, label: str, *, shared: bool, chunk_tokens: int, num_steps: int) -> None:
        """Note seconds, pairs per second, utilisation and memory of whole steps, of which the first one warms up."""
        steps: list[float] = []
        if self.half:
            torch.cuda.reset_peak_memory_stats()
        packed = self.step(shared=shared, chunk_tokens=chunk_tokens)

        def once(batch: Any) -> None:
            packed.backward(batch)
            torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

        try:
            for batch in self.batches[:num_steps]:
                steps.append(seconds_of(lambda batch=batch: once(batch), self.setting))
                self._note(f"{label}_step_s", steps)
        except torch.OutOfMemoryError as error:
            self._note(f"{label}_error", str(error).splitlines()[0])
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return
        timed = self.batches[1:num_steps]
        taken = sum(steps[1:])
        peak = device_peaks(self.setting)
        flops = sum(flops_of(self.setting, self.encoder, batch) for batch in timed)
        self._note(f"{label}_pairs_per_s", sum(len(batch.queries) for batch in timed) / taken)
        self._note(f"{label}_tokens_per_s", sum(batch.num_tokens for batch in timed) / taken)
        self._note(f"{label}_model_flop_utilisation", flops / taken / peak if peak else None)
        self._note(f"{label}_peak_gib", peak_gib(self.setting))


def measure_packed(setting: Setting, note: Note) -> None:
    run = PackedTraining(setting, note, num_batches=setting.size(6, 2))
    chunk, whole = setting.size(49_152, 8_192), 10**9
    batch = run.batches[0]

    run.training.gradients().backward(batch)
    padded = take_gradients(run.encoder)
    run.pack()
    run.step(shared=False, chunk_tokens=chunk).backward(batch)
    note("full_packed_to_padded_gradient_cosine", cosine_of_gradients(padded, take_gradients(run.encoder)))
    del padded

    run.measure("eager_full", shared=False, chunk_tokens=chunk, num_steps=setting.size(3, 2))
    run.measure("eager_shared", shared=True, chunk_tokens=chunk, num_steps=setting.size(4, 2))
    if run.half:
        profile(note, "eager_shared", run, chunk)
        run.compile()
        run.measure("compiled_shared", shared=True, chunk_tokens=chunk, num_steps=6)
        note("compiled_graphs", dict(torch._dynamo.utils.counters["stats"]))
        note("compiled_breaks", dict(torch._dynamo.utils.counters["graph_break"]))
        profile(note, "compiled_shared", run, chunk)
        run.measure("compiled_shared_one_pass", shared=True, chunk_tokens=whole, num_steps=4)
        run.measure("compiled_full", shared=False, chunk_tokens=chunk, num_steps=3)
        note("compiled_graphs_at_the_end", dict(torch._dynamo.utils.counters["stats"]))
    for stage in run.stages:
        stage.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    run.measure("checkpointed_shared_one_pass", shared=True, chunk_tokens=whole, num_steps=setting.size(4, 2))


def measure_chunks(setting: Setting, note: Note) -> None:
    run = PackedTraining(setting, note, num_batches=setting.size(5, 2))
    run.pack()
    if run.half:
        run.compile()
        run.measure("warming_up", shared=True, chunk_tokens=24_576, num_steps=2)
    for chunk in (12_288, 24_576, 49_152, 73_728) if not setting.toy else (8_192,):
        run.measure(f"shared_{chunk}", shared=True, chunk_tokens=chunk, num_steps=setting.size(5, 2))


def measure_trainer(setting: Setting, note: Note) -> None:
    output = setting.work / "trainer"
    shutil.rmtree(output, ignore_errors=True)
    steps = setting.size(16, 4)
    command = [sys.executable, str(ROOT / "trainer" / "main.py"), "--shards", str(setting.shards)]
    command += ["--output", str(output), "--backbone", str(backbone_folder(setting, "nomic_bert"))]
    command += ["--random-weights", "--num-layers", "2", "--dropout", "0", "--context-size", str(setting.context_size)]
    command += ["--max-length", str(setting.max_length), "--max-steps", str(steps), "--log-every", "1"]
    if setting.collection:
        command += ["--eval", str(setting.collection)]

    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stderr is not None
    lines = []
    for line in first.stderr:
        lines.append(line.rstrip())
        note("first_lines", lines[:5] + lines[5:][-4:])
        if line.startswith(f"step {steps // 2} "):
            first.send_signal(signal.SIGTERM)
    note("first_exit_code", first.wait())
    second = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, check=False)
    note("second_exit_code", second.returncode)
    note("second_lines", second.stderr.splitlines()[-8:])
    export = second.stdout.splitlines()[-1]

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(export, trust_remote_code=True, device=setting.device)
    documents = ["a document", "another one"]
    context = model.encode(documents, prompt_name="document", first_stage=True, convert_to_tensor=True)
    found = model.encode(["a question"], prompt_name="query", dataset_embeddings=context)
    note("export_norm", float(np.linalg.norm(found)))
    if setting.device == "cuda":
        whole = [part for part in command if part not in ("--num-layers", "2")]
        whole[whole.index(str(output))] = str(output) + "-memory"
        full = subprocess.run([*whole, "--chunk-tokens", "1000000"], capture_output=True, text=True, check=False)
        note("out_of_memory_exit_code", full.returncode)
        note("out_of_memory_lines", full.stderr.splitlines()[-2:])


def measure_embed(setting: Setting, note: Note) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sentence_transformers import SentenceTransformer

    from hardbatch.pipeline.artifacts.vectors import open_vectors
    from hardbatch.pipeline.run import plan_corpus, run_step

    folder = setting.work / "embed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = sorted((setting.shards / "data").glob("*.parquet"))
    pairs = pa.concat_tables([pq.read_table(file, columns=["query", "document"]) for file in files])
    pairs = pairs.slice(0, setting.size(8_192, 32))
    pq.write_table(pairs, folder / "pairs.parquet")
    texts = [list(dict.fromkeys(pairs[side].to_pylist())) for side in ("query", "document")]
    note("distinct_texts", sum(map(len, texts)))
    shapes = {"minilm_shape": ("bert", 384, 6, 6), "gtr_shape": ("bert", 768, 12, 12)}
    if setting.toy:  # both shapes are the same toy
        del shapes["gtr_shape"]
    for name, (model_type, width, num_layers, num_heads) in shapes.items():
        model = backbone_folder(setting, model_type, (width, num_layers, num_heads), weights=True, name=name)
        manifest = folder / f"{name}.toml"
        manifest.write_text(
            f'corpus = "{name}"\n[embed]\nmax_length_tokens = 256\ndevice = "{setting.device}"\n'
            '[[dataset]]\nname = "pairs"\nsource = "pairs.parquet"\n'
        )
        models = [f"embed.model={model}", f"embed.surrogate_model={model}"]
        plan = plan_corpus(manifest, folder / "workspace", overrides=models)
        steps = {step.stage: step for step in plan.steps}
        run_step(steps["pairs"])
        for cudnn in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for attempt in ("first", "again"):  # the first attempt also loads the model
                shutil.rmtree(steps["vectors"].path, ignore_errors=True)
                taken = seconds_of(lambda steps=steps: run_step(steps["vectors"]), setting)
                note(f"{name}_ours_cudnn_{'on' if cudnn else 'off'}_{attempt}_s", taken)
        vectors = open_vectors(steps["vectors"].path)
        ours = [side.take(np.arange(64 if not setting.toy else 8)) for side in (vectors.queries, vectors.documents)]

        theirs = SentenceTransformer(str(model), device=setting.device)
        theirs.max_seq_length = 256
        dtypes = [("defaults", torch.float32, 32, True)]
        if setting.device == "cuda":
            dtypes += [("bf16_128", torch.bfloat16, 128, False), ("bf16_512", torch.bfloat16, 512, False)]
        for label, dtype, batch_size, cudnn in dtypes:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            theirs.to(dtype)

            def encode(model: Any = theirs, batch_size: int = batch_size) -> list[Any]:
                return [model.encode(side, batch_size=batch_size, convert_to_tensor=True) for side in texts]

            note(f"{name}_encode_{label}_s", seconds_of(encode, setting))
        plain = SentenceTransformer(str(model), device="cpu")
        plain.max_seq_length = 256
        expected = [plain.encode(side[: len(own)], normalize_embeddings=True) for side, own in zip(texts, ours)]  # noqa: B905
        apart = [a.astype(np.float64) - b for a, b in zip(ours, expected, strict=True)]
        note(f"{name}_largest_distance_to_cpu", max(float(np.linalg.norm(one, axis=1).max()) for one in apart))
        spread = np.concatenate(expected) - np.concatenate(expected).mean(0)
        note(f"{name}_mean_distance_of_texts", float(np.linalg.norm(spread, axis=1).mean()))


def measure_kmeans(setting: Setting, note: Note) -> None:
    from hardbatch.pipeline.batching.nearest import Nearest
    from hardbatch.pipeline.batching.points import InMemory, cluster_sums, partitions

    n, k, dimension = setting.size(1_000_000, 4_000), setting.size(1_024, 16), setting.size(768, 32)
    torch.manual_seed(0)
    on_device = F.normalize(torch.randn(n, dimension, device=setting.device), dim=1).half()
    points = InMemory(on_device.float().cpu().numpy())
    centroids = points.take(np.arange(k)).copy()
    labels = np.empty(n, dtype=np.int32)
    part = setting.size(100_000, 4_000)

    def as_it_is(*, exact: bool) -> None:
        nearest = Nearest(centroids, device=setting.device)
        for rows in partitions(part):
            block = points.take(rows)
            labels[rows] = nearest(block, exact=exact)
            cluster_sums(block, labels[rows], k)

    for exact in (False, True):
        taken = seconds_of(lambda exact=exact: as_it_is(exact=exact), setting)
        note(f"pipeline_{'exact' if exact else 'rough'}_points_per_s", part / taken)

    resident = torch.from_numpy(centroids).to(setting.device).half()
    offset = (-0.5 * resident.float().square().sum(1)).half()
    block_rows = setting.size(16_384, 1_024)

    def assign(rows: int = block_rows) -> Tensor:
        found = torch.empty(n, dtype=torch.int64, device=setting.device)
        scores = torch.empty(rows, k, dtype=torch.float16, device=setting.device)
        for start in range(0, n, rows):
            block = on_device[start : start + rows]
            own = scores[: len(block)]
            torch.addmm(offset, block, resident.T, out=own)
            torch.argmax(own, 1, out=found[start : start + rows])
        return found

    def products() -> None:
        for start in range(0, n, block_rows):
            torch.addmm(offset, on_device[start : start + block_rows], resident.T)

    flops = 2.0 * n * k * dimension
    for rows in (4_096, 8_192, 16_384, 32_768, 65_536):
        note(
            f"resident_assignment_{rows}_tflops",
            flops / median_seconds(lambda r=rows: assign(r), setting, rounds=3) / 1e12,
        )
    chosen = assign()
    total = torch.zeros(k, dimension, device=setting.device)

    def sums_by_index() -> None:
        for start in range(0, n, block_rows):
            block = on_device[start : start + block_rows].float()
            total.index_add_(0, chosen[start : start + block_rows], block)

    def sums_by_sort() -> Tensor:
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=k)
        parts = torch.zeros(k, dimension, device=setting.device)
        return parts + torch.segment_reduce(on_device[order].float(), "sum", lengths=counts, axis=0, unsafe=True)

    for name, once in (
        ("products", products),
        ("assignment", assign),
        ("sums_by_index", sums_by_index),
        ("sums_by_sort", sums_by_sort),
    ):
        taken = median_seconds(once, setting, rounds=3)
        note(f"resident_{name}_points_per_s", n / taken)
        note(f"resident_{name}_tflops", flops / taken / 1e12)


def measure_masks(setting: Setting, note: Note) -> None:
    from hardbatch.pipeline.batching.equivalence import LikelyRule, likely_answers
    from hardbatch.pipeline.batching.hardness import measure_batch

    num_batches, size, dimension = setting.size(64, 4), setting.size(512, 16), setting.size(768, 32)
    torch.manual_seed(0)
    shared = torch.randn(num_batches, 1, dimension)
    pairs = torch.randn(num_batches, size, dimension)
    queries, documents = (
        F.normalize(shared + pairs + torch.randn(num_batches, size, dimension), dim=-1).half() for _ in range(2)
    )

    masks, figures = [], []
    few = setting.size(4, 2)

    def as_it_is() -> None:
        for batch in range(few):
            q, d = queries[batch].float().numpy(), documents[batch].float().numpy()
            masks.append(likely_answers(q, d, LikelyRule(likely_rule="symmetric", max_likely=1.0), -1.0).mask_BB)
            figures.append(measure_batch(q, d, masks[-1], q, d))

    note("pipeline_us_a_pair", 1e6 * seconds_of(as_it_is, setting) / (few * size))
    on_device = queries.to(setting.device), documents.to(setting.device)
    eye = torch.eye(size, dtype=torch.bool, device=setting.device)

    def batched() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, d = (side.float() for side in on_device)
        scores = torch.bmm(q, d.transpose(1, 2))
        own = scores.diagonal(dim1=1, dim2=2)
        above = (scores + scores.transpose(1, 2) - own[..., None] - own[:, None]) / 2
        mask = (above >= 0) & ~eye
        near = ((above.abs() < 1e-5) & ~eye).nonzero()
        batch, one, other = near.unbind(1)
        products = [(q[batch, i].double() * d[batch, j].double()).sum(1) for i in (one, other) for j in (one, other)]
        mask[batch, one, other] = products[1] + products[2] >= products[0] + products[3]
        negatives = ~mask & ~eye
        hardness = (scores * ~eye).sum((1, 2), dtype=torch.float64) / (size * (size - 1))
        masked = (scores * (negatives | negatives.transpose(1, 2))).sum((1, 2), dtype=torch.float64)
        loss = (scores / 0.02).masked_fill(mask, -torch.inf).logsumexp(2) - own / 0.02
        return mask, hardness, masked, loss.mean(1)

    taken = median_seconds(batched, setting, rounds=5)
    note("batched_us_a_pair", 1e6 * taken / (num_batches * size))
    mask, hardness, _, loss = batched()
    different = sum(int((mask[i].cpu().numpy() != masks[i]).sum()) for i in range(few))
    note("different_mask_places", different)
    note("hardness_difference", max(abs(float(hardness[i]) - figures[i].hardness) for i in range(few)))
    note("loss_difference", max(abs(float(loss[i]) - figures[i].surrogate_loss) for i in range(few)))


def measure_syncs(setting: Setting, note: Note) -> None:
    if setting.device != "cuda":
        note("skipped", "no CUDA device")
        return
    from hardbatch.pipeline.models.encoders import open_encoder
    from hardbatch.pipeline.models.resolve import ModelSpec

    training = start_training(
        setting, "syncs", *("--context-size", "64", "--max-length", "128", "--chunk-tokens", "32768")
    )
    gradients = training.gradients()
    batches = first_batches(training, 2)
    one_step(training, gradients, batches[0])
    with synchronising_lines() as found:
        one_step(training, gradients, batches[1])
    note("training_step", dict(found.most_common(12)))
    note("training_step_syncs", sum(found.values()))

    model = backbone_folder(setting, "bert", (384, 6, 6), weights=True, name="minilm_shape")
    fields = ModelSpec.__dataclass_fields__
    values: dict[str, Any] = {
        "name": "m",
        "location": str(model),
        "device": "cuda",
        "runs_on": "cuda:0",
        "dtype": "bfloat16",
    }
    values |= {"token_budget": 65_536, "max_length_tokens": 256, "trust_remote_code": False}
    encoder = open_encoder(ModelSpec(**{name: values.get(name, "") for name in fields}))
    texts = ["word " * (number % 200 + 1) for number in range(2_048)]
    encoder.encode(encoder.tokenize(texts))
    with synchronising_lines() as found:
        encoder.encode(encoder.tokenize(texts))
    note("embedding_unit", dict(found.most_common(12)))
    note("embedding_unit_syncs", sum(found.values()))


def measure_nccl(setting: Setting, note: Note) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29471", "RANK": "0", "WORLD_SIZE": "1"}
    device = torch.device("cuda", 0) if setting.device == "cuda" else None
    dist.init_process_group("nccl" if device else "gloo", device_id=device)
    control = dist.new_group(backend="gloo")
    gradients = torch.randn(setting.size(137_000_000, 1_000), device=setting.device)
    note("all_reduce_s", median_seconds(lambda: dist.all_reduce(gradients), setting, rounds=3))
    total = torch.ones(1, dtype=torch.float64)
    dist.all_reduce(total, group=control)
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, {"fact": 1}, group=control)
    note("gloo_beside_it", float(total))
    dist.destroy_process_group()


# The parts, and the seconds that each may take.
PARTS: dict[str, tuple[Callable[[Setting, Note], None], int]] = {
    "device": (measure_device, 30),
    "sdpa": (measure_sdpa, 60),
    "attention": (measure_attention, 60),
    "packed": (measure_packed, 190),
    "chunks": (measure_chunks, 90),
    "padded": (measure_padded, 80),
    "kmeans": (measure_kmeans, 50),
    "masks": (measure_masks, 30),
    "embed": (measure_embed, 80),
    "clustering": (measure_clustering, 60),
    "trainer": (measure_trainer, 130),
    "gradcache": (measure_gradcache, 60),
    "nccl": (measure_nccl, 30),
    "syncs": (measure_syncs, 40),
}


def profile(note: Note, label: str, run: PackedTraining, chunk_tokens: int) -> None:
    """Note the kernels that take most of a step with shared context."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step, batch = run.step(shared=True, chunk_tokens=chunk_tokens), run.batches[1]
    step.backward(batch)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step.backward(batch)
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    note(f"{label}_kernels_ms", total / 1e3)
    shares = {event.key[:90]: round(event.self_device_time_total / total, 4) for event in events[:15]}
    note(f"{label}_kernel_shares", shares)
    run.encoder.zero_grad(set_to_none=True)


# -------------------------------------------------------------------------------------------------------------- set-up


def backbone_folder(
    setting: Setting,
    model_type: str,
    shape: tuple[int, int, int] | None = None,
    *,
    weights: bool = False,
    toy: bool = False,
    name: str | None = None,
) -> Path:
    """Return a folder with the configuration of a backbone, with random weights if asked for, and a tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    toy = toy or setting.toy
    width, num_layers, num_heads = (32, 2, 4) if toy else shape or (768, 12, 12)
    folder = setting.work / (name or f"{model_type}-{width}x{num_layers}")
    if (folder / "config.json").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(setting.work / "tokenizer")
    options: dict[str, dict[str, Any]] = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "nomic_bert": {"head_dim": width // num_heads},
        "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    }
    config = AutoConfig.for_model(
        model_type,
        vocab_size=30_528,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        max_position_embeddings=2_048 if model_type != "bert" else 512,
        **options[model_type],
    )
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder)
    if weights:
        AutoModel.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def start_training(setting: Setting, name: str, *flags: str, backbone: Path | None = None) -> Any:
    """Return a training before its first step, as `trainer/main.py` would start it."""
    from hardbatch.trainer.config import parse_flags
    from hardbatch.trainer.ranks import join_ranks
    from hardbatch.trainer.training import start_training as start

    arguments = ["--shards", str(setting.shards), "--output", str(setting.work / name), "--random-weights"]
    arguments += ["--backbone", str(backbone or backbone_folder(setting, "nomic_bert")), "--dropout", "0"]
    if "--context-size" not in flags:
        arguments += ["--context-size", str(setting.context_size), "--max-length", str(setting.max_length)]
    config = parse_flags([*arguments, *flags])
    torch.manual_seed(0)
    with join_ranks(config.device) as ranks:
        return start(config, ranks, None, [])


def first_batches(training: Any, number: int) -> list[Any]:
    """Return the first batches of the stream, tokenised."""
    from hardbatch.trainer.stream import BatchStream

    with BatchStream(training.shards, seed=0, tokenize=training.tokenizer, stop=number) as stream:
        return list(stream)


def flops_of(setting: Setting, encoder: Any, batch: Any) -> float:
    """Return the FLOPs of a batch over its real tokens, as the trainer's log counts them."""
    from hardbatch.trainer.draws import draw_context
    from hardbatch.trainer.log import model_flops

    rows = draw_context(len(batch.documents), setting.context_size, seed=0, position=batch.position)
    return model_flops(encoder, batch, rows)


def layers_of(backbone: Any) -> Any:
    return backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer


def take_gradients(encoder: Any) -> dict[str, Tensor]:
    """Move the gradients out of the encoder: return one for each parameter that has one, and leave None behind."""
    found = {name: p.grad.flatten().double() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return found


def cosine_of_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the cosine over the parameters that have a gradient in both."""
    names = sorted(one.keys() & other.keys())
    product = sum(float(one[name] @ other[name]) for name in names)
    norms = [math.sqrt(sum(float(side[name] @ side[name]) for name in names)) for side in (one, other)]
    return product / (norms[0] * norms[1])


def one_step(training: Any, gradients: Any, batch: Any) -> None:
    """Do one step: gradients of a batch, clipped, and an update."""
    gradients.backward(batch)
    torch.nn.utils.clip_grad_norm_(training.encoder.parameters(), 1.0)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------- measurement


def synchronise(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(once: Callable[[], Any], setting: Setting) -> float:
    """Return the seconds of one call, including its work on the device."""
    synchronise(setting)
    start = time.perf_counter()
    once()
    synchronise(setting)
    return time.perf_counter() - start


def median_seconds(once: Callable[[], Any], setting: Setting, *, rounds: int = 10) -> float:
    """Return the median seconds of several calls, after two that warm up."""
    for _ in range(2):
        once()
    return float(np.median([seconds_of(once, setting) for _ in range(setting.size(rounds, 2))]))


def device_name(setting: Setting) -> str:
    return torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"


def device_peaks(setting: Setting) -> float:
    """Return the dense bf16 FLOP/s of the data sheet, or 0 if the device is not known."""
    return next(
        (peak for name, peak in (("H100 80GB HBM3", 989e12), ("H200", 989e12)) if name in device_name(setting)), 0.0
    )


def peak_gib(setting: Setting) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else 0.0


@contextmanager
def synchronising_lines() -> Iterator[Counter[str]]:
    """Count what makes the CPU wait for the GPU in the body, by line of this project or of a library."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1


# ------------------------------------------------------------------------------------------------------------- running


def run_part(name: str, setting: Setting, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own and return what it noted, with `error` if it failed or took too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def body() -> None:
        os.setsid()
        try:
            PARTS[name][0](setting, lambda key, value: sender.send((key, value)))
        except BaseException:
            sender.send(("error", traceback.format_exc(limit=-6)))
        sender.close()
        os._exit(0)

    process = context.Process(target=body)
    started = time.monotonic()
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    try:
        while True:
            left = limit_s - (time.monotonic() - started)
            if left <= 0 or not receiver.poll(left):
                found["error"] = f"stopped at its limit of {limit_s:.0f} s"
                break
            key, value = receiver.recv()
            found[key] = value
    except EOFError:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    found["seconds"] = time.monotonic() - started
    return found


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(as_text(one) for one in value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {as_text(one)}" for key, one in value.items())
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, help="folder of shards")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: MiniLM's")
    parser.add_argument(
        "--collection", type=Path, help="folder of corpus, queries and qrels that the trainer evaluates on"
    )
    parser.add_argument("--work", type=Path, help="folder for the files of the parts; default: a temporary one")
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--seconds", type=float, default=480, help="time limit for all parts together")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    options = parser.parse_args()
    started = time.monotonic()
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")

    options.work = options.work or Path(tempfile.mkdtemp(prefix="hardbatch-gpu-"))
    options.work.mkdir(parents=True, exist_ok=True)

    # Each part is a fork of this process, so that what is imported here is not imported again by each of them.
    import sentence_transformers  # noqa: F401
    from transformers import AutoTokenizer

    import hardbatch.pipeline.run
    import hardbatch.trainer.training  # noqa: F401
    from hardbatch.pipeline.models.locate import locate_model

    tokenizer = options.tokenizer or locate_model("minilm", None, Path())[1]
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(options.work / "tokenizer")
    setting = Setting(
        shards=options.shards.resolve(),
        work=options.work.resolve(),
        collection=options.collection.resolve() if options.collection else None,
        toy=options.toy,
    )

    found: dict[str, Any] = {}
    for name in options.only.split(","):
        left = options.seconds - (time.monotonic() - started)
        if left < 10:
            found[name] = {"error": "not started: no time was left"}
        else:
            found[name] = run_part(name, setting, left if options.toy else min(left, PARTS[name][1]))
        print(f"\n{name}: {found[name].get('seconds', 0):.0f} s", flush=True)
        for key, value in found[name].items():
            print(f"  {key:<52} {as_text(value)}", flush=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in figures for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
