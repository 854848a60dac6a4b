"""Sampling from masked diffusion: start from masks, and turn some into tokens at each step, never back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.objectives.decoding import TextRequest, TextSample, Transcript, choose, evaluating
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng


def unmask(
    network: nn.Module, request: TextRequest, rng: Rng, context: int, vocabulary: int, mask: int
) -> list[TextSample]:
    """Write the new tokens in blocks of at most half the context, each by unmasking (LLaDA, Nie et al. 2025).

    The network always sees a full window, as in training: text before the block, the block, the suffix if there is
    one, and masks up to the end. With ``order="random"`` and a step for each token this draws from the network's own
    distribution; fewer steps draw several tokens at once as if they were independent. ``order="confidence"`` unmasks
    what the network is surest of first: often better text, but no longer the learned distribution.

    Args:
        network: logits (rows, context, at least vocabulary) from tokens (rows, context), both ways.
        mask: the mask's id; ids from ``vocabulary`` on are never written.
    """
    longest = max(1, context // 2)
    if request.suffixes is not None and request.tokens > longest:
        raise UserError(f"sampling.tokens: filling in takes at most half the context ({longest}), not {request.tokens}")
    texts = [list(prompt) for prompt in request.prompts]
    suffixes = [list(suffix) for suffix in request.suffixes] if request.suffixes is not None else [[] for _ in texts]
    transcript = Transcript(request, [request.tokens] * len(texts))
    with evaluating(network) as device:
        for start in range(0, request.tokens, longest):
            size = min(longest, request.tokens - start)
            window = torch.full((len(texts), context), mask)
            first = torch.empty(len(texts), 1, dtype=torch.long)  # where each row's block begins
            for row, (text, suffix) in enumerate(zip(texts, suffixes, strict=True)):
                room = context - size
                after = suffix[: max(room // 2, room - len(text))]
                before = text[max(0, len(text) - (room - len(after))) :]
                first[row] = len(before)
                window[row, : len(before)] = torch.tensor(before, dtype=torch.long)
                window[row, len(before) + size :][: len(after)] = torch.tensor(after, dtype=torch.long)
            block = (first + torch.arange(size)).to(device)  # (rows, size): its places in the window
            steps = max(1, round(size * min(1.0, (request.steps or request.tokens) / request.tokens)))
            written = _unmask_block(network, window.to(device), block, steps, request, rng, start, vocabulary, mask)
            for row, tokens in enumerate(written.tolist()):
                texts[row] += tokens
                for token in tokens:
                    transcript.take(row, token)
            if all(map(transcript.stopped, range(len(texts)))):
                break
    return transcript.samples()


def _unmask_block(
    network: nn.Module,
    window: Tensor,
    block: Tensor,
    steps: int,
    request: TextRequest,
    rng: Rng,
    start: int,
    vocabulary: int,
    mask: int,
) -> Tensor:
    """(rows, size) the tokens that the masks at ``block`` turn into; equally many at each step."""
    size = block.shape[1]
    order = rng.bits(f"order {start}", (size,)).argsort(dim=1).to(window.device)  # (rows, size)
    done = 0
    for step in range(steps):
        until = size * (step + 1) // steps
        uniform = rng.uniform(f"tokens {start} {step}", (size,)).to(window.device)
        logits = network(window)
        if request.order == "random":
            chosen = order[:, done:until]  # (rows, until - done): places in the block
            places = block.gather(1, chosen)
            tokens, _ = _draw(logits, window, places, request, uniform.gather(1, chosen), vocabulary, mask)
        else:
            tokens, confidence = _draw(logits, window, block, request, uniform, vocabulary, mask)
            confidence = confidence.masked_fill(window.gather(1, block) != mask, -torch.inf)
            chosen = confidence.topk(until - done, dim=1).indices
            tokens = tokens.gather(1, chosen)
        window.scatter_(1, block.gather(1, chosen), tokens)
        done = until
    return window.gather(1, block)


def _draw(
    logits: Tensor, window: Tensor, places: Tensor, request: TextRequest, uniform: Tensor, vocabulary: int, mask: int
) -> tuple[Tensor, Tensor]:
    """(rows, places) tokens drawn for these places of the window, and the network's own log-probability of each."""
    rows, count = places.shape
    scores = logits[torch.arange(rows, device=places.device)[:, None], places, :vocabulary].float()
    flat = scores.reshape(rows * count, vocabulary)
    seen = None
    if request.repetition_penalty != 1:
        seen = _seen(window, mask, vocabulary).repeat_interleave(count, dim=0)
    tokens = choose(flat, request, seen, uniform.reshape(-1)).view(rows, count)
    return tokens, scores.log_softmax(dim=-1).gather(2, tokens[..., None]).squeeze(2)


def _seen(window: Tensor, mask: int, vocabulary: int) -> Tensor:
    """(rows, vocabulary) bool: the tokens in each window that are not masks."""
    seen = torch.zeros(len(window), mask + 1, dtype=torch.bool, device=window.device)
    return seen.scatter_(1, window, True)[:, :vocabulary]
