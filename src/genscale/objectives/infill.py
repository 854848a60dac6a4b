"""Rearrangements of text that make a causal network learn to fill in: the middle, or many spans.

Both work on a whole batch by arithmetic on where each token goes, without a loop over samples, and keep shapes fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from genscale.runtime.randomness import Rng

MIDDLE_SENTINELS = ("prefix", "suffix", "middle", "end")


def rearrange_middle(
    tokens: Tensor, valid: Tensor, special: dict[str, int], rate: float, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Fill-in-the-middle, prefix-suffix-middle (Bavarian et al. 2022, section 3).

    A share ``rate`` of the windows becomes ``<prefix> p <suffix> s <middle> m <end>``, cut at two random places; the
    rest stay as they are. The length stays as it is, so a rearranged window loses its last four tokens of text.
    (The paper ends the middle with the end-of-text token; a sentinel of our own also serves tokenizers without one.)

    Args:
        tokens: (batch, time) int64.
        valid: (batch, time) bool: which tokens count. After a window's last valid token comes padding; it stays last.
        special: the sentinels' ids, by the names in :data:`MIDDLE_SENTINELS`.

    Returns:
        tokens and valid, rearranged alike; sentinels count.
    """
    batch, time = tokens.shape
    index = torch.arange(time, device=tokens.device)  # (time,)
    used = ((index + 1) * valid).amax(dim=1, keepdim=True)  # (batch, 1): length without padding
    length = used.clamp(max=time - len(MIDDLE_SENTINELS))
    cuts = (rng.integers("cuts", 2**62, (2,)) % (length + 1)).sort(dim=1).values
    first, second = cuts[:, :1], cuts[:, 1:]  # (batch, 1): prefix | middle | suffix
    suffix_length = length - second
    destination = torch.where(index < length, index - second + first + 2, index + 4)  # suffix; padding and what is cut
    destination = torch.where(index < second, index + suffix_length + 3, destination)  # middle
    destination = torch.where(index < first, index + 1, destination)  # prefix
    start = torch.zeros_like(first)
    at = {"prefix": start, "suffix": first + 1, "middle": first + suffix_length + 2, "end": length + 3}

    moved = tokens.new_zeros(batch, time + 4).scatter_(1, destination, tokens)
    counts = valid.new_zeros(batch, time + 4).scatter_(1, destination, valid)
    for name, place in at.items():
        moved.scatter_(1, place, special[name])
        counts.scatter_(1, place, True)
    chosen = (rng.uniform("rearranged")[:, None] < rate) & (used > 0)
    return torch.where(chosen, moved[:, :time], tokens), torch.where(chosen, counts[:, :time], valid)


@dataclass(frozen=True)
class SpanLayout:
    """How a window of text is split into corrupted input and targets; the same for every window of a run."""

    text: int
    """Tokens of text."""
    noise: int
    """Of them, tokens in corrupted spans."""
    spans: int

    @property
    def corrupted(self) -> int:
        """Length of the corrupted text: each span is one sentinel."""
        return self.text - self.noise + self.spans

    @property
    def targets(self) -> int:
        """Length of the targets: each span after its sentinel, and the end."""
        return self.noise + self.spans + 1


def span_layout(window: int, noise_density: float, mean_span: float) -> SpanLayout:
    """The most text whose corrupted form and targets fit a window of tokens together (T5's ``random_spans_helper``)."""
    for text in range(window, 1, -1):
        noise = min(max(round(text * noise_density), 1), text - 1)
        spans = min(max(round(noise / mean_span), 1), text - noise)
        layout = SpanLayout(text, noise, spans)
        if layout.corrupted + layout.targets <= window:
            return layout
    raise ValueError(f"a window of {window} tokens is too short for a corrupted span")


def _segments(total: int, count: int, name: str, rng: Rng) -> Tensor:
    """(batch, count) int64: lengths, each at least 1, that add up to ``total``; all such splits are equally likely."""
    breaks = rng.bits(name, (total - 1,)).topk(count - 1, dim=1).indices.sort(dim=1).values + 1
    return torch.diff(pad(pad(breaks, (1, 0)), (0, 1), value=total), dim=1)


def corrupt_spans(
    tokens: Tensor, valid: Tensor, layout: SpanLayout, special: dict[str, int], rng: Rng
) -> tuple[Tensor, Tensor]:
    """T5's span corruption (Raffel et al. 2020, ``random_spans_noise_mask``), for a decoder alone.

    ``a b c d e f g`` becomes ``a <0> d e <1>`` and then ``<0> b c <1> f g <end>``: text and corrupted spans take
    turns, text first. The numbers of corrupted tokens and spans are fixed by ``layout``, so every row is
    ``layout.corrupted + layout.targets`` long.

    Args:
        tokens: (batch, at least layout.text) int64; the rest is left out.
        valid: the same shape, bool.
        special: ids of ``span 0``, ``span 1``, ... and ``end``.

    Returns:
        tokens and valid, rearranged alike; the sentinels of a window count when any of its tokens does.
    """
    text, spans = layout.text, layout.spans
    tokens, valid = tokens[:, :text], valid[:, :text]
    batch = len(tokens)
    noise = _segments(layout.noise, spans, "noise", rng)  # (batch, spans)
    kept = _segments(text - layout.noise, spans, "kept", rng)
    ends = torch.stack((kept, noise), dim=2).view(batch, -1).cumsum(dim=1)  # (batch, 2 spans): where segments end
    index = torch.arange(text, device=tokens.device).expand(batch, text).contiguous()
    segment = torch.searchsorted(ends, index, right=True)  # (batch, text)
    span, corrupted = segment // 2, segment % 2 == 1
    rank = corrupted.long().cumsum(dim=1)  # corrupted tokens so far, this one included
    destination = torch.where(corrupted, layout.corrupted + rank + span, index - rank + span)

    number = torch.arange(spans, device=tokens.device)
    in_text = kept.cumsum(dim=1) + number  # (batch, spans): where each sentinel stands
    in_targets = layout.corrupted + noise.cumsum(dim=1) - noise + number
    sentinels = torch.tensor([special[f"span {i}"] for i in range(spans)], device=tokens.device).expand(batch, spans)
    length = layout.corrupted + layout.targets
    moved = tokens.new_full((batch, length), special["end"]).scatter_(1, destination, tokens)
    moved.scatter_(1, in_text, sentinels).scatter_(1, in_targets, sentinels)
    counts = valid.any(dim=1, keepdim=True).repeat(1, length).scatter_(1, destination, valid)
    return moved, counts
