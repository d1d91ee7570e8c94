"""FFHQ 1024, UNCSN++ on the RVE SDE, fixed truncation."""

from ml_collections import ConfigDict

from configs.rve import church_uncsn


def get_config() -> ConfigDict:
    """The recipe."""
    config = church_uncsn.get_config()
    config.data.update(dataset="FFHQ", category="", image_size=1024)
    config.model.update(
        nf=16,
        ch_mult=(1, 2, 4, 8, 16, 32, 32, 32),
        num_res_blocks=1,
        ema_rate=0.9999,
        sigma_min=0.0001,
        sigma_max=1348.0,
    )
    config.training.update(
        batch_size=16,
        n_iters=240_000_001,
        reduce_mean=True,
        log_freq=50,
        eval_freq=100,
        snapshot_freq=50_000,
        snapshot_sampling=True,
    )
    config.sampling.snr = 0.15
    return config
