"""scikit-learn's 8×8 digits on a CPU in minutes: the likelihood weighting with soft truncation.

Velocity and stratified times are better than noise and independent times in three trainings of
three (docs/results.md).
"""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.update(dataset="digits", image_size=8, num_channels=1, random_flip=False)
    config.model.update(
        nf=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        ema_rate=0.999,
        parametrization="velocity",
    )
    config.optim.update(lr=3e-3, warmup=100)
    config.training.update(
        stratified_times=True,
        batch_size=64,
        n_iters=1400,
        log_freq=50,
        eval_freq=200,
        snapshot_freq=700,
        snapshot_freq_for_preemption=200,
    )
    config.sampling.update(method="dpm_solver", num_steps=20, truncation_time=1e-3)
    # eval.batch_size, so that training's grids, samples and evaluation are one compiled program
    config.sampling.update(batch_size=100, n_images=100)
    config.sampling.update(rtol=1e-3, atol=1e-3)  # of method=ode
    config.eval.update(
        enable_fid=False,  # 8×8 digits are not what Inception knows
        batch_size=100,
        num_samples=1500,
        num_test_data=297,
        nelbo_draws=64,
        nll_steps=32,
    )
    return config
