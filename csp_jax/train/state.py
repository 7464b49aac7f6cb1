"""What a run is between two steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Int

from csp_jax.models.hub import flat_paths, path_pattern
from csp_jax.models.interface import VisionLanguageModel
from csp_jax.models.lora import LoraParam, has_adapter


@struct.dataclass
class TrainState:
    """Step, parameters that train, parameters that do not, optimizer state, updates that were left out."""

    step: Int[Array, ""]
    trainable: nnx.State
    frozen: nnx.State
    optimizer: optax.OptState
    skipped: Int[Array, ""]


def split_model(model: VisionLanguageModel, freeze: Sequence[str]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph, trainable and frozen parameters; `freeze` are regular expressions on dotted paths.

    What the model never reads is frozen too, so that it is neither decayed nor changed by a round trip. Of a model
    with an adapter the adapter alone trains.
    UserError: a pattern that is no regular expression or that freezes nothing.
    """
    params = nnx.state(model, nnx.Param)
    names, kind = flat_paths(params), LoraParam if has_adapter(params) else nnx.Param
    mend = "Patterns are matched from the beginning of names such as vision.patch.kernel"
    patterns = [path_pattern(text, names, field="model.freeze", mend=mend) for text in freeze]
    patterns += [re.compile(re.escape(path)) for path in model.unused]

    def trains(path: tuple, value: nnx.Variable) -> bool:
        name = ".".join(map(str, path))
        return isinstance(value, kind) and not any(pattern.match(name) for pattern in patterns)

    graphdef, trainable, *frozen = nnx.split(model, trains, ...)
    return graphdef, trainable, frozen[0]


def new_state(model: VisionLanguageModel, optimizer: optax.GradientTransformation, freeze: Sequence[str]) -> TrainState:
    """The state before the first step."""
    _, trainable, frozen = split_model(model, freeze)
    nothing = jnp.zeros((), jnp.int32)
    return TrainState(nothing, trainable, frozen, optimizer.init(trainable), jnp.zeros_like(nothing))


def decay_mask(params: nnx.State) -> nnx.State:
    """True for matrices: norms, biases and single vectors are not decayed."""
    import jax

    return jax.tree.map(
        lambda v: v.replace(len(v.get_metadata().get("axes", ())) >= 2),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def parameter_count(state: nnx.State) -> int:
    """Number of values in a state."""
    return sum(variable.get_value().size for variable in flat_paths(state).values())
