"""The claim on Fashion-MNIST: at 16×16 on a CPU, at 32×32 on a GPU; make_data.py makes the images.

On a GPU: `python -m experiments.make_data fashion_mnist DIR --size 32`.
"""

import jax

from configs.vp import folder_st
from experiments.claim import get_claim
from experiments.sweep import Sweep

_BEST: dict[str, tuple[str, ...]] = {"noise": ("fixed_1e-5",), "velocity": ("fixed_1e-5",)}


def get_sweep_at(image_size: int) -> Sweep:
    """The sweep at 16×16, with a network for a CPU, or at 32×32, with one for a GPU."""
    large = image_size == 32
    config = folder_st.get_config()
    # All shoes point to the left, in training and test images.
    config.data.update(image_size=image_size, num_channels=1, random_flip=False)
    config.model.update(
        nf=32 if large else 16,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(8,),
        dropout=0.0,
        ema_rate=0.995,
    )
    if not large:
        return get_claim("claim_fashion_mnist", config, _BEST, num_images=256)
    name = "claim_fashion_mnist_32"
    return get_claim(name, config, _BEST, num_images=2048, batch_size=128, n_iters=2000)


def get_sweep() -> Sweep:
    """The sweep for this machine."""
    return get_sweep_at(32 if jax.default_backend() == "gpu" else 16)
