"""CIFAR-10, NCSN++ on the VE SDE, variance weighting, soft truncation.

The release names no k here, where its soft truncation never happened; 2 is CelebA's.
"""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.update(centered=False, dequantization="none")
    config.model.update(
        embedding_type="fourier",
        fir=True,
        progressive_input="residual",
        scale_by_sigma=True,
        ema_rate=0.999,
        sigma_min=0.001,
    )
    config.training.update(
        sde="vesde",
        likelihood_weighting=False,
        importance_sampling=False,
        k=2.0,
        reduce_mean=False,
        n_iters=13_000_001,
        eval_freq=100,
        snapshot_sampling=False,
    )
    config.sampling.update(predictor="reverse_diffusion", corrector="langevin", batch_size=1024)
    return config
