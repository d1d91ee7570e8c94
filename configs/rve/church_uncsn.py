"""LSUN church 256, UNCSN++ on the RVE SDE, fixed truncation."""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.update(
        dataset="LSUN",
        category="church_outdoor",
        image_size=256,
        centered=False,
        dequantization="none",
    )
    config.model.update(
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        dropout=0.0,
        fir=True,
        progressive="output_skip",
        progressive_input="input_skip",
        embedding_type="fourier",
        scale_by_sigma=True,
        ema_rate=0.999,
        sigma_min=0.001,
        sigma_max=380.0,
        num_scales=2000,
    )
    config.training.update(
        sde="reciprocal_vesde",
        batch_size=64,
        n_iters=24_000_001,
        truncation="fixed",
        k=2.0,
        reduce_mean=False,
        log_freq=1000,
        eval_freq=500,
        snapshot_freq=200_000,
        snapshot_freq_for_preemption=5000,
        snapshot_sampling=False,
    )
    config.sampling.update(
        predictor="reverse_diffusion", corrector="langevin", snr=0.075, batch_size=16
    )
    # The release samples in its sampling.batch_size, and has no bits/dim for images of this size.
    config.eval.update(batch_size=16, enable_bpd=False)
    return config
