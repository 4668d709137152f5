"""Metrics by hand, the matching of a batch's order, and the floors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import invlib as iv
from invlib import metrics
from invlib.errors import ConfigError, DataError
from tests.conftest import random_batch


def made(images, labels=None):
    return iv.Reconstruction(
        images=images,
        labels=labels,
        score=0.0,
        trial_scores=torch.zeros(1),
        trials=images[None],
        status="max_steps",
        seconds=0.0,
    )


def test_values_by_hand():
    truth = torch.zeros(2, 1, 2, 2)
    images = torch.stack([torch.full((1, 2, 2), 0.1), torch.zeros(1, 2, 2)])
    assert metrics.mse(images, truth).tolist() == pytest.approx([0.01, 0.0])
    assert metrics.psnr(images, truth).tolist() == pytest.approx([20.0, math.inf])


def test_ssim_is_one_for_the_same_and_low_for_another():
    x, _ = random_batch(2, side=16)
    assert metrics.ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    assert metrics.ssim(x, x.flip(0)).max() < 0.9


def test_ssim_is_the_mean_over_windows_around_every_pixel():
    """Equation 13 of Wang et al., window by window, the borders reflected."""
    x, y = random_batch(2, side=11, dtype=torch.float64)[0]
    place = torch.arange(-5, 6, dtype=torch.float64)
    weight = torch.outer(*[(-place.square() / (2 * 1.5**2)).exp()] * 2)
    weight /= weight.sum()
    wide = [torch.nn.functional.pad(image[None], (5, 5, 5, 5), mode="reflect")[0] for image in (x, y)]
    values = []
    for c, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(11), torch.arange(11)).tolist():
        a, b = (image[c, i : i + 11, j : j + 11] for image in wide)
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        variances = (weight * ((a - mean_a) ** 2 + (b - mean_b) ** 2)).sum()
        covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
        values.append(
            (2 * mean_a * mean_b + 0.01**2)
            * (2 * covariance + 0.03**2)
            / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2))
        )
    expected = torch.stack(values).mean().item()
    assert metrics.ssim(x[None], y[None]).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_refuses_small_images():
    with pytest.raises(ConfigError, match=r"11 pixels a side or more, got \(8, 8\)"):
        metrics.ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    "measure", [metrics.mse, metrics.psnr, metrics.ssim, metrics.matching_order, metrics.lpips]
)
def test_shapes_have_to_agree(measure):
    with pytest.raises(ConfigError, match=r"images have shape \(2, 1, 8, 8\) and the truth \(1, 1, 8, 8\)"):
        measure(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


@given(order=st.permutations(range(5)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_order_of_a_batch_is_found(order):
    truth, _ = random_batch(5, side=12)
    shuffled = truth[list(order)]
    found = metrics.matching_order(shuffled, truth)
    assert torch.equal(shuffled[found], truth)


def test_orders_are_told_apart_by_squared_errors():
    # One large error and none beside it add up to less than two of half its size; their squares do not.
    truth = torch.tensor([[0.0, 0.0], [0.5, 0.05]]).view(2, 1, 1, 2)
    images = torch.tensor([[0.5, 0.05], [1.0, 0.0]]).view(2, 1, 1, 2)
    assert metrics.matching_order(images, truth).tolist() == [0, 1]
    assert metrics.mse(images, truth).mean() < metrics.mse(images.flip(0), truth).mean()


def test_a_report_matches_the_order_first_and_counts_labels():
    truth, _ = random_batch(3, side=12)
    labels = torch.tensor([2, 0, 4])
    report = iv.evaluate(made((truth + 0.01).clamp(0, 1)[[2, 0, 1]], torch.tensor([0, 1, 2])), truth, labels)
    assert report.order == (1, 2, 0)
    assert min(report.psnr) > 39
    assert report.labels_right == 2
    assert "labels right: 2 of 3" in str(report)
    assert "grey image" in str(report)


def test_a_soft_label_counts_as_its_likeliest_class():
    truth, _ = random_batch(2, side=12)
    soft = torch.tensor([[0.1, 0.9, 0.0], [0.6, 0.4, 0.0]])
    assert iv.evaluate(made(truth, soft), truth, torch.tensor([1, 2])).labels_right == 1


def test_fewer_images_than_the_truth_are_matched_to_their_own():
    truth, _ = random_batch(4, side=12)
    found = made((truth + 0.01).clamp(0, 1)[[3, 1]], torch.tensor([7, 5]))
    report = iv.evaluate(found, truth, torch.tensor([0, 5, 7, 6]))
    assert report.order == (-1, 1, -1, 0)
    assert torch.equal(report.images, found.images.flip(0))
    assert len(report.psnr) == len(report.ssim) == len(report.grey_psnr) == len(report.shifts) == 2
    assert min(report.psnr) > 39
    # The 7 is the label of an image that was not found.
    assert report.labels_right == 1
    assert str(report).startswith("found 2 of 4 images\nPSNR")
    assert "labels right: 1 of 2" in str(report)


def test_a_result_without_images_is_reported_as_such():
    truth, labels = random_batch(3, side=12)
    report = iv.evaluate(made(truth[:0], labels[:0]), truth, labels)
    assert str(report) == "found 0 of 3 images: there is nothing to compare"
    assert report.order == (-1, -1, -1)
    assert math.isnan(report.mean_psnr)


def test_the_images_of_a_report_are_in_the_order_of_the_truth():
    truth, _ = random_batch(3, side=12)
    report = iv.evaluate(made(truth[[2, 0, 1]]), truth)
    assert torch.equal(report.images, truth)
    assert "tensor(" not in repr(report)
    assert report == iv.evaluate(made(truth[[2, 0, 1]]), truth)


def test_the_floors_are_what_no_attack_gives():
    truth = torch.stack([torch.full((1, 12, 12), v) for v in (0.2, 0.4)])
    report = iv.evaluate(made(truth), truth)
    assert report.grey_psnr == pytest.approx([-20 * math.log10(0.3), 20.0])
    assert report.mean_image_psnr == pytest.approx([20.0, 20.0], abs=1e-4)
    assert report.labels_right is None


def test_means_over_a_batch_are_means_of_its_numbers():
    truth = torch.stack([torch.full((1, 12, 12), v) for v in (0.2, 0.4)])
    report = iv.evaluate(made(truth + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)), truth)
    assert report.psnr == pytest.approx([20.0, 40.0], abs=1e-3)
    assert report.mean_psnr == pytest.approx(30.0, abs=1e-3)
    assert report.mean_mse == pytest.approx((1e-2 + 1e-4) / 2, rel=1e-4)
    assert report.mean_ssim == pytest.approx(sum(report.ssim) / 2)
    assert "PSNR  30.00 dB" in str(report)
    assert math.isnan(iv.evaluate(made(random_batch(1)[0]), random_batch(1)[0]).mean_ssim)


def test_the_floor_of_one_image_is_its_mean_colour():
    colour = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1)
    stripes = torch.tensor([-0.1, 0.1]).repeat(6)
    truth = (colour + stripes).expand(1, 3, 12, 12)
    assert iv.evaluate(made(truth), truth).mean_image_psnr == pytest.approx([20.0], abs=1e-4)


def test_a_label_counts_as_often_as_both_have_it():
    truth, _ = random_batch(4, side=12)
    found = made(truth, torch.tensor([1, 1, 1, 3]))
    assert iv.evaluate(found, truth, torch.tensor([1, 2, 1, 3])).labels_right == 3


def test_small_images_have_no_ssim():
    truth, _ = random_batch(1)
    assert iv.evaluate(made(truth), truth).ssim == ()


def test_a_reconstruction_that_is_not_finite_is_still_reported():
    truth, _ = random_batch(2, side=12)
    report = iv.evaluate(made(torch.stack([truth[1], torch.full_like(truth[0], torch.nan)])), truth)
    assert report.order == (1, 0)
    assert math.isnan(report.psnr[0])


def test_lpips_says_when_its_weights_are_missing(monkeypatch):
    import torchmetrics.image.lpip

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", unreachable)
    with pytest.raises(DataError, match=r"LPIPS needs torchvision's AlexNet weights.*no route to host"):
        metrics.lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


def test_lpips_is_computed_per_image(monkeypatch):
    import torchmetrics.image.lpip

    class Difference(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()

        def forward(self, a, b):
            assert a.shape == (1, 3, 8, 8)
            return (a - b).abs().mean()

    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", Difference)
    found = metrics.lpips(torch.zeros(2, 1, 8, 8), torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]))
    assert found.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_measures_are_those_of_double_precision_whatever_type_comes_in(dtype):
    x, _ = random_batch(2, side=16)
    images = (0.9 * x + 0.05).to(dtype)
    for measure in (metrics.mse, metrics.psnr, metrics.ssim):
        found = measure(images, x)
        assert found.dtype == torch.float64
        assert torch.equal(found, measure(images.double(), x.double()))
    assert metrics.ssim(x.to(dtype), x).max() <= 1
    assert iv.evaluate(made(images), x).ssim == tuple(metrics.ssim(images.double(), x.double()).tolist())


def test_bytes_and_arrays_are_taken():
    x, _ = random_batch(2, side=12)
    pixels = (255 * x).round().byte()
    assert metrics.psnr(pixels.float() / 255, pixels).min() > 120  # 32-bit rounding
    assert iv.evaluate(made(pixels.double() / 255), pixels.numpy()).psnr == (math.inf, math.inf)
    assert iv.evaluate(made(x), x.numpy(), np.array([1, 2])).num_images == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: iv.CIFAR10.encode(x), r"the truth lies in \[-\d.*expected \[0, 1\]"),
        (lambda x: 255 * x, r"the truth lies in .* expected \[0, 1\]"),
        (lambda x: (255 * x).int(), r"the truth has type torch.int32"),
        (lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), r"the truth lies in \[nan"),
        (lambda x: x.tolist(), r"the truth \(\); expected the same"),
        (lambda x: x[0], r"expected the same \(N, C, H, W\)"),
        (lambda x: x.to(torch.complex64), r"type torch.complex64"),
    ],
)
def test_originals_on_another_scale_are_refused(change, said):
    x, _ = random_batch(2, side=12)
    for judge in (lambda truth: iv.evaluate(made(x), truth), lambda truth: metrics.psnr(x, truth)):
        with pytest.raises(ConfigError, match=said):
            judge(change(x))


def test_images_that_hold_no_numbers_are_refused_and_gradients_are_left_out():
    x, _ = random_batch(2, side=12)
    for truth in (x.to_sparse(), x.to("meta")):
        with pytest.raises(ConfigError, match="expected numbers at hand"):
            iv.evaluate(made(x), truth)
    assert not iv.evaluate(made(x.clone().requires_grad_()), x).images.requires_grad


@pytest.mark.parametrize("labels", [[1], [0.5, 1.0], "ab", [[1, 2]], [1 + 1j, 2]])
def test_labels_that_are_not_one_whole_number_an_image_are_refused(labels):
    x, _ = random_batch(2, side=12)
    with pytest.raises(ConfigError, match=r"labels .*expected"):
        iv.evaluate(made(x), x, labels)
    with pytest.raises(ConfigError, match="expected what an attack returned"):
        iv.evaluate(x, x)


def test_a_shifted_copy_is_found_out():
    canvas, _ = random_batch(1, side=40)
    canvas = 0.5 * (canvas + torch.rand(canvas.shape, generator=torch.Generator().manual_seed(1)))
    truth, moved = canvas[:, :, 4:36, 4:36], canvas[:, :, 1:33, 6:38]
    report = iv.evaluate(made(moved), truth)
    assert report.shifts == ((3, -2),)
    assert report.aligned_psnr == (math.inf,)
    assert report.psnr == pytest.approx(metrics.psnr(moved, truth).tolist())
    assert "image 0 lies 3 pixels too low and 2 pixels too far left" in str(report)


def test_a_pale_copy_is_found_out():
    truth, _ = random_batch(2, side=16)
    pale = 0.3 * truth + torch.tensor([0.1, 0.4, 0.6]).view(3, 1, 1)
    report = iv.evaluate(made(pale), truth)
    assert min(report.matched_psnr) > 100
    assert report.psnr == pytest.approx(metrics.psnr(pale, truth).tolist())
    assert "image 0 is off in brightness or contrast" in str(report)
    assert report.shifts == ((0, 0), (0, 0)) or max(report.aligned_psnr) < 60


def test_a_good_or_a_useless_result_is_said_in_two_lines():
    truth, _ = random_batch(1, side=16)
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    grey = torch.full_like(truth, 0.5)
    exact = truth * (1 + 1e-6)
    for images in (truth, exact, 0.98 * truth + 0.02 * noise, noise, grey, torch.full_like(truth, torch.nan)):
        report = iv.evaluate(made(images), truth)
        assert str(report).count("\n") == 1, report
    assert iv.evaluate(made(truth), truth).shifts == ((0, 0),)
    assert "shifts" not in repr(report)


@pytest.mark.parametrize(
    ("score", "said"), [(-1.2e-7, "score 0, "), (-0.5, "score -0.5"), (1.234567e-9, "e-09")]
)
def test_a_score_that_rounding_brings_below_zero_is_printed_as_zero(score, said):
    assert said in repr(replace(made(random_batch(1)[0]), score=score))
