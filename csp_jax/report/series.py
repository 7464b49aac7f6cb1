"""The models of a report: their order, their names in words, and the colour that each keeps throughout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Key(NamedTuple):
    """A model and the recipe that trained it ("" for the base, which no recipe touched)."""

    model: str
    recipe: str


LABELS = {
    "base": "Base",
    "sft": "SFT",
    "simpo": "SimPO only",
    "sft+simpo": "SFT + SimPO",
    "global": "Global noise",
    "original": "Original pairs",
    "unperturbed": "Unperturbed",
    "base+platt": "Base + Platt",
}
MAIN_RECIPES = ("paper", "evidence")
MAIN_STAGES = ("sft", "sft+simpo")
CONTROLS = "Ablations and controls"
SPLITS = ("random", "popular", "adversarial", "attribute", "relation")


def is_main(key: Key) -> bool:
    """Whether the model is the base or a stage of a recipe, not an ablation or a control."""
    return key.model == "base" or (key.model in MAIN_STAGES and key.recipe in MAIN_RECIPES)


def group_of(key: Key) -> str:
    """The heading under which the model's row stands; "" for the base."""
    if key.model == "base":
        return ""
    return f"Recipe: {key.recipe}" if is_main(key) else CONTROLS


def label(key: Key, with_recipe: bool = True) -> str:
    """The model's name in words, e.g. "SFT + SimPO (evidence)"."""
    name = LABELS.get(key.model, key.model)
    return f"{name} ({key.recipe})" if with_recipe and key.recipe else name


def colour_class(key: Key) -> str:
    """The CSS class that sets the model's colour; models that the page does not know share one."""
    if key.model not in LABELS:
        return "m-other"
    name = key.model.replace("+", "-")
    return f"m-{key.recipe}-{name}" if is_main(key) and key.recipe else f"m-{name}"


def ordered(keys: Iterable[Key]) -> list[Key]:
    """Base first, then each recipe's stages, then ablations and controls; unknown names last."""
    models, recipes = list(LABELS), ["", *MAIN_RECIPES]

    def rank(key: Key) -> tuple:
        group = 0 if key.model == "base" else (1 if is_main(key) else 2)
        model = models.index(key.model) if key.model in models else len(models)
        recipe = recipes.index(key.recipe) if key.recipe in recipes else len(recipes)
        return (group, recipe, model, key) if group == 1 else (group, model, recipe, key)

    return sorted(set(keys), key=rank)


def before_and_after(keys: Iterable[Key]) -> list[Key]:
    """The base and the last stage that each recipe reached: what "before" and "after" mean in the figures."""
    present = ordered(keys)
    chosen = [key for key in present if key.model == "base"][:1]
    for recipe in MAIN_RECIPES:
        stages = [key for key in present if is_main(key) and key.recipe == recipe]
        chosen += stages[-1:]
    return chosen


def ordered_splits(splits: Iterable[str]) -> list[str]:
    """The five splits in the paper's order, others after them by name."""
    present = set(splits)
    return [split for split in SPLITS if split in present] + sorted(present - set(SPLITS))
