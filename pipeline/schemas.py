"""The columns of every artifact, named once. A change here bumps `artifact.FORMAT_VERSION`.

A pair is identified by (domain, pair_id). A pair_id is the pair's position among the surviving pairs of its domain, in
the order of the source. A query row or document row is the position of a text among the distinct texts of its side.
"""

from __future__ import annotations

import pyarrow as pa

SIDES = ("queries", "documents")
TEXT_ROWS_PER_FILE = 65_536  # one record batch per file, so a row's file and position follow from its number
MAX_BATCHES_PER_PART = 1_024
MAX_BATCH_SIZE = 65_536  # slots are stored as u16
MIXED_DOMAIN = "mixed"

STAGED = pa.schema(
    [
        ("source_file", pa.int32()),
        ("source_row", pa.int64()),
        ("query", pa.large_utf8()),
        ("document", pa.large_utf8()),
        ("negatives", pa.list_(pa.large_utf8())),
        ("query_hash", pa.binary(16)),
        ("document_hash", pa.binary(16)),
        ("negative_hashes", pa.list_(pa.binary(16))),
    ]
)
STAGED_EXTRA = (  # further columns of STAGED, only if a dataset has `extra_columns`
    pa.field("negative_places", pa.list_(pa.int32())),
    pa.field("extra", pa.large_utf8()),  # the values of a row as a JSON array, as their types are not known yet
)
PAIRS = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("query_row", pa.int64()),
        ("document_row", pa.int64()),
        ("source_file", pa.int32()),
        ("source_row", pa.int64()),
    ]
)
PAIRS_WITH_NEGATIVES = PAIRS.append(pa.field("negative_rows", pa.list_(pa.int64())))
NEGATIVE_PLACES = pa.field("negative_places", pa.list_(pa.int32()))  # beside negatives, if there are extra columns
TEXTS = pa.schema([("text", pa.large_utf8())])
QUARANTINE = pa.schema(
    [("source_file", pa.int32()), ("source_row", pa.int64()), ("reason", pa.utf8()), ("detail", pa.utf8())]
)
HOLDOUT_CORPUS = pa.schema([("doc_id", pa.utf8()), ("text", pa.large_utf8()), ("title", pa.utf8())])
HOLDOUT_QUERIES = pa.schema([("query_id", pa.utf8()), ("text", pa.large_utf8())])
HOLDOUT_QRELS = pa.schema([("query_id", pa.utf8()), ("doc_id", pa.utf8()), ("score", pa.int32())])
LEAKS = pa.schema([("side", pa.utf8()), ("row", pa.int64()), ("domain", pa.utf8())])
JOINS = pa.schema([("row", pa.int64()), ("other_row", pa.int64()), ("kind", pa.utf8()), ("overlap", pa.float32())])
INVALID_ROWS = pa.schema([("row", pa.int64()), ("reason", pa.utf8())])
WORD = pa.dictionary(pa.int32(), pa.utf8())  # a column of few distinct words over many rows
CLUSTERS = pa.schema([("pair_id", pa.int64()), ("cluster_id", pa.int32())])
OBJECTIVE = pa.schema([("level", pa.int32()), ("iteration", pa.int32()), ("objective", pa.float64())])
CONSISTENCY = pa.schema([("pair_id", pa.int64()), ("own_score", pa.float32()), ("rank", pa.int32())])
BATCHES = pa.schema(
    [
        ("packing", pa.int32()),
        ("batch", pa.int64()),
        ("slot", pa.int32()),
        ("domain", WORD),
        ("pair_id", pa.int64()),
        ("cluster_id", pa.int32()),
    ]
)
LEFTOVER = pa.schema(
    [
        ("packing", pa.int32()),
        ("domain", WORD),
        ("pair_id", pa.int64()),
        ("cluster_id", pa.int32()),
        ("reason", WORD),
    ]
)
SHARDS = pa.schema(
    [
        ("batch_id", pa.int64()),
        ("slot", pa.int32()),
        ("domain", pa.utf8()),
        ("pair_id", pa.int64()),
        ("cluster_id", pa.int32()),
        ("query_id", pa.int64()),
        ("document_id", pa.int64()),
        ("query", pa.large_utf8()),
        ("document", pa.large_utf8()),
        ("query_prompt", pa.utf8()),
        ("document_prompt", pa.utf8()),
        ("positive_slots", pa.list_(pa.uint16())),
        ("equivalent_slots", pa.list_(pa.uint16())),
    ]
)
SHARDS_WITH_NEGATIVES = SHARDS.insert(
    SHARDS.get_field_index("positive_slots"), pa.field("negatives", pa.list_(pa.large_utf8()))
)
INDEX = pa.schema(
    [
        ("batch_id", pa.int64()),
        ("packing", pa.int32()),
        ("domain", pa.utf8()),
        ("file", pa.utf8()),
        ("row_group", pa.int32()),
        ("byte_offset", pa.int64()),
        ("byte_length", pa.int64()),
        ("sha256", pa.utf8()),
        ("footer_sha256", pa.utf8()),
        ("record_offset", pa.int64()),
        ("record_length", pa.int64()),
        ("hardness", pa.float64()),
        ("group_hardness", pa.float64()),
        ("masked_hardness", pa.float64()),
        ("mask_rate", pa.float64()),
        ("surrogate_loss", pa.float64()),
        ("same_answer_rate", pa.float64()),
        ("mean_negatives", pa.float64()),
        ("min_negatives", pa.int32()),
        ("queries_without_negatives", pa.int32()),
        ("queries_with_few_negatives", pa.int32()),
    ]
)
