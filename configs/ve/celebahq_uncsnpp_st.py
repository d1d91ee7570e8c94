"""CelebA-HQ 256, NCSN++ on the VE SDE, variance weighting, soft truncation."""

from ml_collections import ConfigDict

from configs.ve import cifar10_ncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_ncsnpp_st.get_config()
    config.data.update(dataset="CelebAHQ", image_size=256)
    config.model.update(
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        dropout=0.0,
        progressive="output_skip",
        progressive_input="input_skip",
        sigma_min=0.01,
        sigma_max=348.0,
        num_scales=2000,
    )
    config.training.update(
        batch_size=64,
        n_iters=24_000_001,
        log_freq=1000,
        eval_freq=500,
        snapshot_freq=200_000,
        snapshot_freq_for_preemption=5000,
    )
    config.sampling.update(snr=0.075, truncation_time=0.001, batch_size=16)
    config.eval.update(batch_size=16, enable_bpd=False)
    return config
