"""Burying under noise: the closed form against the iteration of the paper, schedules, and what must not change."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from csp_jax.perturb import Schedule, bury, perturb, to_canvas

SCHEDULES = [
    Schedule(),
    Schedule(t_max=1000, noise_gamma=0.005),
    Schedule("linear"),
    Schedule("linear", floor=0.3),
    Schedule("ddpm", t_max=1000),
    Schedule("ddpm", t_max=37),
    Schedule("cosine", t_max=500),
    Schedule("cosine", t_max=1000),
    Schedule("none"),
]
PERCENTS = np.arange(101, dtype=np.float32)

jitted_perturb = jax.jit(perturb, static_argnums=5)


def name(schedule: Schedule) -> str:
    return f"{schedule.name}-{schedule.t_max}-{schedule.floor}"


def alpha_bars(schedule: Schedule, confidence: np.ndarray = PERCENTS) -> np.ndarray:
    """Compiled, as the step runs it."""
    return np.asarray(jax.jit(schedule.alpha_bar)(confidence))


# --- the schedule ----------------------------------------------------------------------------------------------


def test_steps_are_the_floor_for_every_integer_percent():
    for t_max in [*range(1, 40), 100, 250, 333, 500, 501, 777, 999, 1000, 4000]:
        wanted = [(t_max * (100 - c)) // 100 for c in range(101)]
        schedule = Schedule(t_max=t_max)
        # the compiler may turn a division into a product by the reciprocal: both ways
        np.testing.assert_array_equal(np.asarray(schedule.steps(PERCENTS)), wanted, err_msg=str(t_max))
        np.testing.assert_array_equal(jax.jit(schedule.steps)(PERCENTS), wanted, err_msg=str(t_max))


def test_constant_schedule_is_the_power():
    wanted = [0.99 ** ((500 * (100 - c)) // 100) for c in range(101)]
    np.testing.assert_allclose(alpha_bars(Schedule()), wanted, rtol=1e-5)
    assert alpha_bars(Schedule())[0] == pytest.approx(0.0066, abs=5e-5)


@pytest.mark.parametrize("t_max", [37, 500, 1000])
def test_ddpm_schedule_is_torch_cumprod(t_max):
    betas = torch.linspace(1e-4, 0.02, t_max, dtype=torch.float64)
    table = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)]).numpy()
    wanted = [table[(t_max * (100 - c)) // 100] for c in range(101)]
    np.testing.assert_allclose(alpha_bars(Schedule("ddpm", t_max=t_max)), wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("t_max", [100, 500, 1000])
def test_cosine_schedule_is_the_formula(t_max):
    def f(t: int) -> float:
        return math.cos((t / t_max + 0.008) / 1.008 * math.pi / 2) ** 2

    wanted = [f((t_max * (100 - c)) // 100) / f(0) for c in range(101)]
    np.testing.assert_allclose(alpha_bars(Schedule("cosine", t_max=t_max)), wanted, rtol=1e-4, atol=1e-6)


def test_linear_schedule_is_linear():
    wanted = 0.25 + 0.75 * PERCENTS.astype(float) / 100
    np.testing.assert_allclose(alpha_bars(Schedule("linear", floor=0.25)), wanted, rtol=1e-6)
    ends = [alpha_bars(Schedule("linear", floor=k / 50), PERCENTS[[0, -1]]) for k in range(51)]
    np.testing.assert_allclose(ends, [[k / 50, 1] for k in range(51)], rtol=1e-5, atol=1e-7)
    assert all(full == 1 for _, full in ends)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_more_confidence_leaves_more(schedule):
    for confidence in (PERCENTS, np.linspace(0, 100, 1001, dtype=np.float32)):
        values = alpha_bars(schedule, confidence)
        assert np.all((values >= 0) & (values <= 1))
        assert np.all(np.diff(values) >= 0)
        assert values[-1] == 1
        if schedule.name != "none":
            assert values[0] < 0.7


# --- against the iteration -------------------------------------------------------------------------------------


def iterated(start: np.ndarray, steps: int, gamma: float, seed: int) -> np.ndarray:
    """[A] 3.2 as written: v_t ~ N(sqrt(1 - gamma) v_{t-1}, gamma I)."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.from_numpy(start).double()
    for _ in range(steps):
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        value = math.sqrt(1 - gamma) * value + math.sqrt(gamma) * noise
    return value.numpy()


@pytest.mark.parametrize("percent", [98, 90, 60, 0])
def test_closed_form_is_the_iteration_in_distribution(percent):
    schedule = Schedule(t_max=500, noise_gamma=0.01)
    steps = (500 * (100 - percent)) // 100
    start = np.full((100, 80, 3), 0.3, np.float32)
    mask = np.ones(start.shape[:2], bool)
    found = np.asarray(jax.jit(bury)(start, mask, schedule.alpha_bar(jnp.float32(percent)), jax.random.key(percent)))
    wanted = np.clip(iterated(start, steps, 0.01, seed=percent), -1, 1)
    inside = found[np.abs(found) < 1]
    mean, variance = 0.3 * 0.99 ** (steps / 2), 1 - 0.99**steps
    normal = scipy.stats.norm(mean, math.sqrt(variance))
    # clipping piles up at the edges what lies beyond, and leaves the inside as it was
    n = found.size
    for edge, share in ((-1, normal.cdf(-1)), (1, normal.sf(1))):
        count = np.sum(found == edge)
        assert abs(count - n * share) <= 5 * math.sqrt(n * share * (1 - share)) + 1e-9
    low, high = normal.cdf(-1), normal.cdf(1)
    assert scipy.stats.kstest((normal.cdf(inside) - low) / (high - low), "uniform").pvalue > 1e-3
    assert scipy.stats.ks_2samp(inside, wanted[np.abs(wanted) < 1]).pvalue > 1e-3


@pytest.mark.parametrize("percent", [98, 90])
def test_mean_and_variance_follow_each_pixel(percent):
    """With little noise nothing is clipped: every pixel keeps its own mean, all have one variance."""
    gamma, steps = 0.0005, (500 * (100 - percent)) // 100
    schedule = Schedule(noise_gamma=gamma)
    start = np.random.default_rng(0).uniform(-0.1, 0.1, (4, 4, 3)).astype(np.float32)
    mask = np.ones((4, 4), bool)
    alpha_bar = schedule.alpha_bar(jnp.float32(percent))
    keys = jax.random.split(jax.random.key(1), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: bury(start, mask, alpha_bar, key)))(keys), np.float64)
    deviation = math.sqrt(1 - (1 - gamma) ** steps)
    limit = 5 * deviation / math.sqrt(len(keys))
    np.testing.assert_allclose(drawn.mean(0), start * (1 - gamma) ** (steps / 2), atol=limit)
    np.testing.assert_allclose(drawn.var(0), deviation**2, rtol=5 * math.sqrt(2 / len(keys)))
    # elementwise: neighbours and channels are independent
    flat = (drawn - drawn.mean(0)).reshape(len(keys), -1)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(keys))


# --- what must not change --------------------------------------------------------------------------------------


class Pictures:
    """Random pictures with random regions."""

    def __init__(self, rows: int, pictures: int, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.images = generator.integers(0, 256, (rows, pictures, 12, 10, 3), dtype=np.uint8)
        self.masks = generator.random((rows, pictures, 12, 10)) < 0.4
        self.confidence = generator.integers(0, 100, (rows, pictures)).astype(np.float32)
        self.noise_id = generator.integers(0, 2**32, (rows, pictures), dtype=np.uint32)

    def run(self, schedule: Schedule = SCHEDULES[0], seed: int = 5) -> np.ndarray:
        arrays = (self.images, self.masks, self.confidence, self.noise_id)
        return np.asarray(jitted_perturb(*arrays, jax.random.key(seed), schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_outside_the_region_nothing_changes(schedule):
    pictures = Pictures(2, 3)
    found = pictures.run(schedule)
    clean = np.asarray(to_canvas(pictures.images))
    np.testing.assert_allclose(clean, pictures.images / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(found[~pictures.masks], clean[~pictures.masks])
    assert found.min() >= -1
    assert found.max() <= 1
    changed = np.mean(found[pictures.masks] != clean[pictures.masks])
    assert changed == 0 if schedule.name == "none" else changed > 0.95


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_full_confidence_leaves_the_picture(schedule):
    pictures = Pictures(2, 3)
    pictures.confidence[:] = 100
    np.testing.assert_array_equal(pictures.run(schedule), np.asarray(to_canvas(pictures.images)))


def test_a_lone_confidence_decides_about_its_own_picture_only():
    pictures = Pictures(2, 2)
    before = pictures.run()
    pictures.confidence[0, 1] = 100
    after = pictures.run()
    np.testing.assert_array_equal(after[[0, 1, 1], [0, 0, 1]], before[[0, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(after[0, 1], to_canvas(pictures.images[0, 1]))


def test_noise_is_the_pictures_own_wherever_it_stands():
    """Another place in the batch, other neighbours, another batch size: the same noise, bit for bit."""
    pictures = Pictures(3, 2)
    before = pictures.run()
    moved = Pictures(3, 2, seed=9)
    for name in ("images", "masks", "confidence", "noise_id"):
        getattr(moved, name)[0, 1] = getattr(pictures, name)[2, 0]
    np.testing.assert_array_equal(moved.run()[0, 1], before[2, 0])
    order = np.random.default_rng(0).permutation(6)
    turned = Pictures(1, 6)
    for name in ("images", "masks", "confidence", "noise_id"):
        values = getattr(pictures, name)
        setattr(turned, name, values.reshape(1, 6, *values.shape[2:])[:, order])
    np.testing.assert_array_equal(turned.run()[0], before.reshape(6, 12, 10, 3)[order])


def test_noise_depends_on_identity_and_key():
    pictures = Pictures(1, 2)
    for name in ("images", "masks", "confidence"):
        getattr(pictures, name)[0, 1] = getattr(pictures, name)[0, 0]
    pictures.confidence[:] = 40
    region = pictures.masks[0, 0]
    one, other = pictures.run()[0]
    assert np.mean(one[region] == other[region]) < 0.3  # where both are clipped
    again = pictures.run(seed=6)[0, 0]
    assert np.mean(one[region] == again[region]) < 0.3
    pictures.noise_id[0, 1] = pictures.noise_id[0, 0]
    one, other = pictures.run()[0]
    np.testing.assert_array_equal(one, other)


def test_a_batch_without_pictures_stays_empty():
    empty = jitted_perturb(
        np.zeros((2, 0, 12, 10, 3), np.uint8),
        np.zeros((2, 0, 12, 10), bool),
        np.zeros((2, 0), np.float32),
        np.zeros((2, 0), np.uint32),
        jax.random.key(0),
        Schedule(),
    )
    assert empty.shape == (2, 0, 12, 10, 3)
