"""Writing adapters as PEFT does; see `peft` for how fused modules are treated."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csp_jax.errors import UserError
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import LoraLinear, adapted
from csp_jax.models.peft import CONFIG, LETTERS, PREFIX, WEIGHTS, Factors, Part, hub_modules, targeted
from csp_jax.models.tensor_files import write_safetensors

FRESH = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def save_adapter(
    directory: Path, model: VisionLanguageModel, *, base: str, config: Mapping[str, Any] | None = None
) -> None:
    """Write a model's adapter as PEFT does. `base`: what the adapter was trained on; `config`: fields that
    `load_adapter` read, which stay as they are where they still hold."""
    layers = dict(adapted(model))
    factors = _module_factors(model, layers)
    scales = {name: layers[parts[0].path].scale for name, (parts, _) in factors.items()}
    arrays = {
        f"{PREFIX}{name}.lora_{letter}.weight": np.ascontiguousarray(array)
        for name, (_, whole) in factors.items()
        for letter, array in zip(LETTERS, (whole.a, whole.b))
    }
    ranks = {name: whole.rank for name, (_, whole) in factors.items()}
    values = {**FRESH, "lora_dropout": next(iter(layers.values())).dropout, **(config or {})}
    values |= {"base_model_name_or_path": base, **_rank_fields(ranks, scales, bool(values["use_rslora"]))}
    every = hub_modules(model)
    if targeted(values.get("target_modules", ()), every) != set(ranks):
        values["target_modules"] = module_pattern(ranks, every)
    entries = [(key, array.dtype, array.shape, _getter(array)) for key, array in arrays.items()]
    for name, write in (
        (WEIGHTS, lambda file: write_safetensors(file, entries)),
        (CONFIG, lambda file: file.write_text(json.dumps(values, indent=2, sort_keys=True))),
    ):
        temporary = directory / f"{name}.partial"
        write(temporary)
        temporary.rename(directory / name)


def _getter(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: array


def _module_factors(
    model: VisionLanguageModel, layers: Mapping[str, LoraLinear]
) -> dict[str, tuple[list[Part], Factors]]:
    """PEFT's factors of every module that has an adapter, and those of its parts that have one."""
    arrays = {path: tuple(np.asarray(x[...]) for x in (m.lora_a, m.lora_b)) for path, m in layers.items()}
    own: dict[str, tuple[list[Part], list[Factors]]] = {}
    for name, parts in hub_modules(model).items():
        present = [part for part in parts if part.path in layers]
        some = [
            _trimmed(*(x if part.number is None else x[part.number] for x in arrays[part.path])) for part in present
        ]
        if any(part.rank for part in some):
            own[name] = present, some
            if len({layers[part.path].scale for part in present}) > 1:
                raise UserError("parts of one module have adapters of unlike scale", field=name)
    apart = {_kind(name) for name, (_, some) in own.items() if any(not np.array_equal(x.a, some[0].a) for x in some)}
    return {name: (present, _joined(present, some, _kind(name) not in apart)) for name, (present, some) in own.items()}


def _layer(array: np.ndarray, number: int | None) -> np.ndarray:
    return array if number is None else array[number]


def _trimmed(a: np.ndarray, b: np.ndarray) -> Factors:
    """PEFT's layout, without components that are zero on both sides."""
    kept = np.any(a, axis=0) | np.any(b, axis=1)
    return Factors(a.T[kept], b.T[:, kept])


def _joined(parts: Sequence[Part], factors: Sequence[Factors], shared: bool) -> Factors:
    """The factors of a module from those of its parts."""
    if parts[0].rows is None:
        return factors[0]
    rows, ranks = parts[0].rows, [part.rank for part in factors]
    total = ranks[0] if shared else sum(ranks)
    b = np.zeros((rows.blocks * rows.width, total), factors[0].b.dtype)
    for part, own, end in zip(parts, factors, np.cumsum(ranks)):
        piece = own.b
        if not shared:
            piece = np.zeros((len(own.b), total), own.b.dtype)
            piece[:, end - own.rank : end] = own.b
        assert part.rows is not None
        part.rows.put(b, piece)
    return Factors(factors[0].a if shared else np.concatenate([own.a for own in factors]), b)


def _kind(name: str) -> str:
    """A module's name without its layer's number."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def _rank_fields(ranks: Mapping[str, int], scales: Mapping[str, float], root: bool) -> dict[str, Any]:
    """`r` and `lora_alpha` of most modules, and the patterns of the others."""
    alphas = {name: _alpha(scales[name], rank, root) for name, rank in ranks.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0]
    values: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    for name in sorted(ranks):
        same = [other for other in ranks if _kind(other) == _kind(name)]
        alike = len({(ranks[other], alphas[other]) for other in same}) == 1
        pattern = re.sub(r"^.*\.N\.", "", _kind(name)) if alike else name
        for field, usual, own in (("rank_pattern", rank, ranks[name]), ("alpha_pattern", alpha, alphas[name])):
            if own != usual:
                values[field][pattern] = own
    return values


def _alpha(scale: float, rank: int, root: bool) -> float | int:
    alpha = float(f"{scale * (rank**0.5 if root else rank):.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def module_pattern(names: Iterable[str], every: Iterable[str]) -> str:
    """A regular expression for whole names that matches `names` and no other of `every`."""
    texts = []
    for (prefix, numbers), ends in _grouped(names, every).items():
        escaped = [re.escape(end) for end in ends]
        last = escaped[0] if len(ends) == 1 else f"({'|'.join(escaped)})"
        texts.append(rf"{re.escape(prefix)}\.{numbers}\.{last}" if prefix else last)
    return "|".join(texts)


def _grouped(names: Iterable[str], every: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Names by what stands before the layer's number and by the numbers; (empty, empty) for names without one."""

    def cut(some: Iterable[str]) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        for name in some:
            parts = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
            numbers = found.setdefault((parts[1], parts[3]) if parts else ("", name), [])
            numbers += [int(parts[2])] if parts else []
        return found

    whole = cut(every)
    groups: dict[tuple[str, str], list[str]] = {}
    for (prefix, end), numbers in cut(names).items():
        complete = sorted(numbers) == sorted(whole[prefix, end])
        text = r"\d+" if complete else f"({'|'.join(map(str, sorted(numbers)))})"
        groups.setdefault((prefix, text if prefix else ""), []).append(end)
    return groups
