"""CelebA 64, UNCSN++ on the RVE SDE, soft truncation."""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsnpp_st.get_config()
    config.data.update(dataset="CELEBA", image_size=64)
    config.model.sigma_max = 90.0
    config.training.update(
        n_iters=1_300_001, log_freq=50, snapshot_freq=50_000, snapshot_sampling=True
    )
    config.sampling.update(snr=0.17, batch_size=512)
    config.eval.update(batch_size=1024, num_test_data=19_962)
    return config
