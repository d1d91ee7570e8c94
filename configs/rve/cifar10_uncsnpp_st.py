"""CIFAR-10, UNCSN++ on the RVE SDE, soft truncation."""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.update(centered=False, dequantization="none")
    config.model.update(
        fir=True,
        progressive_input="residual",
        embedding_type="fourier",
        scale_by_sigma=True,
        ema_rate=0.999,
        sigma_min=0.001,
    )
    # Uniform 1/t, which is how the release draws t here, is importance sampling of λ = g².
    config.training.update(
        sde="reciprocal_vesde",
        n_iters=13_000_001,
        k=2.0,
        reduce_mean=False,
        eval_freq=100,
        snapshot_sampling=False,
    )
    config.sampling.update(predictor="reverse_diffusion", corrector="langevin", batch_size=1024)
    return config
