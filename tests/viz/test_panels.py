"""The panel: what a reader can choose and run in a notebook, and what is left of it on a page."""

import re
import threading
from pathlib import Path

import pytest
import torch
from ipywidgets.embed import dependency_state

import invlib as iv
from invlib.errors import ConfigError, ObservationError
from invlib.viz.panels import THREAD


@pytest.fixture(scope="module")
def photos():
    return iv.data.samples("photos32")


@pytest.fixture(scope="module")
def networks():
    return {
        name: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3072, width), torch.nn.Linear(width, 10)
        )
        for name, width in (("narrow", 4), ("wide", 8))
    }


@pytest.fixture
def sent(photos, networks):
    """Make a panel, and a list of what it asked the client to send."""
    images, labels = photos
    asked = []

    def send(model, n):
        asked.append((model, n))
        step = iv.FedSGD()
        return iv.observe(model, images[n : n + 1], labels[n : n + 1], step, normalization=iv.UNIT)

    return asked, send


def made(photos, networks, send, attack=None, **settings):
    images, _ = photos
    recorded = iv.viz.scrubber({"0": images[:1], "1": images[1:2]})
    default = {"steps": 3, "names": ["astronaut", "cat", "coffee", "rocket"], "alt": "photograph"}
    return iv.viz.panel(
        recorded,
        images=images,
        networks=networks,
        send=send,
        attack=attack or (lambda steps, restarts: iv.inverting_gradients(steps=steps, restarts=restarts)),
        **{**default, **settings},
    )


def parts(panel):
    choices, row = panel.children[0].children
    return (*choices.children, *row.children)


def wait():
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(timeout=600)
            assert not thread.is_alive()


def test_a_page_with_no_kernel_keeps_the_recorded_slider(photos, networks, sent):
    panel = made(photos, networks, sent[1])
    controls, recorded = panel.children
    # book.css hides the one; the other is a slider that moves by a link in the browser.
    assert "invlib-live" in controls._dom_classes
    assert "LinkModel" in {model["model_name"] for model in dependency_state(recorded).values()}
    assert not sent[0]


def test_the_style_sheet_of_the_book_hides_the_controls():
    sheet = (Path(__file__).parents[2] / "book" / "_static" / "book.css").read_text(encoding="utf-8")
    assert re.search(r"\.invlib-live\s*\{\s*display: none", sheet)


def test_runs_what_was_chosen_and_shows_a_slider_over_it(photos, networks, sent):
    asked, send = sent
    settings = []

    def attack(steps, restarts):
        settings.append((steps, restarts))
        return iv.inverting_gradients(steps=steps, restarts=restarts)

    panel = made(photos, networks, send, attack)
    image, network, steps, restarts, run, stop, bar, message = parts(panel)
    image.value, network.value, steps.value, restarts.value = 1, networks["wide"], 5, 2
    run.click()
    wait()
    assert settings == [(5, 2)]
    assert asked == [(networks["wide"], 1)]
    assert (bar.value, bar.max) == (5, 5)
    assert re.search(r"score .* dB, max_steps", message.value)
    slider, stack = panel.children[1].children
    assert len(stack.children) == 6  # the start and five steps
    assert slider.value == 5
    assert "photograph, step 5" in stack.children[-1].value
    assert (run.disabled, stop.disabled) == (False, True)


def test_stop_ends_the_run_and_keeps_what_was_found(photos, networks, sent):
    reached = threading.Event()

    def attack(steps, restarts):
        inner = iv.inverting_gradients(steps=steps, restarts=restarts)

        def run(model, observation, *, generator, callback):
            def told(progress):
                reached.set()
                return callback(progress)

            return inner(model, observation, generator=generator, callback=told)

        return run

    panel = made(photos, networks, sent[1], attack, steps=100_000)
    *_, run, stop, bar, message = parts(panel)
    run.click()
    assert reached.wait(timeout=600)
    assert run.disabled
    stop.click()
    wait()
    assert bar.value < 100_000
    assert "interrupted" in message.value
    assert not run.disabled


def test_a_closed_form_has_no_steps_and_shows_its_picture(photos, networks, sent):
    panel = made(photos, networks, sent[1], iv.fully_connected, steps=None)
    image, _, run, _, bar, message = parts(panel)
    image.value = 2
    run.click()
    wait()
    assert sent[0] == [(networks["narrow"], 2)]
    assert bar.value == bar.max
    assert "closed_form" in message.value
    assert panel.children[1].value.count("<img") == 2
    assert re.search(r"\d+\.\d dB", panel.children[1].value)


def test_an_error_is_shown_and_the_panel_can_run_again(photos, networks, sent):
    def refuse(model, n):
        raise ObservationError("no such client")

    panel = made(photos, networks, refuse)
    *_, run, stop, _, message = parts(panel)
    run.click()
    wait()
    assert message.value == "ObservationError: no such client"
    assert (run.disabled, stop.disabled) == (False, True)


def test_an_error_is_shown_as_text_and_not_as_html(photos, networks, sent):
    def refuse(model, n):
        raise ObservationError("update has '<img src=x onerror=alert(1)>'")

    panel = made(photos, networks, refuse)
    *_, run, _stop, _, message = parts(panel)
    run.click()
    wait()
    assert "<" not in message.value
    assert "&lt;img src=x" in message.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["one"]}, "names must have one entry for each of the 4 images, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_faults(settings, message, photos, networks, sent):
    with pytest.raises(ConfigError, match=message):
        made(photos, networks, sent[1], **settings)


def test_no_network(photos, sent):
    with pytest.raises(ConfigError, match="networks is empty"):
        made(photos, {}, sent[1])
