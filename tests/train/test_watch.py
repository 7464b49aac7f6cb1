"""A wait that lasts is reported with what is waited for; one that ends in time is not."""

from __future__ import annotations

import threading

from csp_jax.train.watch import Watch


def test_a_wait_is_named():
    said: list[str] = []
    twice, left = threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            twice.set()

    with Watch(0.05, say, left.set) as watch:
        watch.note("step 12 on the devices")
        assert twice.wait(60)
    assert left.is_set()
    assert all(text.endswith("waiting for step 12 on the devices") for text in said)


def test_no_limit_no_thread():
    with Watch(0, lambda text: None) as watch:
        watch.note("anything")
        assert not any(thread.name == "watch" for thread in threading.enumerate())
