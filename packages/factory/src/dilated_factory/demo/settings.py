"""Every size and share of time in the demo, in two sets: the full run, and the quick one that tests use.

Standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DemoSettings:
    """What to build, how to train it and what to compare.

    Attributes:
        minutes: wall time of the whole run, from the first line to the last file.
        context: bytes a training window holds, and the longest the model has seen.
        embed_dim, num_heads, num_layers, segment_lengths, dilation_rates: LongNetLM's.
        peak_learning_rate, weight_decay, betas, warm_up, gradient_clip: AdamW's, the rate rising linearly over a share
            ``warm_up`` of training and falling to 0 as a cosine over the rest.
        length_warm_up: (until this share of the training time, windows of so many bytes); after the last, the context.
        held_out_share, sample_share, comparison_share, writing_share: of the whole time; training takes what is left.
        least_training_share: what training takes even where the stage before it was slow.
        held_out_checks: how often the loss on a few held-out windows is measured during training.
        prime_xz: whether the xz that has read the training text is among the baselines (about 5 s).
        sample_bytes: length of the generated sample, at most.
        comparison_lengths, comparison_heads, comparison_head_dim: sizes of the attention timed against dense.
    """

    minutes: float
    context: int
    embed_dim: int
    num_heads: int
    num_layers: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    peak_learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warm_up: float
    gradient_clip: float
    length_warm_up: tuple[tuple[float, int], ...]
    held_out_share: float
    sample_share: float
    comparison_share: float
    writing_share: float
    least_training_share: float
    held_out_checks: int
    prime_xz: bool
    sample_bytes: int
    comparison_lengths: tuple[int, ...]
    comparison_heads: int
    comparison_head_dim: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for report.json."""
        return asdict(self)


# Chosen by trial on 2 cores of a server (AVX-512, bfloat16) for the lowest held-out loss after two minutes.
FULL = DemoSettings(
    minutes=3.75,
    context=8192,
    embed_dim=128,
    num_heads=2,
    num_layers=4,
    segment_lengths=(256, 1024, 4096, 8192),
    dilation_rates=(1, 4, 16, 32),
    peak_learning_rate=3e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    warm_up=0.05,
    gradient_clip=1.0,
    length_warm_up=((0.2, 512), (0.4, 1024), (0.55, 2048), (0.7, 4096)),
    held_out_share=0.07,
    sample_share=0.03,
    comparison_share=0.2,
    writing_share=0.03,
    least_training_share=0.4,
    held_out_checks=6,
    prime_xz=True,
    sample_bytes=480,
    comparison_lengths=(2048, 4096, 8192, 16384, 32768),
    comparison_heads=4,
    comparison_head_dim=64,
)

QUICK = DemoSettings(
    minutes=0.5,
    context=8192,
    embed_dim=64,
    num_heads=2,
    num_layers=2,
    segment_lengths=(256, 1024, 4096, 8192),
    dilation_rates=(1, 4, 16, 32),
    peak_learning_rate=6e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    warm_up=0.1,
    gradient_clip=1.0,
    length_warm_up=((0.3, 256), (0.6, 1024), (0.8, 4096)),
    held_out_share=0.05,
    sample_share=0.05,
    comparison_share=0.15,
    writing_share=0.1,
    least_training_share=0.3,
    held_out_checks=3,
    prime_xz=False,
    sample_bytes=120,
    comparison_lengths=(2048, 4096, 8192),
    comparison_heads=2,
    comparison_head_dim=32,
)
