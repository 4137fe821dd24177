"""What a model must beat to have learnt something: bits per byte without any context, and of everyday compressors.

Standard library only. All figures are for exactly the bytes given, headers included.
"""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ZLIB_WINDOW = 32768
"""The furthest deflate looks back, so the most training text that can help it (RFC 1951)."""


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of one text.

    Attributes:
        unigram: byte frequencies of the training text, one added to every count.
        gzip: ``gzip -9`` of the text as one stream, nothing known before.
        xz: ``xz -6`` likewise.
        deflate_primed: deflate -9 that begins knowing the last 32 KiB of the training text, as far back as it looks.
        xz_primed: what the text adds to an xz stream of ``primed_bytes`` of training text; None where not measured.
        primed_bytes: how much training text xz_primed was given.
    """

    unigram: float
    gzip: float
    xz: float
    deflate_primed: float
    xz_primed: float | None
    primed_bytes: int


def measure_baselines(training: bytes, text: bytes, *, primed_bytes: int) -> Baselines:
    """Every baseline of ``text``, of which none but those named primed, and the unigram, has seen ``training``.

    Args:
        training: text to fit and prime with.
        text: at least one byte.
        primed_bytes: how much of the training text's end to prime xz with, 0 to leave it out; about a second for 2 MB.

    Raises:
        ValueError: text is empty.
    """
    if not text:
        raise ValueError("text: expected at least one byte, got none")
    primer = training[-primed_bytes:] if primed_bytes else b""
    return Baselines(
        unigram=unigram_bits(training, text) / len(text),
        gzip=8 * len(gzip.compress(text, 9)) / len(text),
        xz=8 * len(lzma.compress(text)) / len(text),
        deflate_primed=8 * _deflate_primed(training, text) / len(text),
        xz_primed=8 * _xz_increase(primer, text) / len(text) if primer else None,
        primed_bytes=len(primer),
    )


def unigram_bits(training: bytes, text: bytes) -> float:
    """Bits to code ``text`` by the byte frequencies of ``training``, one added to each of the 256 counts (Laplace).

    >>> unigram_bits(b"", b"ab")  # knows nothing: 8 bits a byte
    16.0
    """
    counts = Counter(training)
    total = len(training) + 256
    return sum(times * -math.log2((counts[byte] + 1) / total) for byte, times in Counter(text).items())


def _deflate_primed(training: bytes, text: bytes) -> int:
    compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zdict=training[-ZLIB_WINDOW:])
    return len(compressor.compress(text) + compressor.flush())


def _xz_increase(primer: bytes, text: bytes) -> int:
    # A dictionary of both texts' length, so that all of the primer is within reach; preset 6 otherwise.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": max(1 << 12, len(primer) + len(text))}]
    with ThreadPoolExecutor(2) as threads:  # lzma lets go of the interpreter while it works
        lengths = threads.map(lambda data: len(lzma.compress(data, filters=filters)), (primer + text, primer))
        with_text, without = lengths
    return with_text - without
