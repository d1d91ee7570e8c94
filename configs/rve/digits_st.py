"""The digits on the RVE SDE, with a small UNCSN++: soft truncation."""

from ml_collections import ConfigDict

from configs.vp import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.data.centered = False
    config.model.update(
        fir=True,
        progressive_input="residual",
        embedding_type="fourier",
        fourier_scale=1.0,
        scale_by_sigma=True,
        parametrization="noise",
        sigma_max=5.0,
    )
    # Uniform 1/t, which is how the release draws t here, is importance sampling of λ = g².
    config.training.update(sde="reciprocal_vesde", k=2.0, stratified_times=False)
    config.sampling.update(method="ode", truncation_time=1e-5)
    config.eval.nll_steps = 64
    return config
