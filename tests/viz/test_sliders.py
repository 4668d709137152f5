"""Sliders: pages that a browser alone can turn, with text for those who do not see them."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from ipywidgets.embed import dependency_state
from PIL import Image

from invlib import viz
from invlib.core.reconstruction import Frames, Reconstruction
from invlib.errors import ConfigError


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def frames(images):
    recorded = Frames(every=5)
    recorded.steps = list(range(0, 150, 5))
    recorded.images = [images * step / 150 for step in recorded.steps]
    return recorded


def pages(widget):
    return [page.value for page in widget.children[1].children]


def pixels(page, index=0):
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', page)[index]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_slider_is_linked_to_the_pages_in_the_browser(frames):
    widget = viz.scrubber(frames, start=3)
    slider, stack = widget.children
    state = dependency_state(widget)  # what the built page holds
    links = [model["state"] for model in state.values() if model["model_name"] == "LinkModel"]
    assert [(link["source"], link["target"]) for link in links] == [
        ([f"IPY_MODEL_{slider.model_id}", "value"], [f"IPY_MODEL_{stack.model_id}", "selected_index"])
    ]
    assert (slider.value, stack.selected_index) == (3, 3)
    assert slider.max == len(stack.children) - 1


def test_no_more_than_twenty_frames(frames):
    shown = pages(viz.scrubber(frames))
    assert len(shown) == 20
    assert "step 0" in shown[0]
    assert "step 145" in shown[-1]


def test_each_frame_has_its_own_alt_text(frames):
    alts = [re.search(r'alt="([^"]*)"', page)[1] for page in pages(viz.scrubber(frames, alt="astronaut"))]
    assert alts[0] == "astronaut, step 0"
    assert len(set(alts)) == len(alts)


def test_text_is_escaped(images):
    page = pages(viz.scrubber({"a": images, '<b> & "c"': images}, label="x"))[1]
    assert "&lt;b&gt; &amp; &quot;c&quot;" in page
    assert "<b>" not in page


def test_pixels_of_a_batch_lie_side_by_side(images):
    shown = pixels(pages(viz.scrubber({"a": images, "b": images}))[0])
    assert shown.shape == (8, 8 + 2 + 8, 4)
    expected = (images[1].permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(shown[:, 10:, :3], expected)
    assert (shown[:, 8:10, 3] == 0).all()


def test_grey_images(images):
    grey = images[:1, :1]
    shown = pixels(pages(viz.scrubber({"a": grey, "b": grey}))[0])
    assert (shown[..., 0] == shown[..., 1]).all()


def test_original_stands_beside_each_frame_with_the_psnr(images):
    widget = viz.scrubber({"a": images[:1], "b": 0 * images[:1]}, original=images[:1], label="weight")
    first, second = pages(widget)
    assert first.count("<img") == second.count("<img") == 2
    assert "weight a: exact" in first
    assert " dB" in second
    np.testing.assert_array_equal(pixels(second, 1), pixels(first, 0))


def test_wipe_goes_from_reconstruction_to_original(images):
    shown = pages(viz.wipe(images[:1], 0 * images[:1], places=5))
    assert (pixels(shown[0])[..., :3] == 0).all()
    half = pixels(shown[2])
    assert (half[:, 4:, :3] == 0).all()
    assert (half[:, :4, :3] > 0).any()
    np.testing.assert_array_equal(pixels(shown[-1])[..., :3], (images[0].permute(1, 2, 0) * 255).round())
    assert "50% original, 50% reconstruction" in shown[2]


def test_wipe_puts_a_reconstruction_in_the_order_of_the_original(images):
    shuffled = Reconstruction(
        images=images.flip(0),
        labels=None,
        score=0.0,
        trial_scores=torch.zeros(1),
        trials=images.flip(0)[None],
        status="closed_form",
        seconds=0.0,
    )
    first, last = (pixels(pages(viz.wipe(images, shuffled))[place]) for place in (0, -1))
    np.testing.assert_array_equal(first, last)
    one_missing = replace(shuffled, images=images[1:])
    first, last = (pixels(pages(viz.wipe(images, one_missing))[place])[..., :3] for place in (0, -1))
    side = images.shape[-1]
    np.testing.assert_array_equal(first[:, side:], last[:, side:])
    assert np.ptp(first[:, :side]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: viz.scrubber({"a": x}), "needs at least two frames, got 1"),
        (lambda x: viz.scrubber({}), "frames is empty"),
        (lambda x: viz.scrubber({"a": x, "b": x}, start=2), "start must be from 0 to 1, got 2"),
        (
            lambda x: viz.scrubber({"a": x, "b": x}, original=x[:1]),
            "each frame must have the",
        ),
        (lambda x: viz.wipe(x, x[:1]), "reconstruction must have the original's shape"),
        (lambda x: viz.wipe(x, x, places=1), "places must be from 2 to 20, got 1"),
    ],
)
def test_faults(make, message, images):
    with pytest.raises(ConfigError, match=message):
        make(images)
