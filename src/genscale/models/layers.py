"""The layers that models are built of. Parallelism attaches to them by type, one rule each."""

from genscale.models.attention import Attention, attend
from genscale.models.cache import KeyValueCache
from genscale.models.embedding import Embedding, Head, in_compute_dtype
from genscale.models.feed_forward import FeedForward
from genscale.models.mask import AttentionMask
from genscale.models.normalisation import Norm
from genscale.models.rotary import Rotary, Rotation, rotate

__all__ = [
    "Attention",
    "AttentionMask",
    "Embedding",
    "FeedForward",
    "Head",
    "KeyValueCache",
    "Norm",
    "Rotary",
    "Rotation",
    "attend",
    "in_compute_dtype",
    "rotate",
]
