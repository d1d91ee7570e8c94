"""The grid on Fashion-MNIST at 32×32, for one GPU: 20 points, three seeds."""

import jax

from configs.vp import fashion_mnist_st
from experiments.grid import get_points
from experiments.sweep import Sweep


def get_sweep() -> Sweep:
    """The sweep; its networks compute in bfloat16 on a GPU, and in float32 elsewhere."""
    config = fashion_mnist_st.get_config()
    config.data.random_flip = False  # all shoes point to the left, in training and test images
    config.model.update(
        nf=48,
        dropout=0.0,  # not needed in a dozen epochs
        dtype="bfloat16" if jax.default_backend() == "gpu" else "float32",
    )
    config.optim.update(lr=1e-3, warmup=500)
    config.training.update(
        batch_size=128,
        n_iters=6000,
        log_freq=50,
        eval_freq=2000,
        snapshot_freq=6000,
        snapshot_freq_for_preemption=3000,
        snapshot_sampling=False,
    )
    config.sampling.update(method="dpm_solver", num_steps=20, truncation_time=1e-3)
    config.eval.update(
        enable_fid=False,
        batch_size=500,
        num_samples=10_000,
        num_test_data=2000,
        nelbo_draws=16,
    )
    # sigma_max should be about the largest distance of two images, here 21 (arXiv 2006.09011).
    return Sweep("fashion_mnist", config, get_points(sigma_max=20.0), seeds=(0, 1, 2))
