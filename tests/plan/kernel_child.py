"""Compiles an attention kernel and its gradient for a target that is not here; prints what came out as JSON."""

from __future__ import annotations

import json
import os
import sys

from csp_jax.plan.compile import devices, environment
from csp_jax.plan.targets import parse_target

QUERIES, KEYS = 1200, 1024
KERNEL_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")  # in compiled programs


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print
    target, attention = parse_target(sys.argv[1]), sys.argv[2]
    os.environ.update(environment(target))

    import jax
    import jax.numpy as jnp

    from csp_jax.models.attention import KERNELS

    place = jax.sharding.SingleDeviceSharding(devices(target)[0])

    def array(*sizes: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        out, lse = KERNELS[attention](q, k, v, first, last)
        return out.astype(jnp.float32).sum() + lse.sum()

    found = {}
    for channels in (64, 80, 96, 104, 128):
        q, k = array(1, QUERIES, 4, channels), array(1, KEYS, 2, channels)
        ends = array(1, QUERIES, dtype=jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ends, ends).compile()
        text = compiled.as_text() or ""
        kernels = sum(text.count(f'custom_call_target="{name}"') for name in KERNEL_CALLS)
        memory = compiled.memory_analysis()
        assert memory is not None
        found[channels] = {
            "kernels": kernels,
            "temporaries": memory.temp_size_in_bytes,
            "logits": 4 * QUERIES * KEYS * 4,
        }
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
