"""Which curves share a picture, and where the points lie."""

import math

import numpy as np
import pytest

from genscale.reports.charts import Chart, Curve, charts, draw, number


def curve(values: list[float], name: str = "loss", steps: list[int] | None = None) -> Curve:
    return Curve(name, np.array(steps if steps is not None else range(len(values))), np.array(values, dtype=float))


def titles(metrics: list[dict[str, float]]) -> dict[str, list[str]]:
    return {chart.title: [each.name for each in chart.curves] for chart in charts(metrics)}


def test_a_language_models_metrics() -> None:
    metrics = [
        {
            "step": 1,
            "samples": 8,
            "tokens": 80,
            "seconds": 1.0,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
            "loss": 3.0,
        },
        {"step": 1, "validation_loss": 3.1},
    ]
    assert titles(metrics) == {
        "Loss": ["loss", "validation_loss"],
        "Learning rate": ["learning_rate"],
        "Gradient norm": ["gradient_norm"],
    }


def test_an_adversarial_runs_metrics_need_no_special_case() -> None:
    metrics = [
        {"step": 1, "r1_penalty": 0.1, "discriminator_loss": 0.7, "generator_loss": 1.2, "validation_fid": 30.0},
    ]
    assert titles(metrics) == {
        "Loss": ["discriminator_loss", "generator_loss"],
        "R1 penalty": ["r1_penalty"],
        "Validation fid": ["validation_fid"],
    }


def test_curves_of_very_different_size_are_kept_apart() -> None:
    assert titles([{"step": 1, "loss": 3.0, "z_loss": 120.0}]) == {"Loss": ["loss"], "Z loss": ["z_loss"]}


def test_a_point_lies_where_its_value_is() -> None:
    drawing = draw(Chart("Loss", (curve([4.0, 3.0, 2.0], steps=[0, 50, 100]),)), 0, 100)
    ticks = {float(tick["label"]): tick["top"] for tick in drawing.y_ticks}
    (low, low_top), (high, high_top) = min(ticks.items()), max(ticks.items())
    points = [tuple(map(float, point.split())) for point in drawing.lines[0]["path"].lstrip("M").split("L")]
    assert [left for left, _ in points] == [0, 500, 1000]
    for value, (_, top) in zip((4.0, 3.0, 2.0), points, strict=True):
        expected = low_top + (value - low) / (high - low) * (high_top - low_top)
        assert top / 10 == pytest.approx(expected, abs=0.02)


def test_a_long_curve_keeps_its_peaks_and_only_true_points() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321] = 40.0
    thin = Curve("loss", np.arange(100_000), values).thinned()
    assert len(thin.steps) <= 1002
    assert (thin.values == values[thin.steps]).all()
    assert thin.values.max() == 40.0
    assert (np.diff(thin.steps) > 0).all()
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)


def test_smoothing_follows_the_curve_and_ignores_a_spike() -> None:
    rng = np.random.default_rng(0)
    truth = 2 + np.exp(-np.arange(1000) / 300)
    noisy = truth + rng.normal(scale=0.05, size=1000)
    noisy[500] += 30
    smooth = Curve("loss", np.arange(1000), noisy).smoothed()
    away = np.abs(smooth.values - np.interp(smooth.steps, np.arange(1000), truth))
    assert away[30:-30].max() < 0.04
    assert away.max() < 0.1  # at the ends the window has one side only


def test_only_a_noisy_curve_is_smoothed() -> None:
    steps = np.arange(500)
    schedule = np.minimum(steps / 50, 1.0) * (1 - steps / 500)
    assert not Curve("learning_rate", steps, schedule).is_noisy
    assert Curve("loss", steps, schedule + np.random.default_rng(0).normal(scale=0.01, size=500)).is_noisy


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    drawing = draw(Chart("Loss", (curve([3.0, 2.0, math.nan, 2.5, math.inf, 1.0]),)), 0, 5)
    assert drawing.lines[0]["path"].count("M") == 3
    assert drawing.data["curves"][0]["values"] == [3.0, 2.0, None, 2.5, None, 1.0]


@pytest.mark.parametrize(
    "values", [[2.0], [2.0, 2.0], [0.0, 0.0], [math.nan], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 2e12]]
)
def test_every_curve_has_a_picture(values: list[float]) -> None:
    drawing = draw(Chart("Loss", (curve(values),)), 0, len(values) - 1)
    assert len(drawing.y_ticks) >= 2
    assert len({tick["label"] for tick in drawing.y_ticks}) == len(drawing.y_ticks)
    assert all(-0.01 <= tick["top"] <= 100.01 for tick in drawing.y_ticks)


def test_baselines_and_the_best_are_inside_the_picture() -> None:
    chart = Chart("Loss", (curve([4.0, 3.5, 3.0]),), levels={"3-gram": 1.0, "5-gram": 0.98}, mark=(2, 3.0, "best"))
    drawing = draw(chart, 0, 2)
    first, second = drawing.levels
    assert (first["name"], first["under"], second["name"], second["under"]) == ("3-gram", False, "5-gram", True)
    assert 0 <= first["top"] < second["top"] <= 100
    assert drawing.mark is not None
    assert drawing.mark["left"] == 100


def test_numbers_are_written_with_five_figures() -> None:
    assert [number(value) for value in (2.345678, 12345.6, 1.234567e-4, 0.0, math.nan)] == [
        "2.3457",
        "12,346",
        "1.235e-04",
        "0",
        "not finite",
    ]
