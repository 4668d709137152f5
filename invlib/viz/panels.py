"""Controls that run an attack in a live notebook, and recorded pictures where there is no kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invlib.core.observation import Observation
from invlib.core.optional import package
from invlib.core.reconstruction import Frames, Progress, Reconstruction, in_digits
from invlib.errors import ConfigError
from invlib.viz.figure import as_images, same_length
from invlib.viz.pictures import decibels
from invlib.viz.sliders import MAX_FRAMES, page, scrubber

if TYPE_CHECKING:
    from ipywidgets import VBox

THREAD = "invlib-panel"


def panel(
    recorded: VBox,
    *,
    images: Tensor,
    networks: Mapping[str, nn.Module],
    send: Callable[[nn.Module, int], Observation],
    attack: Callable[..., Callable[..., Reconstruction]],
    steps: int | None,
    names: Sequence[str] | None = None,
    label: str = "step",
    alt: str = "reconstruction",
) -> VBox:
    """Put controls that run an attack above a recorded slider; a page with no kernel shows the slider alone.

    The attack runs in a thread, so that the notebook stays usable and the run can be stopped. Its pictures
    take the place of the recorded ones, first as they come and then as a slider over all of them.

    Args:
        recorded: what is shown until something is run: a `scrubber` or a `wipe`.
        images: `(N, C, H, W)` in [0, 1], the images to choose from.
        networks: the networks to choose from, by name.
        send: makes what the server sees of a network's step on image number n.
        attack: makes the attack from a number of steps and of restarts; from nothing where steps is None.
        steps: the number of steps that is filled in; None for a closed form, which has neither steps nor
            restarts.
        names: what each of the N images is called; numbers where not given.
        label: what the attack's steps are called.
        alt: what the pictures show, for readers who do not see them.

    Raises:
        DependencyError: ipywidgets is not installed.
        ConfigError: there is no network, the images' shape or range or the number of names does not fit, or
            steps is under 1.

    Example:
        >>> import invlib as iv
        >>> x, y = iv.data.samples("photos32")
        >>> widget = panel(
        ...     scrubber({"0": x[:1], "1": x[1:2]}),
        ...     images=x,
        ...     networks={"LeNetZhu": iv.models.build("LeNetZhu", seed=0)},
        ...     send=lambda net, n: iv.observe(
        ...         net, x[n : n + 1], y[n : n + 1], iv.FedSGD(), normalization=iv.UNIT
        ...     ),
        ...     attack=lambda steps, restarts: iv.inverting_gradients(steps=steps, restarts=restarts),
        ...     steps=100,
        ... )
        >>> len(widget.children)  # the controls, and what is recorded
        2

    Taught in: chapter 2
    """
    widgets = package("ipywidgets", "viz")

    as_images(images, "images")
    if names is not None:
        same_length("names", names, len(images), "images")
    if not networks:
        raise ConfigError("networks is empty; expected at least one network by name")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")

    style = {"description_width": "initial"}
    image = widgets.Dropdown(
        options=[(name, n) for n, name in enumerate(names or map(str, range(len(images))))],
        description="image",
        style=style,
    )
    network = widgets.Dropdown(options=list(networks.items()), description="network", style=style)
    narrow = widgets.Layout(width="10em")
    step_count = widgets.BoundedIntText(
        steps or 1, min=1, max=100_000, description=f"{label}s", style=style, layout=narrow
    )
    restart_count = widgets.BoundedIntText(
        1, min=1, max=64, description="restarts", style=style, layout=narrow
    )
    counts = [] if steps is None else [step_count, restart_count]
    run = widgets.Button(description="Run", button_style="primary")
    stop = widgets.Button(description="Stop", disabled=True)
    bar = widgets.IntProgress(description="", bar_style="info", layout=widgets.Layout(width="12em"))
    message = widgets.HTML()
    wrap = widgets.Layout(flex_flow="row wrap")
    controls = widgets.VBox(
        [
            widgets.HBox([image, network, *counts], layout=wrap),
            widgets.HBox([run, stop, bar, message], layout=wrap),
        ]
    )
    # The book's style sheet hides what needs a kernel; a notebook does not have that sheet.
    controls.add_class("invlib-live")
    whole = widgets.VBox([controls, recorded])
    stopping = threading.Event()

    def work(n: int, net: nn.Module, *numbers: int) -> None:
        original = images[n : n + 1]
        truth = as_images(original)
        frames = Frames(every=max(1, bar.max // (MAX_FRAMES - 1)))
        screen = widgets.HTML(layout=widgets.Layout(width="100%"))
        whole.children = (controls, screen)

        def watch(progress: Progress) -> bool:
            frames(progress)
            bar.value = progress.step
            if frames.steps[-1:] == [progress.step]:
                caption = f"{label} {progress.step}, cost {progress.cost():.3g}"
                screen.value = page(as_images(frames.images[-1]), f"{alt}, {caption}", caption, truth)
            return stopping.is_set()

        try:
            generator = torch.Generator().manual_seed(0)
            result = attack(*numbers)(net, send(net, n), generator=generator, callback=watch)
            quality = ", ".join(decibels(as_images(result.images), truth))
            message.value = (
                f"score {in_digits(result.score)}, {quality}, {result.status}, {result.seconds:.1f} s"
            )
            if len(frames.images) > 1:
                last = min(len(frames.images), MAX_FRAMES) - 1
                shown = scrubber(frames, label=label, alt=alt, original=original, start=last)
                whole.children = (controls, shown)
            else:  # a closed form, or a search that was stopped where it began
                bar.value = bar.value if numbers else bar.max
                screen.value = page(as_images(result.images), alt, quality, truth)
        except Exception as error:  # a thread's error does not reach the notebook by itself
            message.value = escape(f"{type(error).__name__}: {error}")  # a widget takes it for HTML
        finally:
            run.disabled, stop.disabled = False, True

    def start(_: Any) -> None:
        stopping.clear()
        run.disabled, stop.disabled = True, False
        bar.value, bar.max, message.value = 0, step_count.value, "running"
        choice = (image.value, network.value, *(count.value for count in counts))
        threading.Thread(target=work, args=choice, name=THREAD, daemon=True).start()

    run.on_click(start)
    stop.on_click(lambda _: stopping.set())
    return whole
