"""leaks: the texts of a domain that another domain holds out, so that no batch trains on them.

They remain texts of their domain. Packing leaves out their pairs, and writing leaves them out as hard negatives.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.leaks import Leaks
from hardbatch.pipeline.artifacts.vectors import Texts, load_pairs
from hardbatch.pipeline.batching.copies import KnownTexts
from hardbatch.pipeline.sources.rows import evaluation_texts
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step

_TEXTS_PER_READ = 8_192
_HOLDOUTS = "holdout/"  # how the names of the inputs begin that are the pairs of other domains


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `leaks` artifact of one domain; see `docs/artifacts.md` for its files.

    A text leaks if it is equal to a held-out text of either side, or a near-copy of one. The counts say how
    many pairs have such a text, and by domain how many texts it holds out.
    """
    pairs = read_artifact(step.inputs["pairs"])
    sides = {side: Texts(pairs, side) for side in schemas.SIDES}
    known = KnownTexts()
    for name, path in step.inputs.items():
        if name.startswith(_HOLDOUTS):
            known.add(evaluation_texts(path / "holdout"), name.removeprefix(_HOLDOUTS))

    progress.start(f"leaks {step.domain}, texts", sum(texts.num_rows for texts in sides.values()))
    found = []
    for side, texts in sides.items():
        for start in range(0, texts.num_rows, _TEXTS_PER_READ):
            rows = np.arange(start, min(start + _TEXTS_PER_READ, texts.num_rows))
            for row, text in zip(rows.tolist(), texts.take(rows), strict=True):
                if (domain := known.find(text)) is not None:
                    found.append({"side": side, "row": row, "domain": domain})
            progress.advance(len(rows))
    progress.finish()

    table = pa.Table.from_pylist(found, schemas.LEAKS)
    with write_unit(builder.path, "leaks") as writer:
        pq.write_table(table, writer.add_file("leaks.parquet", rows=len(table)), compression="zstd")
    counts = {
        "pairs": pairs.manifest.counts["pairs"],
        "leaking_pairs": int(Leaks.of(table).pairs(load_pairs(pairs)).sum()),
        "texts_by_domain": dict(sorted(Counter(leak["domain"] for leak in found).items())),
    }
    return StageResult(units=["leaks"], counts=counts)
