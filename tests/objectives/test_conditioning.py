"""What a model is told of its images: chosen by the recipe and the data, and asked for in requests."""

import pytest
import torch

from genscale.data.description import ImageDescription
from genscale.objectives.conditioning import Conditioning
from genscale.objectives.image_request import ImageRequest
from genscale.runtime.errors import UserError

LABELLED = ImageDescription(1, 8, ("cat", "dog", "owl"))
CAPTIONED = ImageDescription(1, 8, (), caption_vocabulary=300, caption_tokens=4)
BOTH = ImageDescription(1, 8, ("cat", "dog"), caption_vocabulary=300, caption_tokens=4)
BARE = ImageDescription(1, 8)


@pytest.mark.parametrize(
    ("asked", "described", "kind"),
    [
        ("auto", LABELLED, "class"),
        ("auto", CAPTIONED, "text"),
        ("auto", BOTH, "class"),
        ("auto", BARE, "none"),
        ("text", BOTH, "text"),
        ("none", BOTH, "none"),
    ],
)
def test_the_condition_is_what_the_data_has(asked, described, kind):
    assert Conditioning.of(asked, 0.1, described).kind == kind


def test_a_condition_that_the_data_lacks_is_refused():
    with pytest.raises(UserError, match="'class' needs images with labels; the data has none, so use 'text' or 'none'"):
        Conditioning.of("class", 0.1, CAPTIONED)
    with pytest.raises(UserError, match="'text' needs images with captions; the data has none, so use 'class' or"):
        Conditioning.of("text", 0.1, LABELLED)
    with pytest.raises(UserError, match="'class' needs images with labels; the data has none, so use 'none'"):
        Conditioning.of("class", 0.1, BARE)


def test_unknown_labels_and_dropped_conditions_are_none():
    by_class = Conditioning.of("class", 0.1, LABELLED)
    told = by_class.condition(torch.tensor([2, -1, 0]), None)
    assert told.labels.tolist() == [2, 3, 0]
    assert by_class.left_out(told, torch.tensor([True, False, False])).labels.tolist() == [3, 3, 0]
    assert by_class.nothing(2, torch.device("cpu")).labels.tolist() == [3, 3]
    by_text = Conditioning.of("text", 0.1, BOTH)
    captions = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]])
    told = by_text.condition(torch.tensor([0, 1]), captions)
    assert told.labels is None
    assert by_text.left_out(told, torch.tensor([False, True])).captions.tolist() == [[5, 6, 0, 0], [0, 0, 0, 0]]
    assert by_text.nothing(1, torch.device("cpu")).captions.tolist() == [[0, 0, 0, 0]]
    assert Conditioning.of("none", 0.1, BOTH).condition(torch.tensor([0, 1]), captions) == (None, None)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("conditioning", "request_", "message"),
    [
        (("none", 0.1, BARE), ImageRequest(guidance=2.0), r"guidance: 2 needs a model trained with a condition \("),
        (("none", 0.1, LABELLED), ImageRequest(labels=LABELS), "was not trained on classes"),
        (("class", 0.1, LABELLED), ImageRequest(captions=LABELS[:, None]), "was not trained on captions"),
        (("class", 0.0, LABELLED), ImageRequest(labels=LABELS, guidance=3.0), "condition_dropout was 0"),
        (("class", 0.1, LABELLED), ImageRequest(guidance=3.0), "needs labels to follow"),
        (("text", 0.1, CAPTIONED), ImageRequest(guidance=3.0), "needs captions to follow"),
        (("class", 0.1, LABELLED), ImageRequest(labels=LABELS + 2), "3 is not a class: they are 0 to 2"),
        (("class", 0.0, LABELLED), ImageRequest(), "never without a class"),
        (("class", 0.0, LABELLED), ImageRequest(labels=LABELS - 1), "never without a class"),
        (("text", 0.0, CAPTIONED), ImageRequest(), "never without a caption"),
    ],
)
def test_requests_for_what_was_not_learned_are_refused(conditioning, request_, message):
    with pytest.raises(UserError, match=message):
        Conditioning.of(*conditioning).check(request_)


def test_requests_for_what_was_learned_are_not():
    Conditioning.of("class", 0.1, LABELLED).check(ImageRequest(labels=LABELS - 1, guidance=3.0))
    Conditioning.of("class", 0.0, LABELLED).check(ImageRequest(labels=LABELS))
    Conditioning.of("none", 0.1, BARE).check(ImageRequest())
