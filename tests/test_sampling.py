import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from tests.helpers import Gaussian, tiny_config

SDE = sde_lib.VPSDE()
DATA = Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], [0.5, -0.3, 0.0, 0.2])
COUNT = 20_000


def check_moments(x, slack):
    """Mean and covariance are the data's, within 4.5 standard errors and a bias of `slack`."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    scale = np.sqrt(np.diag(DATA.cov))
    mean_error = np.abs(x.mean(0) - DATA.mean) / scale
    assert mean_error.max() < 4.5 / np.sqrt(len(x)) + slack
    cov_error = np.abs(np.cov(x, rowvar=False) - DATA.cov) / np.outer(scale, scale)
    assert cov_error.max() < 4.5 * np.sqrt(2 / len(x)) + slack


@pytest.mark.parametrize("corrector", ["none", "langevin"])
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_predictor_corrector_samples_a_gaussian(predictor, corrector):
    config = tiny_config()
    config.data.image_size = 2
    config.model.num_scales = 500
    config.sampling.update(
        method="pc", predictor=predictor, corrector=corrector, truncation_time=1e-3, snr=0.05
    )
    sample_fn = sampling.get_sampling_fn(config, SDE, lambda _: DATA.score_fn(SDE), COUNT)
    x, nfe = sample_fn(None, jax.random.key(0))
    assert nfe == (500 if corrector == "none" else 999)
    check_moments(x, slack=0.02)


def test_ode_samples_a_gaussian_exactly():
    config = tiny_config()
    config.data.image_size = 2
    config.sampling.update(method="ode", truncation_time=1e-5, rtol=1e-5, atol=1e-5)
    sample_fn = sampling.get_sampling_fn(config, SDE, lambda _: DATA.score_fn(SDE), COUNT)
    x, nfe = sample_fn(None, jax.random.key(0))
    assert 30 < nfe < 500
    check_moments(x, slack=1e-3)


def test_ode_follows_its_exact_solution():
    # In the eigenbasis the flow scales each coordinate by the ratio of marginal deviations.
    z = DATA.sample(64, seed=3)
    x, _ = sampling.ode_sample(
        SDE, DATA.score_fn(SDE), z, eps=1e-3, rtol=1e-6, atol=1e-6, noise_removal=False
    )
    marginal = lambda t: np.sqrt(SDE.mean_coeff(t) ** 2 * DATA.variances + SDE.std(t) ** 2)  # noqa: E731
    start = (np.asarray(z).reshape(64, 4) - SDE.mean_coeff(1.0) * DATA.mean) @ DATA.basis
    end = (start * marginal(1e-3) / marginal(1.0)) @ DATA.basis.T
    expected = end + SDE.mean_coeff(1e-3) * DATA.mean
    np.testing.assert_allclose(np.asarray(x).reshape(64, 4), expected, atol=2e-5)


def test_denoising_is_the_posterior_mean():
    t, x0 = 0.3, DATA.sample(200_000)
    z = jax.random.normal(jax.random.key(1), x0.shape)
    x = SDE.mean_coeff(t) * x0 + SDE.std(t) * z
    error = np.asarray(sampling.denoise(SDE, DATA.score_fn(SDE), x, t) - x0).reshape(len(x0), -1)
    # The error of E[x_0 | x_t] is uncorrelated with x_t, and has the posterior's variance.
    flat = np.asarray(x).reshape(len(x0), -1)
    assert np.abs(error.T @ flat / len(x0)).max() < 5e-3
    alpha2, var = SDE.mean_coeff(t) ** 2, SDE.std(t) ** 2
    posterior = DATA.variances * var / (alpha2 * DATA.variances + var)
    np.testing.assert_allclose(((error @ DATA.basis) ** 2).mean(0), posterior, rtol=0.02)


def test_a_solve_that_fails_gives_nan():
    y, _ = sampling.solve_ode(lambda t, y, _: y / 0.0, jnp.ones(2), 0.0, 1.0, 1e-3, 1e-3)
    assert np.isnan(np.asarray(y)).all()
