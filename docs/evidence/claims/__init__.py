"""The claims, package by package, as the page shows them."""

from evidence.claims import block_sparse, dilated_core, factory, memory_pool, pattern_cache, ring

CLAIMS = (
    *dilated_core.CLAIMS,
    *ring.CLAIMS,
    *block_sparse.CLAIMS,
    *memory_pool.CLAIMS,
    *pattern_cache.CLAIMS,
    *factory.CLAIMS,
)
