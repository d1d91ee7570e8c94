import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import sde_lib
from tests.helpers import GOLDEN

SDE = sde_lib.VPSDE()
GRID = np.geomspace(1e-5, 1, 2001).astype(np.float32)


def exact_b(t):
    t = np.asarray(t, np.float64)
    return t * (0.1 + 0.5 * t * 19.9)


def exact_f(t):
    return np.log(np.expm1(exact_b(t)))


def test_golden_vp():
    golden = np.load(GOLDEN / "sde.npz")
    t = jnp.asarray(golden["t"], jnp.float32)
    for name in ("mean_coeff", "std", "drift_coeff", "diffusion"):
        np.testing.assert_allclose(getattr(SDE, name)(t), golden[f"vp_{name}"], rtol=1e-6)


@pytest.mark.parametrize("tau", ["1e-05", "0.001", "0.1"])
def test_golden_importance_sampling(tau):
    golden = np.load(GOLDEN / "sde.npz")
    u = jnp.asarray(golden["u"], jnp.float32)
    t = SDE.importance_time(u, float(tau))
    np.testing.assert_allclose(t, golden[f"vp_is_t_{tau}"], rtol=1e-5)
    np.testing.assert_allclose(
        SDE.importance_normalizer(float(tau)), golden[f"vp_is_Z_{tau}"], rtol=1e-6
    )


def test_std_keeps_its_digits_in_float32():
    exact = np.sqrt(-np.expm1(-exact_b(GRID)))
    np.testing.assert_allclose(SDE.std(GRID), exact, rtol=1e-6)


@pytest.mark.parametrize("tau", [1e-5, 1e-4, 1e-2, 0.5, 0.99])
def test_importance_time_keeps_its_digits_in_float32(tau):
    u = np.linspace(0, 1, 1001).astype(np.float32)
    tau = np.float32(tau)
    y = exact_f(tau) + u.astype(np.float64) * (exact_f(1.0) - exact_f(tau))
    b = np.logaddexp(0, y)
    exact = 2 * b / (0.1 + np.sqrt(0.01 + 2 * 19.9 * b))
    t = SDE.importance_time(u, tau)
    np.testing.assert_allclose(t, exact, rtol=1e-5)
    assert t.min() >= tau and t.max() <= 1


def test_importance_times_have_density_g2_over_sigma2():
    tau = 1e-3
    t = SDE.importance_time(jax.random.uniform(jax.random.key(0), (20_000,)), tau)

    def cdf(t):
        return (exact_f(t) - exact_f(tau)) / (exact_f(1.0) - exact_f(tau))

    assert scipy.stats.kstest(np.asarray(t, np.float64), cdf).pvalue > 1e-3
    # The closed form itself, against quadrature of g²/σ².
    ratio = lambda t: (0.1 + 19.9 * t) / -np.expm1(-exact_b(t))  # noqa: E731
    integral = scipy.integrate.quad(lambda s: ratio(np.exp(s)) * np.exp(s), np.log(tau), 0)[0]
    np.testing.assert_allclose(SDE.importance_normalizer(tau), integral, rtol=1e-6)


def test_drift_and_diffusion_generate_mean_and_std():
    # dα/dt = f α and dσ²/dt = 2 f σ² + g², by automatic differentiation.
    t = jnp.asarray(GRID[200::200])
    alpha, d_alpha = jax.jvp(SDE.mean_coeff, (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(d_alpha, SDE.drift_coeff(t) * alpha, rtol=1e-5)
    var, d_var = jax.jvp(lambda t: SDE.std(t) ** 2, (t,), (jnp.ones_like(t),))
    expected = 2 * SDE.drift_coeff(t) * var + SDE.diffusion(t) ** 2
    np.testing.assert_allclose(d_var, expected, rtol=1e-4, atol=1e-5)


def test_discrete_steps_compose_to_the_marginal():
    # Many small steps of the chain give α(t) and σ(t).
    times = np.linspace(0, 0.6, 6001)[1:]
    alpha, var = 1.0, 0.0
    for a, g in zip(*map(np.asarray, SDE.discretize(times, 1e-4)), strict=True):
        alpha, var = alpha * a, var * a**2 + g**2
    np.testing.assert_allclose(alpha, SDE.mean_coeff(0.6), rtol=2e-3)
    np.testing.assert_allclose(var, SDE.std(0.6) ** 2, rtol=2e-3)
