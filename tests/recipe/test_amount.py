import pytest

from genscale.recipe.amount import Amount, Clock


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5M tokens", 5e6, "tokens"),
        ("1.5k samples", 1500, "samples"),
        ("64 images", 64, "samples"),
        ("1 step", 1, "steps"),
        ("0.5 epochs", 0.5, "epochs"),
        ("3%", 3, "%"),
        ("50_257 tokens", 50257, "tokens"),
        ("1e3 tokens", 1000, "tokens"),
        ("4.35M tokens", 4_350_000, "tokens"),  # 4.35 * 10**6 in floats is not a whole number
        ("15T tokens", 15e12, "tokens"),
    ],
)
def test_an_amount_is_read_as_people_write_it(text, value, unit):
    assert Amount.parse(text) == Amount(value, unit)


@pytest.mark.parametrize("text", ["5", "5 parsecs", "tokens", "-3 steps", "", "5 M M tokens", 5, None, True])
def test_what_is_no_amount_says_what_one_looks_like(text):
    with pytest.raises(ValueError, match=r"expected an amount such as '5M tokens'.* not "):
        Amount.parse(text)


@pytest.mark.parametrize("value", [0, 1, 2.5, 999, 1000, 1_536_000, 524_288, 1_234_567, 1e12, 7e20, 1e-5, 0.1, 1 / 3])
@pytest.mark.parametrize("unit", ["tokens", "samples", "steps", "epochs", "%"])
def test_an_amount_reads_back_what_it_prints(value, unit):
    amount = Amount(value, unit)
    assert Amount.parse(str(amount)) == amount


@pytest.mark.parametrize(("value", "printed"), [(5e6, "5M tokens"), (1536000, "1.536M tokens"), (12, "12 tokens")])
def test_an_amount_prints_short(value, printed):
    assert str(Amount(value, "tokens")) == printed


@pytest.mark.parametrize(
    ("text", "samples"),
    [("64 samples", 64), ("2560 tokens", 10), ("3 steps", 96), ("2 epochs", 2000), ("5%", 25), ("2500 tokens", 10)],
)
def test_every_unit_turns_into_samples(text, samples):
    clock = Clock(tokens_per_sample=256, samples_per_step=32, samples_per_epoch=1000, samples_in_budget=500)
    assert Amount.parse(text).samples(clock) == samples


def test_a_unit_without_a_size_is_refused():
    with pytest.raises(ValueError, match="'2 epochs' cannot be used here"):
        Amount.parse("2 epochs").samples(Clock(tokens_per_sample=256))


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="not 'parsecs'"):
        Amount(3, "parsecs")
