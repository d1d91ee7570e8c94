"""The digits on the VE SDE, with a small NCSN++: the likelihood weighting with soft truncation."""

from ml_collections import ConfigDict

from configs.vp import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.data.centered = False
    config.model.update(
        parametrization="noise",
        embedding_type="fourier",
        # With the release's 16, a fifth of RVE's samples are still noise after so few steps.
        fourier_scale=1.0,
        fir=True,
        progressive_input="residual",
        scale_by_sigma=True,
        sigma_max=5.0,
    )
    config.training.update(sde="vesde", k=2.0, stratified_times=False)
    config.sampling.method = "ode"
    config.eval.nll_steps = 64
    return config
