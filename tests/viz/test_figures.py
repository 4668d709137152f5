"""Figures: what is drawn, what is refused, and that matplotlib is left as it was."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from invlib import experiments, viz
from invlib.core.reconstruction import Frames, History, Reconstruction
from invlib.errors import ConfigError, DependencyError


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recording(count, images):
    frames = Frames(every=10)
    frames.steps = [10 * index for index in range(count)]
    frames.images = [images * index / count for index in range(count)]
    return frames


def run_of(cost):
    return Reconstruction(
        images=torch.zeros(1, 1, 2, 2),
        labels=None,
        score=0.0,
        trial_scores=torch.zeros(cost.shape[1]),
        trials=torch.zeros(cost.shape[1], 1, 1, 2, 2),
        status="max_steps",
        seconds=0.0,
        history=History(steps=list(range(len(cost))), cost=cost, objective=cost),
    )


class TestCompare:
    def test_rows_hold_the_original_and_the_reconstruction(self, images):
        axes = viz.compare(images, 0.5 * images).axes
        assert len(axes) == 6
        drawn = [np.asarray(panel.images[0].get_array()) for panel in axes]
        np.testing.assert_allclose(drawn[1], images[1].permute(1, 2, 0), atol=1e-6)
        np.testing.assert_allclose(drawn[4], 0.5 * images[1].permute(1, 2, 0), atol=1e-6)

    def test_caption_is_the_psnr(self, images):
        axes = viz.compare(images, (images - 0.1).abs()).axes
        expected = -10 * np.log10(((images[2] - (images[2] - 0.1).abs()) ** 2).mean().item())
        assert axes[5].get_xlabel() == f"{expected:.1f} dB"
        assert [panel.get_xlabel() for panel in axes[:3]] == ["", "", ""]

    def test_an_image_that_was_not_found_leaves_its_place_empty(self, images):
        found = replace(run_of(torch.zeros(1, 1)), images=images[[2, 0]])
        axes = viz.compare(images, {"two": found, "none": replace(found, images=images[:0])}).axes
        assert [panel.get_xlabel() for panel in axes[3:]] == [
            "exact",
            "not found",
            "exact",
            *["not found"] * 3,
        ]
        drawn = [np.asarray(panel.images[0].get_array()) for panel in axes]
        np.testing.assert_allclose(drawn[5], images[2].permute(1, 2, 0), atol=1e-6)
        assert np.ptp(drawn[4]) == 0

    def test_identical_images_are_called_exact(self, images):
        assert viz.compare(images, images).axes[3].get_xlabel() == "exact"

    def test_several_reconstructions_have_a_row_each(self, images):
        axes = viz.compare(images, {"l2": 0.5 * images, "cosine": 0.9 * images}).axes
        assert [axes[row].get_ylabel() for row in (0, 3, 6)] == ["original", "l2", "cosine"]

    def test_a_reconstruction_is_put_in_the_order_of_the_truth_and_images_are_left(self, images):
        shuffled = images[[2, 0, 1]] * 0.9
        result = replace(run_of(torch.ones(1, 1)), images=shuffled)
        axes = viz.compare(images, {"an attack": result, "images": shuffled}).axes
        drawn = [np.asarray(panel.images[0].get_array()) for panel in axes[3:]]
        ordered = (images * 0.9).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(drawn[:3], ordered, atol=1e-6)
        np.testing.assert_allclose(drawn[3:], ordered[[2, 0, 1]], atol=1e-6)

    def test_titles_and_max_images(self, images):
        axes = viz.compare(images, images, titles=["a", "b", "c"], max_images=2).axes
        assert len(axes) == 4
        assert [panel.get_title() for panel in axes[:2]] == ["a", "b"]

    def test_grey_images_are_drawn_grey(self):
        axes = viz.compare(torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.5)).axes
        assert axes[0].images[0].get_cmap().name == "gray"
        assert axes[0].images[0].get_clim() == (0, 1)

    def test_shape_mismatch(self, images):
        with pytest.raises(ConfigError, match=r"reconstruction .* \(3, 3, 8, 8\), got \(2, 3, 8, 8\)"):
            viz.compare(images, images[:2])

    def test_wrong_number_of_titles(self, images):
        with pytest.raises(ConfigError, match="titles must have one entry for each of the 3 images, got 1"):
            viz.compare(images, images, titles=["a"])

    def test_nothing_to_compare(self, images):
        with pytest.raises(ConfigError, match="reconstruction is empty"):
            viz.compare(images, {})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"1 or 3 channels, got \(2, 4, 8, 8\)"),
        (torch.zeros(8, 8), r"got \(8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), -2.0), r"must lie in \[0, 1\], found values from -2 to -2"),
        (torch.full((1, 3, 8, 8), 1.5), r"must lie in \[0, 1\], found values from 1.5 to 1.5"),
        (torch.full((1, 3, 8, 8), float("nan")), r"must lie in \[0, 1\], found values from nan"),
        ([[0.0]], "must be a tensor or an array, got list"),
    ],
)
def test_pictures_that_are_none(bad, message):
    with pytest.raises(ConfigError, match=message):
        viz.grid(bad)


class TestGrid:
    def test_captions_and_empty_places(self, images):
        axes = viz.grid(images, ["a", "b", "c"], columns=2).axes
        assert [panel.get_xlabel() for panel in axes] == ["a", "b", "c", ""]
        assert not axes[3].axison

    def test_single_image_and_array(self, images):
        assert len(viz.grid(images[0].numpy()).axes) == 1

    def test_large_images_are_smoothed_and_small_ones_are_not(self):
        small, large = torch.zeros(3, 32, 32), torch.zeros(3, 224, 224)
        assert viz.grid(small).axes[0].images[0].get_interpolation() == "nearest"
        assert viz.grid(large).axes[0].images[0].get_interpolation() == "antialiased"

    def test_columns(self, images):
        with pytest.raises(ConfigError, match="columns must be at least 1, got 0"):
            viz.grid(images, columns=0)

    def test_few_images_fit_a_phone(self):
        # 360 pixels less the margins, of figures shown at 144 x 0.41 dots an inch, are 5.5 inches.
        few, many = (viz.grid(torch.zeros(n, 1, 8, 8)).get_figwidth() for n in (4, 7))
        assert few <= 5.5 < many


class TestFilmstrip:
    def test_first_and_last_frames_are_among_those_chosen(self, images):
        axes = viz.filmstrip(recording(11, images[:1]), count=3).axes
        assert [panel.get_title() for panel in axes] == ["step 0", "step 50", "step 100"]

    def test_original_comes_last_and_frames_carry_psnr(self, images):
        axes = viz.filmstrip(recording(4, images[:1]), count=2, original=images[:1]).axes
        assert axes[-1].get_title() == "original"
        assert axes[0].get_xlabel().endswith(" dB")

    def test_a_batch_has_a_row_for_each_image(self, images):
        assert len(viz.filmstrip(recording(5, images), count=4).axes) == 12

    def test_no_frames(self):
        with pytest.raises(ConfigError, match="frames is empty"):
            viz.filmstrip(Frames(every=10))

    def test_frames_of_two_shapes(self, images):
        with pytest.raises(ConfigError, match=r"'?b'? must have .* \(3, 3, 8, 8\), got \(1, 3, 8, 8\)"):
            viz.filmstrip({"a": images, "b": images[:1]})

    def test_count(self, images):
        with pytest.raises(ConfigError, match="count must be at least 2, got 1"):
            viz.filmstrip({"a": images}, count=1)


class TestConvergence:
    def test_best_restart_is_strong_and_named(self):
        cost = torch.tensor([[1.0, 1.0, float("nan")], [0.5, 0.1, float("nan")]])
        lines = viz.convergence({"Adam": run_of(cost)}).axes[0].lines
        assert [line.get_alpha() for line in lines] == [0.25, 1.0, 0.25]
        assert lines[1].get_label() == "Adam"

    def test_a_history_is_enough_and_needs_no_legend(self):
        axes = viz.convergence(run_of(torch.rand(4, 1)).history, log=False, ylabel="cost").axes[0]
        assert not axes.figure.legends
        assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "cost")

    @pytest.mark.parametrize(
        ("runs", "message"),
        [({}, "runs is empty"), ({"L-BFGS": History()}, "history of 'L-BFGS' is empty")],
    )
    def test_nothing_to_draw(self, runs, message):
        with pytest.raises(ConfigError, match=message):
            viz.convergence(runs)


class TestLinesAndBars:
    def test_lines(self):
        axes = viz.lines([1, 10], {"a": [1, 2], "b": [2, 1]}, xlabel="x", ylabel="y", log="xy").axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [line.get_marker() for line in axes.lines] == ["o", "s"]
        assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["a", "b"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10"]

    @pytest.mark.parametrize(("log", "scales"), [("x", ("log", "linear")), ("y", ("linear", "log"))])
    def test_one_logarithmic_axis(self, log, scales):
        axes = viz.lines(range(1, 13), range(1, 13), xlabel="", ylabel="", log=log).axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == scales

    def test_bars_carry_their_numbers(self):
        axes = viz.bars(["a", "b"], {"x": [1.0, 2.0], "y": [3.0, 4.0]}, ylabel="dB").axes[0]
        assert [text.get_text() for text in axes.texts] == ["1.0", "2.0", "3.0", "4.0"]

    @pytest.mark.parametrize(("labels", "angle"), [(["a", "b"], 0), (["pullover"] * 10, 30)])
    def test_long_labels_are_turned(self, labels, angle):
        ticks = viz.bars(labels, [1] * len(labels), ylabel="").axes[0].get_xticklabels()
        assert {tick.get_rotation() for tick in ticks} == {angle}

    @pytest.mark.parametrize(("points", "every"), [(25, 1), (401, 17)])
    def test_markers_do_not_hide_a_long_line(self, points, every):
        line = viz.lines(range(points), range(points), xlabel="", ylabel="").axes[0].lines[0]
        assert line.get_markevery() == every

    def test_faults(self):
        with pytest.raises(ConfigError, match="log must be '', 'x', 'y' or 'xy', got 'z'"):
            viz.lines([1], [1], xlabel="", ylabel="", log="z")
        with pytest.raises(ConfigError, match="'a' must have one entry for each of the 2 points, got 1"):
            viz.lines([1, 2], {"a": [1]}, xlabel="", ylabel="")
        with pytest.raises(ConfigError, match="nothing to draw"):
            viz.bars([], [], ylabel="")


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: viz.compare(x, x),
        lambda x: viz.grid(x),
        lambda x: viz.filmstrip({"a": x, "b": x}),
        lambda x: viz.convergence(run_of(torch.ones(3, 2))),
        lambda x: viz.lines([1, 2], [1, 2], xlabel="", ylabel=""),
        lambda x: viz.bars(["a"], [1], ylabel=""),
    ],
)
def test_no_global_state_is_touched(draw, images):
    before = dict(matplotlib.rcParams)
    random = torch.get_rng_state()
    result = draw(images)
    assert isinstance(result, matplotlib.figure.Figure)
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == [], "an open figure would be shown twice in a notebook"
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: viz.grid(x, columns=1.5),
        lambda x: viz.compare(x, x, max_images=0),
        lambda x: viz.filmstrip({"a": x, "b": x}, count=2.5),
        lambda x: viz.wipe(x, x, places=2.5),
    ],
)
def test_fractions_for_counts_are_named(draw, images):
    with pytest.raises(ConfigError, match=r"must be (at least|from 2)"):
        draw(images)


def test_ticks_keep_the_style_after_it_is_gone():
    axes = viz.lines([1, 2], [1, 2], xlabel="x", ylabel="y").axes[0]
    assert {label.get_fontsize() for label in axes.get_yticklabels()} == {9.0}


def test_style_is_left_after_the_block():
    before = matplotlib.rcParams["axes.spines.top"]
    with viz.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert matplotlib.rcParams["axes.spines.top"] is before


@pytest.mark.parametrize(
    ("package", "draw"),
    [
        ("matplotlib", lambda x: viz.grid(x)),
        ("matplotlib", lambda x: viz.bars(["a"], [1], ylabel="")),
        ("matplotlib", lambda x: experiments.figure("table1-patches")),
        ("matplotlib", lambda x: viz.style().__enter__()),
        ("ipywidgets", lambda x: viz.scrubber({"a": x, "b": x})),
        ("ipywidgets", lambda x: viz.wipe(x, x)),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(package, draw, images, monkeypatch):
    def absent(name, *_):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("invlib.core.optional.import_module", absent)
    with pytest.raises(DependencyError, match=rf"{package}.* is not installed; `pip install invlib\[viz\]`"):
        draw(images)
