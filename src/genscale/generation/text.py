"""From prompts to text: batches of rows, text as it comes, and where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from genscale.data.tokenizer import Tokenizer
from genscale.objectives.decoding import TextRequest
from genscale.objectives.language import CausalLanguage
from genscale.objectives.objective import Objective
from genscale.recipe.sampling import TextSampling
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

_BROKEN = "\ufffd"  # what bytes that are no whole character decode to
_OVERLAP = 8  # tokens


Stopped = Literal["length", "end", "stop string"]


@dataclass(frozen=True)
class Completion:
    """What was written for a prompt."""

    prompt: str
    text: str
    """Without the prompt, and without the end token or the stop string."""
    index: int
    """The completion's number in the list; prompt p has ``count`` of them from ``p * count`` on."""
    stopped: Stopped


def generate(
    objective: Objective,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: TextSampling,
    count: int = 1,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
    suffixes: Sequence[str] | None = None,
    batch: int = 64,
) -> list[Completion]:
    """Complete each prompt ``count`` times.

    A completion is a function of the weights, the seed, its index and its prompt; it does not depend on ``batch``.
    An empty prompt stands for the start of a document: the end-of-document token, or a line break where the tokenizer
    has none, or its first token where it has no line break either.

    Args:
        sampling: how; its prompts are not used.
        on_text: called with a completion's index and each new piece of its text. Pieces are whole characters and never
            hold any of a stop string; together they are the completion's text.
        suffixes: for each prompt what comes after the completion; for objectives that fill in.
        batch: completions written at a time.

    Raises:
        UserError: a prompt that the tokenizer cannot express, or a suffix for an objective that cannot fill in.
    """
    if "" in sampling.stop:
        raise UserError("sampling.stop: a stop string cannot be empty")
    if suffixes is not None and len(suffixes) != len(prompts):
        raise UserError(f"expected a suffix for each of the {len(prompts)} prompts, not {len(suffixes)}")
    end = tokenizer.end_of_document
    heals = suffixes is None and isinstance(objective, CausalLanguage)
    opened = [_open(tokenizer, prompt, heals) for prompt in prompts]
    starts = [opening.tokens for opening in opened]
    after = None if suffixes is None else [_encode(tokenizer, suffix, "suffix") for suffix in suffixes]

    completions: dict[int, Completion] = {}
    rows = sorted(range(len(prompts) * count), key=lambda index: (len(starts[index // count]), index))
    for chunk in (rows[i : i + batch] for i in range(0, len(rows), batch)):  # of like lengths
        writers = [_Writer(tokenizer, opened[index // count], sampling.stop, index, on_text) for index in chunk]
        request = TextRequest(
            prompts=[starts[index // count] for index in chunk],
            tokens=sampling.tokens,
            suffixes=None if after is None else [after[index // count] for index in chunk],
            beginnings=[opened[index // count].beginnings for index in chunk] if heals else None,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            ends=() if end is None else (end,),
            steps=sampling.steps,
            order=sampling.order,
            watch=partial(_push, writers),
        )
        samples = objective.sample(request, Rng(seed, 0, "sample", torch.tensor(chunk)))
        for index, writer, sample in zip(chunk, writers, samples, strict=True):
            writer.finish()
            stopped: Stopped = "stop string" if writer.stopped else "end" if sample.stopped == "end" else "length"
            completions[index] = Completion(prompts[index // count], writer.text, index, stopped)
    return [completions[index] for index in sorted(completions)]


class _Opening(NamedTuple):
    """What a completion starts from."""

    tokens: list[int]
    known: list[int]
    """Tokens of the text that must not be written again: the prompt's."""
    beginnings: list[int] | None
    """The tokens that the first new one is chosen from; None for all."""


def _open(tokenizer: Tokenizer, prompt: str, heals: bool) -> _Opening:
    """The prompt in tokens; where it may end inside a token, its last token is left to be chosen anew.

    ``"def "`` is ``def`` and a space, but in the training text that space begins the next token, so that a network has
    hardly ever seen what follows a lone one. So the last token is taken back, and the first new one must begin with its
    text.
    """
    whole = _encode(tokenizer, prompt, "prompt")
    if not whole:
        first = [_first_token(tokenizer)]
        return _Opening(first, first, None)
    beginnings = tokenizer.tokens_beginning_with(whole[-1]) if heals else [whole[-1]]
    if len(beginnings) == 1:
        return _Opening(whole, whole, None)
    before = whole[:-1] or [_first_token(tokenizer)]
    return _Opening(before, [*before, whole[-1]], beginnings)


def _encode(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UserError as error:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise UserError(f"{what} {shown!r}: {error}") from None


def _first_token(tokenizer: Tokenizer) -> int:
    """What an empty prompt starts from."""
    if tokenizer.end_of_document is not None:
        return tokenizer.end_of_document
    try:
        return tokenizer.encode("\n")[-1]
    except UserError:  # characters, and none of them a line break
        return 0


def _push(writers: Sequence[_Writer], row: int, token: int) -> bool:
    return writers[row].push(token)


class _Writer:
    """Turns the tokens of one completion into text as they come, and watches for stop strings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        opening: _Opening,
        stop: Sequence[str],
        index: int,
        on_text: Callable[[int, str], None] | None,
    ):
        self.text = ""
        self.stopped = False  # by a stop string
        self._tokenizer = tokenizer
        self._stop = stop
        self._index = index
        self._on_text = on_text
        # Tokens are decoded after some before them: in some tokenizers the first token of a text loses its space.
        self._tokens = opening.tokens[-_OVERLAP:]
        taken_back = opening.known[len(opening.tokens) :]
        self._known = tokenizer.decode(
            [*self._tokens, *taken_back]
        )  # what of their text has been passed on, or came before
        self._held = ""  # text that may be the start of a stop string

    def push(self, token: int) -> bool:
        """Take a token; true once the text holds a stop string."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(_BROKEN):  # else a character may be under way
            self._accept(text[len(self._known) :])
            if len(self._tokens) > 4 * _OVERLAP:
                self._tokens = self._tokens[-_OVERLAP:]
                text = self._tokenizer.decode(self._tokens)
            self._known = text
        return self.stopped

    def finish(self) -> None:
        """No more tokens: what is left of the text, without a character that never became whole."""
        if not self.stopped:
            self._accept(self._tokenizer.decode(self._tokens)[len(self._known) :].rstrip(_BROKEN))
        if not self.stopped:
            self._emit(self._held)

    def _accept(self, piece: str) -> None:
        """Pass on new text, as far as no stop string can begin in it."""
        for character in piece:
            self._held += character
            found = [stop for stop in self._stop if self._held.endswith(stop)]
            if found:
                self.stopped = True
                self._emit(self._held[: -max(map(len, found))])
                return
        starts = (n for n in range(len(self._held)) if any(stop.startswith(self._held[n:]) for stop in self._stop))
        cut = next(starts, len(self._held))
        ready, self._held = self._held[:cut], self._held[cut:]
        self._emit(ready)

    def _emit(self, text: str) -> None:
        self.text += text
        if text and self._on_text is not None:
            self._on_text(self._index, text)
