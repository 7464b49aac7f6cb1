"""The loss curves of the training stages as coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csp_jax.report.drawing import Scale, Tick, moving_mean, path, round_steps, thinned, ticks
from csp_jax.report.inputs import LossCurve
from csp_jax.report.series import LABELS, MAIN_RECIPES, Key, colour_class

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 180, 36, 44, 8, 24
DRAWN_POINTS = 300
# The bold line is the mean over this share of a stage's steps.
WINDOW_SHARE = 20


@dataclass(frozen=True)
class LossLine:
    """One seed's loss: the raw line, its moving mean, and where that ends."""

    raw: str
    smooth: str
    end_x: float
    end_y: float
    end_text: str


@dataclass(frozen=True)
class LossPanel:
    """The loss of one stage under one recipe, a line for each seed."""

    title: str
    recipe: str
    colour: str
    lines: list[LossLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    not_finite: int


def loss_panels(curves: Sequence[LossCurve]) -> list[LossPanel]:
    """A panel for each recipe and stage; curves that differ only by seed share one."""
    grouped: dict[tuple[str, str], list[LossCurve]] = {}
    for curve in curves:
        grouped.setdefault((curve.recipe, curve.stage), []).append(curve)
    order = sorted(grouped, key=lambda name: (name[0] not in MAIN_RECIPES, name[0] != "paper", name))
    return [_panel(*name, grouped[name]) for name in order]


def _panel(recipe: str, stage: str, curves: list[LossCurve]) -> LossPanel:
    losses = [loss for curve in curves for loss in thinned(curve.losses, DRAWN_POINTS)]
    steps = [step for curve in curves for step in curve.steps]
    y_values = round_steps(min(0.0, *losses), max(losses)) if losses else [0.0, 1.0]
    x_values = round_steps(0, max(steps), about=3) if steps else [0.0, 1.0]
    x = Scale(x_values[0], max(steps, default=1), LEFT, WIDTH - RIGHT)
    y = Scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    model = "sft+simpo" if stage == "simpo" else stage
    return LossPanel(
        title=LABELS.get(stage, stage) if stage != "simpo" else "SimPO",
        recipe=recipe,
        colour=colour_class(Key(model, recipe)),
        lines=[_line(curve, x, y) for curve in curves if curve.losses],
        x_ticks=[tick for tick in ticks(x, x_values) if tick.at <= WIDTH - RIGHT],
        y_ticks=ticks(y, y_values),
        not_finite=sum(curve.not_finite for curve in curves),
    )


def _line(curve: LossCurve, x: Scale, y: Scale) -> LossLine:
    steps = thinned([float(step) for step in curve.steps], DRAWN_POINTS)
    losses = thinned(curve.losses, DRAWN_POINTS)
    smooth = moving_mean(losses, max(1, len(losses) // WINDOW_SHARE))
    return LossLine(
        raw=path((x(step), y(loss)) for step, loss in zip(steps, losses)),
        smooth=path((x(step), y(loss)) for step, loss in zip(steps, smooth)),
        end_x=x(steps[-1]),
        end_y=y(smooth[-1]),
        end_text=f"{smooth[-1]:.3g}",
    )
