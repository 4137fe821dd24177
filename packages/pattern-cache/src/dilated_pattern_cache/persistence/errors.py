"""The error that is this part's own."""

from __future__ import annotations


class CacheFileError(ValueError):
    """A file is not what ``save`` wrote: damaged, cut short, of another kind or version, or with another tag."""
