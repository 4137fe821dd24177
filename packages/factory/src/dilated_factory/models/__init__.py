"""Language and encoder models of dilated attention, assembled by the factory."""

from dilated_factory.models.language_model import LongNetLM
from dilated_factory.models.layers import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    FeedForward,
)
from dilated_factory.models.longnet import LongNet
from dilated_factory.models.positions import RotaryPositions, XPOSPositions

__all__ = [
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "FeedForward",
    "LongNet",
    "LongNetLM",
    "RotaryPositions",
    "XPOSPositions",
]
