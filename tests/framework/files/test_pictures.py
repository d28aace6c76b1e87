"""Smoothing, and what the picture of a run shows."""

import math

import pytest

from orthotrain.files import pictures
from orthotrain.files.pictures import draw_curves, smoothed


def test_smoothing_keeps_steps_and_ends_and_removes_noise():
    noisy = [(step, step + (-1) ** step) for step in range(100)]
    line = smoothed(noisy)
    assert [step for step, _ in line] == list(range(100)) and line[0] == (0, 1.0)
    assert all(abs(value - step) < 0.2 for step, value in line[5:95])
    assert smoothed(noisy[:19]) == noisy[:19] and smoothed([]) == []
    broken = [(step, math.nan if step == 50 else 1.0) for step in range(100)]
    assert [value for _, value in smoothed(broken)] == [1.0] * 99


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw curves; give the axes of the picture by their titles."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or save(figure, path))

    def draw(curves):
        assert draw_curves(curves, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        return {axes.get_title(): axes for axes in figures[-1].axes}

    return draw


def test_a_panel_for_the_losses_the_rates_and_the_speed(drawn):
    steps = range(9, 400, 10)
    curves = {"train_loss": [(s, 4.0) for s in steps], "val_loss": [(0, 8.366), (199, 5.0), (399, 4.304)]}
    rates = {"lr/rotations": [(s, 1e-3) for s in steps], "lr/other": [(s, 1e-3) for s in steps]}
    panels = drawn({**curves, **rates, "lr/head": [(s, 2e-3) for s in steps], "tokens_per_second": [(9, 4000.0)]})
    assert list(panels) == ["loss", "learning rate", "tokens per second"]
    raw, line, validation = panels["loss"].lines
    assert raw.get_alpha() < 0.5 and line.get_alpha() is None
    assert validation.get_label() == "validation, 8.366 to 4.304" and list(validation.get_xdata()) == [0, 199, 399]
    # equal rates are one line, which would hide the other
    assert [line.get_label() for line in panels["learning rate"].lines] == ["rotations, other", "head"]


def test_a_picture_of_few_or_no_points(drawn):
    assert list(drawn({"train_loss": [(1, 3.0)], "val_loss": [(0, 2.0)]})) == ["loss"]
    assert list(drawn({"train_loss": []})) == ["loss"]
