"""Exact search of queries in a corpus of vectors, shared by all ranks of torch.distributed.

Shapes: N documents of a corpus, Q queries, K hits of a query, H width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hardbatch.trainer.embed import go_on, ranks

_SCORES_PER_BLOCK = 2**25  # places of the score matrix at once on a CPU; their sort keys take 256 MB
_BYTES_PER_SCORE = 64  # at most, of a place on a GPU: scores, their bits, sort keys and what lies between
_MOST_SCORES_PER_BLOCK = 2**30  # on a GPU, whatever its memory: `topk` counts places in 32 bits
_BLOCKS, _LEAST_QUERIES = 64, 16  # blocks of a search, so that there is one for each rank; queries of a block


def search(
    queries_QH: Tensor, documents_NH: Tensor, num_hits: int, between_blocks: Callable[[], None] = go_on
) -> Tensor:
    """Rows (Q × min(num_hits, N), int64) of the documents with the highest dot products, the best first.

    Of documents that score the same, the one that comes first in the corpus is the better hit. Ranks
    share the queries, block by block, and all of them get all hits.
    """
    rank, num_ranks = ranks()
    device = documents_NH.device
    num_hits = min(num_hits, len(documents_NH))
    hits_QK = torch.zeros(len(queries_QH), num_hits, dtype=torch.int64, device=device)

    # Blocks are the same for any number of ranks, since a product may round differently by its shape.
    num_rows = _queries_per_block(len(queries_QH), len(documents_NH), device)
    starts = range(0, len(queries_QH), num_rows)
    for first in range(0, len(starts), num_ranks):
        between_blocks()
        for start in starts[first : first + num_ranks][rank : rank + 1]:
            block_QH = queries_QH[start : start + num_rows]
            hits_QK[start : start + num_rows] = _search_block(block_QH, documents_NH, num_hits)

    if num_ranks > 1:
        dist.all_reduce(hits_QK)  # the hits of a query come from one rank, the others have zeros there
    return hits_QK


def _search_block(queries_QH: Tensor, documents_NH: Tensor, num_hits: int) -> Tensor:
    num_documents = len(documents_NH)
    first_is_best_N = torch.arange(num_documents - 1, -1, -1, device=documents_NH.device)
    scores_QN = queries_QH @ documents_NH.T + 0.0  # the zero makes a 0 of -0
    bits_QN = scores_QN.view(torch.int32).long()
    ordered_QN = torch.where(bits_QN < 0, bits_QN ^ 0x7FFFFFFF, bits_QN)  # as integers, in the order of the floats
    keys_QN = (ordered_QN << 32) | first_is_best_N
    return num_documents - 1 - (keys_QN.topk(num_hits).values & 0xFFFFFFFF)


def _queries_per_block(num_queries: int, num_documents: int, device: torch.device) -> int:
    """Queries of a block of a search, the same on all ranks: as many as memory allows, but no fewer than one."""
    limit = _SCORES_PER_BLOCK
    if device.type == "cuda":
        limit = _scores_that_fit(device)
    share = max(_LEAST_QUERIES, -(-num_queries // _BLOCKS))
    return max(1, min(limit // num_documents, share))


def _scores_that_fit(device: torch.device) -> int:
    """Places of the score matrix that fit in half of the free memory of the fullest GPU of all ranks."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and not in use
    limit = min(_MOST_SCORES_PER_BLOCK, free // 2 // _BYTES_PER_SCORE)

    _, num_ranks = ranks()
    if num_ranks > 1:
        least = torch.tensor(limit, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        limit = int(least)
    return limit
