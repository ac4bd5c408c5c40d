"""Exact search of queries in a corpus of vectors, shared by all ranks of torch.distributed.

Shapes: N documents of a corpus, Q queries, K hits of a query, H width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hardbatch.trainer.embed import no_op, ranks

_SCORES_PER_BLOCK = 2**25  # scores computed at once on a CPU; their sort keys take 256 MB
_BYTES_PER_SCORE = 64  # upper bound on a GPU: the score, its bits, its sort key and temporaries
_MOST_SCORES_PER_BLOCK = 2**30  # limit on a GPU of any memory: `topk` indexes with 32 bits
_BLOCKS = 64  # blocks of a search, so that every rank gets some
_LEAST_QUERIES = 16  # queries of a block


def search(
    queries_QH: Tensor, documents_NH: Tensor, num_hits: int, between_blocks: Callable[[], None] = no_op
) -> Tensor:
    """Finds the documents with the highest dot products.

    Ranks share the queries, block by block, and all of them get all hits.

    Args:
        queries_QH: Embeddings of the queries.
        documents_NH: Embeddings of the corpus.
        num_hits: Hits of each query.
        between_blocks: Called by all ranks equally often. An exception that it raises ends the search.

    Returns:
        Rows of the hits (Q × min(num_hits, N), int64), the best first. Of documents with equal
        scores, the first one in the corpus is the better hit.
    """
    rank, num_ranks = ranks()
    device = documents_NH.device
    num_hits = min(num_hits, len(documents_NH))
    hits_QK = torch.zeros(len(queries_QH), num_hits, dtype=torch.int64, device=device)

    # Blocks do not depend on the number of ranks, because rounding may depend on the shape of a product.
    num_rows = _queries_per_block(len(queries_QH), len(documents_NH), device)
    starts = range(0, len(queries_QH), num_rows)
    for first in range(0, len(starts), num_ranks):
        between_blocks()
        for start in starts[first : first + num_ranks][rank : rank + 1]:
            block_QH = queries_QH[start : start + num_rows]
            hits_QK[start : start + num_rows] = _search_block(block_QH, documents_NH, num_hits)

    if num_ranks > 1:
        dist.all_reduce(hits_QK)  # the hits of a query come from one rank, and the others have zeros there
    return hits_QK


def _search_block(queries_QH: Tensor, documents_NH: Tensor, num_hits: int) -> Tensor:
    num_documents = len(documents_NH)
    first_is_best_N = torch.arange(num_documents - 1, -1, -1, device=documents_NH.device)
    scores_QN = queries_QH @ documents_NH.T + 0.0  # adding 0 turns -0 into 0
    bits_QN = scores_QN.view(torch.int32).long()
    ordered_QN = torch.where(bits_QN < 0, bits_QN ^ 0x7FFFFFFF, bits_QN)  # integers in the order of the floats
    keys_QN = (ordered_QN << 32) | first_is_best_N
    return num_documents - 1 - (keys_QN.topk(num_hits).values & 0xFFFFFFFF)


def _queries_per_block(num_queries: int, num_documents: int, device: torch.device) -> int:
    """Queries of a block, the same on all ranks: as many as the memory allows, and at least one."""
    limit = _SCORES_PER_BLOCK
    if device.type == "cuda":
        limit = _scores_that_fit(device)
    share = max(_LEAST_QUERIES, -(-num_queries // _BLOCKS))
    return max(1, min(limit // num_documents, share))


def _scores_that_fit(device: torch.device) -> int:
    """Scores that fit in half of the free memory of the fullest GPU of all ranks."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved by torch and not in use
    limit = min(_MOST_SCORES_PER_BLOCK, free // 2 // _BYTES_PER_SCORE)

    _, num_ranks = ranks()
    if num_ranks > 1:
        least = torch.tensor(limit, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        limit = int(least)
    return limit
