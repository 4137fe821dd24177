"""Behind a cache: what is stored (``store``, ``shelf``), how it comes about (``making``, ``flights``), forks."""
