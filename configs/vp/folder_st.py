"""Your own images: any below `data.path`, of any size, as squares of `data.image_size` pixels.

A DDPM++ of 7.0 M parameters for one GPU. Larger images: `data.image_size` and a `model.ch_mult` of
one more level each time that it doubles. The network predicts the velocity, since the noise
parametrisation gives saturated samples for a long time (docs/results.md), and τ is
weighed, not drawn (docs/results.md).
"""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.dataset = "folder"
    config.model.update(nf=64, ch_mult=(1, 2, 2), num_res_blocks=2, ema_rate=0.999)
    config.model.parametrization = "velocity"
    config.optim.warmup = 1000
    config.training.update(
        truncation="equivalent_weight",
        stratified_times=True,
        batch_size=64,
        n_iters=100_000,
        log_freq=100,
        eval_freq=0,
        snapshot_freq=0,
        snapshot_freq_for_preemption=0,
    )
    config.sampling.update(method="dpm_solver", truncation_time=1e-3)
    config.eval.update(num_samples=10_000, nll_steps=64)
    return config
