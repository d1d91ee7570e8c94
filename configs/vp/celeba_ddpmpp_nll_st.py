"""CelebA 64, DDPM++, likelihood weighting, soft truncation."""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.update(dataset="CELEBA", image_size=64, dequantization="none")
    config.training.update(n_iters=1_300_001, log_freq=50, eval_freq=100, snapshot_freq=50_000)
    config.model.sigma_max = 90.0  # VP does not read it
    config.sampling.update(snr=0.17, batch_size=512)
    config.eval.update(batch_size=1024, num_test_data=19_962)
    return config
