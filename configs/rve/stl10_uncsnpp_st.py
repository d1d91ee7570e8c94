"""STL-10 at 48×48, UNCSN++ on the RVE SDE, soft truncation.

The release has STL-10's defaults but no recipe for it: CIFAR-10's network here, with attention at
24×24, the level that halves the image once as CIFAR-10's 16×16 does.
"""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsnpp_st.get_config()
    config.data.update(dataset="STL10", image_size=48)
    config.model.update(sigma_min=0.01, sigma_max=150.0, attn_resolutions=(24,))
    config.training.batch_size = 196
    config.sampling.snr = 0.17
    return config
