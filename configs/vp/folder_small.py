"""Your own images on a CPU, or a few thousand of them: `folder_st` with a smaller network.

A DDPM++ of 0.7 M parameters at 32×32, 3,000 steps of 16 images (docs/data.md has what that gives).
"""

from ml_collections import ConfigDict

from configs.vp import folder_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = folder_st.get_config()
    config.model.update(nf=24, num_res_blocks=1, ema_rate=0.99, dropout=0.0)
    config.optim.update(lr=1e-3, warmup=100)
    config.training.update(
        batch_size=16,
        n_iters=3000,
        log_freq=50,
        eval_freq=500,
        snapshot_freq=100,
        snapshot_freq_for_preemption=100,
    )
    config.sampling.update(batch_size=16, n_images=16)
    config.eval.update(num_samples=500, num_test_data=50, batch_size=25, nll_steps=32)
    return config
