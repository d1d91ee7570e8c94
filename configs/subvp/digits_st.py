"""The digits on the sub-VP SDE: the likelihood weighting with soft truncation."""

from ml_collections import ConfigDict

from configs.vp import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.model.parametrization = "noise"
    config.training.update(sde="subvpsde", stratified_times=False)
    config.sampling.method = "ode"
    config.eval.nll_steps = 64
    return config
