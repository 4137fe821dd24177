"""A pool to look at: as text, as a picture, as plain data. Everything takes a pool or a ``PoolSnapshot`` of one."""

from dilated_memory_pool.report.history import timeline
from dilated_memory_pool.report.memory_map import picture
from dilated_memory_pool.report.plain import to_json
from dilated_memory_pool.report.text import table

__all__ = ["picture", "table", "timeline", "to_json"]
