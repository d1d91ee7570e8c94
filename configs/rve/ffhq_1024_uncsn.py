"""FFHQ 1024, UNCSN++ on the RVE SDE, fixed truncation."""

from ml_collections import ConfigDict

from configs.rve import ffhq_256_uncsn


def get_config() -> ConfigDict:
    """The recipe."""
    config = ffhq_256_uncsn.get_config()
    config.data.update(image_size=1024, tfrecords_path="ffhq-r10.tfrecords")
    config.model.update(
        nf=16,
        ch_mult=(1, 2, 4, 8, 16, 32, 32, 32),
        num_res_blocks=1,
        ema_rate=0.9999,
        sigma_min=0.0001,
        sigma_max=1348.0,
    )
    config.training.update(
        reduce_mean=True,
        batch_size=16,
        n_iters=240_000_001,
        log_freq=50,
        eval_freq=100,
        snapshot_freq=50_000,
        snapshot_sampling=True,
    )
    config.sampling.snr = 0.15
    config.eval.batch_size = 16
    return config
