"""Text as it comes: whole characters, stop strings that never show, and the same text at any batch size."""

import pytest
from torch import nn

from genscale.data.description import TextDescription
from genscale.data.tokenizer import character_tokenizer, train_bpe
from genscale.generation.text import Completion, generate
from genscale.objectives.build import build_objective
from genscale.objectives.decoding import TextSample, Transcript
from genscale.recipe.model import TransformerModel
from genscale.recipe.objective import InfillObjective, MaskedObjective
from genscale.recipe.sampling import TextSampling
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

BYTES = train_bpe(["the cat sat on the mat, the cat"], 260)  # nearly bytes: characters are spread over tokens
LETTERS = character_tokenizer("abcdefgh \n")


class Script(nn.Module):
    """Writes given tokens for each row, through the same bookkeeping as the real samplers."""

    def __init__(self, *texts):
        super().__init__()
        self.texts = texts
        self.requests = []

    def sample(self, request, rng):
        self.requests.append(request)
        transcript = Transcript(request, [request.tokens] * len(request.prompts))
        for step in range(request.tokens):
            for row, position in enumerate(rng.positions.tolist()):
                text = self.texts[position % len(self.texts)]
                if step < len(text):
                    transcript.take(row, text[step])
        return transcript.samples()


def write(text, tokenizer=BYTES, end=False, **how):
    """The completion of one scripted text, and its pieces as they came."""
    tokens = text if isinstance(text, list) else tokenizer.encode(text)
    tokens = [*tokens, *([tokenizer.end_of_document] if end else [])]
    pieces = []
    sampling = TextSampling(tokens=len(tokens), **how)
    (done,) = generate(Script(tokens), tokenizer, ["x" if tokenizer is BYTES else "a"], sampling,
                       on_text=lambda index, piece: pieces.append(piece))  # fmt: skip
    assert "".join(pieces) == done.text
    return done, pieces


TEXT = "naïve 日本語 👩‍👩‍👧 the end"


def test_pieces_are_whole_characters():
    assert len(BYTES.encode(TEXT)) > len(TEXT)
    done, pieces = write(TEXT)
    assert done.text == TEXT
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_length_is_left_out():
    done, _ = write(BYTES.encode("ab日")[:-1])
    assert done.text == "ab"


def test_bytes_that_are_no_character_are_shown_as_such_and_do_not_hold_up_the_rest():
    stray = next(i for i in range(256) if BYTES.decode_bytes([i]) == b"\x80")
    done, _ = write([*BYTES.encode("ab"), stray, *BYTES.encode("cd")])
    assert done.text == "ab\ufffdcd"


def test_long_texts_decode_as_at_once():
    text = "日本 the cat 語 sat " * 30
    assert write(text)[0].text == text


@pytest.mark.parametrize("stop", ["<stop>", "日本語", "<s", "p"])
def test_stop_strings_end_the_text_and_never_show(stop):
    done, pieces = write(f"one <st two {stop} three", stop=(stop,))
    assert done.text == f"one <st two {stop} three".split(stop)[0]
    assert done.stopped == "stop string"
    assert not any(stop in piece for piece in pieces)


def test_text_held_back_for_a_stop_string_comes_after_all():
    done, pieces = write("one <sto", stop=("<stop>",))
    assert done.text == "one <sto"
    assert done.stopped == "length"
    assert pieces[-1] == "<sto"
    done, _ = write("ababac ", stop=("abac", "zz"))
    assert done.text == "ab"
    assert done.stopped == "stop string"


def test_the_end_token_ends_the_text():
    done, _ = write("the cat", end=True)
    assert (done.text, done.stopped) == ("the cat", "end")
    done, _ = write("bad", LETTERS, end=True)
    assert (done.text, done.stopped) == ("bad", "end")


def test_an_empty_prompt_starts_a_document():
    for tokenizer, first in (
        (BYTES, BYTES.end_of_document),
        (LETTERS, LETTERS.end_of_document),
        (character_tokenizer("ab\n", end_of_document=False), 0),
        (character_tokenizer("abc", end_of_document=False), 0),
        (character_tokenizer("\tabc\n", end_of_document=False), 1),
    ):
        script = Script([0])
        generate(script, tokenizer, [""], TextSampling(tokens=1))
        assert list(script.requests[0].prompts) == [[first]]


def test_a_prompt_without_tokens_for_it_is_a_user_error():
    with pytest.raises(UserError, match=r"prompt 'axe': the character 'x'"):
        generate(Script([0]), LETTERS, ["axe"], TextSampling())
    with pytest.raises(UserError, match=r"suffix 'axe': the character 'x'"):
        generate(Script([0]), LETTERS, ["a"], TextSampling(), suffixes=["axe"])


def test_impossible_requests_are_user_errors():
    with pytest.raises(UserError, match="stop string cannot be empty"):
        generate(Script([0]), LETTERS, ["a"], TextSampling(stop=("",)))
    with pytest.raises(UserError, match="a suffix for each of the 2 prompts, not 1"):
        generate(Script([0]), LETTERS, ["a", "b"], TextSampling(), suffixes=["a"])


def test_completions_come_in_the_order_of_prompts_whatever_their_lengths():
    script = Script(*[LETTERS.encode(letter) for letter in "abcdef"])
    done = generate(script, LETTERS, ["aaaa", "b", "cc"], TextSampling(tokens=1), count=2, batch=4)
    assert [len(request.prompts) for request in script.requests] == [4, 2]
    assert done == [
        Completion(prompt, text, index, "length")
        for index, (prompt, text) in enumerate(zip(["aaaa", "aaaa", "b", "b", "cc", "cc"], "abcdef", strict=True))
    ]


@pytest.mark.parametrize("options", [None, MaskedObjective(), InfillObjective()])
def test_the_same_seed_gives_the_same_text_at_any_batch_size(options):
    shape = TransformerModel(layers=2, width=32, heads=2, context=16, initial_std=0.5)
    recipe = Recipe(model=shape, **({"objective": options} if options else {}))
    tokenizer = character_tokenizer("abcdefgh \n", end_of_document=False)
    objective = build_objective(recipe, TextDescription(tokenizer.size))
    prompts, sampling = ["a", "bad cafe", "", "head"], TextSampling(tokens=24, temperature=1.0)

    def texts(**how):
        return [done.text for done in generate(objective, tokenizer, prompts, sampling, count=3, **how)]

    everything = texts(batch=64, seed=5)
    assert len(set(everything)) == 12
    assert texts(batch=1, seed=5) == everything
    assert texts(batch=5, seed=5) == everything
    assert texts(batch=64, seed=6) != everything


def test_suffixes_reach_the_objective():
    class Filler(Script):
        def sample(self, request, rng):
            assert list(request.suffixes) == [LETTERS.encode("bad")] * 2
            return [TextSample(LETTERS.encode("cafe"), "end")] * 2

    done = generate(Filler([0]), LETTERS, ["a"], TextSampling(), count=2, suffixes=["bad"])
    assert [completion.stopped for completion in done] == ["end", "end"]


def test_a_prompt_that_ends_inside_a_token_may_go_on_with_all_of_it():
    tokenizer = train_bpe(["def cat def hat " * 50], 265)
    (whole,) = tokenizer.encode(" cat")  # the space belongs to the word, so a lone one was never seen in training
    assert len(tokenizer.encode("def ")) == len(tokenizer.encode("def")) + 1
    shape = TransformerModel(layers=1, width=32, heads=2, context=16)
    objective = build_objective(Recipe(model=shape), TextDescription(tokenizer.size))
    network = objective.networks["model"]

    def forced(tokens, cache=None):
        """The logits of a network that always wants `` cat``."""
        logits = original(tokens, cache=cache) * 0
        logits[..., whole] = 20.0
        return logits

    original, network.forward = network.forward, forced
    sampling, pieces = TextSampling(tokens=1, temperature=0), []
    (healed,) = generate(objective, tokenizer, ["def "], sampling, on_text=lambda index, piece: pieces.append(piece))
    assert healed.text == "cat", "the prompt's own space is not written twice"
    assert "".join(pieces) == "cat"
    (free,) = generate(objective, tokenizer, ["def"], sampling)
    assert free.text == " cat"
    (bound,) = generate(objective, tokenizer, ["def c"], sampling)
    assert bound.text == "at"
    (other,) = generate(objective, tokenizer, ["def z"], sampling)
    assert other.text == " cat", "nothing else begins with z: the prompt stays whole"
