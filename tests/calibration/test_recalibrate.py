"""Recalibration baselines against sklearn and scipy's own optimum."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from csp_jax.calibration.recalibrate import (
    LOGIT_CLIP,
    RECALIBRATIONS,
    fit_isotonic,
    fit_platt,
    fit_temperature,
)


def sample(n=800, seed=0):
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(3, 1, n), 2)
    return p, (rng.random(n) < expit(0.5 * logit(np.clip(p, 0.01, 0.99)) - 0.4)).astype(int)


def test_temperature_is_torchs_optimum():
    p, y = sample()
    z = torch.tensor(logit(np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP)))
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z / log_t.exp(), torch.tensor(y * 1.0))
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = fit_temperature(p, y)
    assert fitted.temperature == pytest.approx(log_t.exp().item(), rel=1e-4)
    assert fitted.temperature > 1.2
    assert fitted(np.array([0.5]))[0] == pytest.approx(0.5)


def test_temperature_of_a_reversed_ranking_is_one_half():
    p = np.linspace(0.1, 0.9, 50)
    assert fit_temperature(p, (p < 0.5).astype(int))(p) == pytest.approx(0.5, abs=0.01)


def test_platt_is_sklearns():
    p, y = sample()
    z = logit(np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP))
    theirs = _SigmoidCalibration().fit(z, y)
    new = np.linspace(0, 1, 101)
    ours = fit_platt(p, y)
    expected = theirs.predict(logit(np.clip(new, LOGIT_CLIP, 1 - LOGIT_CLIP)))
    np.testing.assert_allclose(ours(new), expected, atol=1e-5)
    plain = LogisticRegression(C=np.inf).fit(z[:, None], y)
    assert ours.slope == pytest.approx(plain.coef_[0, 0], rel=0.02)


def test_platt_has_a_fit_when_right_and_wrong_are_apart():
    fitted = fit_platt(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]))
    assert np.isfinite(fitted.slope)
    assert 0 < fitted(np.array([0.0]))[0] < 0.5 < fitted(np.array([1.0]))[0] < 1


def test_isotonic_is_sklearns():
    p, y = sample()
    weight = np.random.default_rng(1).integers(0, 4, p.size)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(p, y, sample_weight=weight)
    new = np.linspace(0, 1, 333)
    np.testing.assert_allclose(fit_isotonic(p, y, weight)(new), theirs.predict(new), atol=1e-9)


@pytest.mark.parametrize("name", list(RECALIBRATIONS))
def test_held_out_brier_improves_and_weights_are_copies(name):
    p, y = sample(seed=2)
    fitted = RECALIBRATIONS[name](p, y)
    new, truth = sample(seed=3)
    assert ((fitted(new) - truth) ** 2).mean() < ((new - truth) ** 2).mean() - 0.01
    weight = np.random.default_rng(4).integers(0, 3, p.size)
    copies = np.repeat(np.arange(p.size), weight)
    weighted, copied = RECALIBRATIONS[name](p, y, weight), RECALIBRATIONS[name](p[copies], y[copies])
    np.testing.assert_allclose(weighted(new), copied(new), atol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="three vectors"):
        fit_platt(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_isotonic(np.ones(2), np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="must lie in"):
        fit_temperature(np.array([50.0]), np.array([1]))
