"""The error that is this package's own."""

from __future__ import annotations

from collections.abc import Hashable


class PatternMutatedError(RuntimeError):
    """A cached value was changed in place after it was stored: all who were given it since may have used wrong ones.

    The value is no longer in the cache. The next ``get_or_create`` makes it anew.
    """


def mutated(key: Hashable) -> PatternMutatedError:
    """The error about the value of ``key``."""
    return PatternMutatedError(
        f"the cached value of {key!r} was changed in place after it was stored; it is dropped, and made anew when it "
        "is next asked for. Values of a cache are shared: clone before you write"
    )
