import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import sde_lib
from tests.helpers import GOLDEN

SDES = {
    "vp": sde_lib.VPSDE(),
    "subvp": sde_lib.SubVPSDE(),
    "ve": sde_lib.VESDE(0.01, 50.0),
    "rve": sde_lib.RVESDE(0.001, 50.0),
}
GRID = np.geomspace(1e-5, 1, 2001).astype(np.float32)
each_sde = pytest.mark.parametrize("name", SDES)


def exact_b(t):
    t = np.asarray(t, np.float64)
    return t * (0.1 + 0.5 * t * 19.9)


def exact_std(name, t):
    t, b = np.asarray(t, np.float64), exact_b(t)
    return {
        "vp": lambda: np.sqrt(-np.expm1(-b)),
        "subvp": lambda: -np.expm1(-b),
        "ve": lambda: 0.01 * 5000**t,
        "rve": lambda: 50 * (0.001 / 50) ** ((1 / t - 1) / (1e5 - 1)),
    }[name]()


def exact_f(name, t):
    """γ(t) in float64, up to a constant."""
    if name in ("ve", "rve"):
        return 2 * np.log(exact_std(name, t))
    return {"vp": lambda b: np.log(np.expm1(b)), "subvp": lambda b: 2 * np.log(np.sinh(b / 2))}[
        name
    ](exact_b(t))


def exact_time(name, f):
    """The inverse of `exact_f`."""
    if name == "ve":
        return (f / 2 - np.log(0.01)) / np.log(5000)
    if name == "rve":
        return 1 / (1 + (1e5 - 1) * (f / 2 - np.log(50)) / np.log(0.001 / 50))
    b = np.logaddexp(0, f) if name == "vp" else 2 * np.arcsinh(np.exp(f / 2))
    return 2 * b / (0.1 + np.sqrt(0.01 + 2 * 19.9 * b))


@each_sde
def test_golden_coefficients(name):
    golden = np.load(GOLDEN / "sde.npz")
    t = jnp.asarray(golden["rve_t" if name == "rve" else "t"], jnp.float32)
    for field in ("mean_coeff", "std", "drift_coeff", "diffusion"):
        if f"{name}_{field}" in golden:
            # The golden times are float64; RVE's σ changes 11 times as fast as t near 1e-5.
            np.testing.assert_allclose(
                getattr(SDES[name], field)(t),
                golden[f"{name}_{field}"],
                rtol=2e-6 if name == "rve" else 1e-6,
            )


@pytest.mark.parametrize("tau", ["1e-05", "0.001", "0.1"])
def test_golden_importance_sampling(tau):
    golden = np.load(GOLDEN / "sde.npz")
    u = jnp.asarray(golden["u"], jnp.float32)
    t = SDES["vp"].importance_time(u, float(tau))
    np.testing.assert_allclose(t, golden[f"vp_is_t_{tau}"], rtol=1e-5)
    for name in ("vp", "ve"):
        z = SDES[name].importance_normalizer(float(tau))
        np.testing.assert_allclose(z, golden[f"{name}_is_Z_{tau}"], rtol=1e-6)


@each_sde
def test_std_keeps_its_digits_in_float32(name):
    np.testing.assert_allclose(SDES[name].std(GRID), exact_std(name, GRID), rtol=1e-6)


@each_sde
@pytest.mark.parametrize("tau", [1e-5, 1e-4, 1e-2, 0.5, 0.99])
def test_importance_time_keeps_its_digits_in_float32(name, tau):
    u = np.linspace(0, 1, 1001).astype(np.float32)
    tau = np.float32(tau)
    start, stop = exact_f(name, tau), exact_f(name, 1.0)
    exact = exact_time(name, start + u.astype(np.float64) * (stop - start))
    t = SDES[name].importance_time(u, tau)
    np.testing.assert_allclose(t, exact, rtol=1e-5)
    assert t.min() >= tau and t.max() <= 1


@each_sde
def test_importance_times_have_density_g2_over_sigma2(name):
    tau = 1e-3
    t = SDES[name].importance_time(jax.random.uniform(jax.random.key(0), (20_000,)), tau)

    def cdf(t):
        start, stop = exact_f(name, tau), exact_f(name, 1.0)
        return (exact_f(name, t) - start) / (stop - start)

    assert scipy.stats.kstest(np.asarray(t, np.float64), cdf).pvalue > 1e-3
    # The closed form itself, against quadrature of g²/σ².

    def ratio(t):
        return float(SDES[name].diffusion(t) / SDES[name].std(t)) ** 2

    integral = scipy.integrate.quad(lambda s: ratio(np.exp(s)) * np.exp(s), np.log(tau), 0)[0]
    np.testing.assert_allclose(SDES[name].importance_normalizer(tau), integral, rtol=1e-5)


@each_sde
def test_gamma_is_the_negative_log_snr_and_has_an_inverse(name):
    sde, t = SDES[name], GRID[50:]
    log_snr = 2 * (np.asarray(sde.log_mean_coeff(t), np.float64) - np.log(exact_std(name, t)))
    np.testing.assert_allclose(sde.gamma(t), -log_snr, rtol=2e-6, atol=2e-5)
    back = sde.inverse_gamma(sde.gamma(t))
    # As exact as float32's γ allows: σ/α comes back, and t where it decides σ/α.
    np.testing.assert_allclose(sde.gamma(back), sde.gamma(t), rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(back, t, rtol=1e-4 if name != "rve" else 1.0, atol=1e-7)


@each_sde
def test_drift_and_diffusion_generate_mean_and_std(name):
    # dα/dt = f α and dσ²/dt = 2 f σ² + g², by automatic differentiation.
    sde, t = SDES[name], jnp.asarray(GRID[200::200])
    alpha, d_alpha = jax.jvp(sde.mean_coeff, (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(d_alpha, sde.drift_coeff(t) * alpha, rtol=1e-5)
    var, d_var = jax.jvp(lambda t: sde.std(t) ** 2, (t,), (jnp.ones_like(t),))
    expected = 2 * sde.drift_coeff(t) * var + sde.diffusion(t) ** 2
    np.testing.assert_allclose(d_var, expected, rtol=1e-4, atol=1e-5)


@each_sde
def test_transitions_compose_to_the_marginal(name):
    sde = SDES[name]
    for s, t in [(1e-5, 2e-5), (1e-4, 1e-2), (0.3, 0.30001), (0.5, 1.0)]:
        a, b = (np.asarray(v, np.float64) for v in sde.transition(s, t))
        s32, t32 = np.float32(s), np.float32(t)
        np.testing.assert_allclose(a * sde.mean_coeff(s), sde.mean_coeff(t), rtol=1e-6)
        exact = exact_std(name, t32) ** 2 - a**2 * exact_std(name, s32) ** 2
        scale = exact_std(name, t32) ** 2
        # Where little noise is added, its variance is a small difference: ours keeps its digits.
        np.testing.assert_allclose(b**2, exact, rtol=2e-2 if exact < 1e-3 * scale else 1e-4)


@each_sde
def test_time_grids_run_down_in_equal_steps_of_the_clock(name):
    grid = np.asarray(SDES[name].time_grid(1e-4, 11), np.float64)
    assert grid[0] == 1 and abs(grid[-1] - 1e-4) < 1e-9 and (np.diff(grid) < 0).all()
    clock = 1 / grid if name == "rve" else grid
    np.testing.assert_allclose(np.diff(clock), np.diff(clock)[0], rtol=1e-4)


def test_unbounded_time_runs_from_0_to_999_and_spreads_small_times():
    sde, t = SDES["vp"], np.geomspace(1e-5, 1, 50)
    b = exact_b(t)
    exact = np.log(1 - np.exp(-b) + 1e-3) + b
    exact = (exact - exact[0]) / (exact[-1] - exact[0])
    np.testing.assert_allclose(sde.unbounded_time(t, 1e-3), exact, atol=1e-6)
    assert sde.unbounded_time(1e-2, 1e-3) > 5 * 1e-2


def test_prior_is_a_normal_of_its_deviation():
    z = np.random.default_rng(0).standard_normal((3, 2, 2, 1)).astype(np.float32) * 40
    for name, scale in (("vp", 1.0), ("ve", 50.0)):
        expected = scipy.stats.norm.logpdf(z, scale=scale).sum((1, 2, 3))
        np.testing.assert_allclose(SDES[name].prior_logp(z), expected, rtol=1e-5)
