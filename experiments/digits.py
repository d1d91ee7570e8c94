"""The grid on scikit-learn's 8×8 digits, for a CPU: 20 points, 3 seeds, 1 to 2 minutes per run.

10,000 samples are compared with all 1,500 training images.
"""

from configs.vp import digits_st
from experiments.grid import get_points
from experiments.sweep import Sweep


def get_sweep() -> Sweep:
    """The sweep on digits."""
    config = digits_st.get_config()
    config.model.update(nf=16, ch_mult=(1, 2), parametrization="noise")
    config.optim.lr = 2e-3
    config.training.update(
        stratified_times=False,
        n_iters=1000,
        log_freq=20,
        eval_freq=1000,
        snapshot_freq=1000,
        snapshot_freq_for_preemption=500,
        snapshot_sampling=False,
    )
    config.sampling.update(method="dpm_solver", num_steps=20, truncation_time=1e-3)
    config.sampling.update(batch_size=64, n_images=64)
    config.eval.update(num_samples=10_000, nelbo_draws=32, nll_steps=64)
    return Sweep("digits", config, get_points(sigma_max=5.0), seeds=(0, 1, 2))
