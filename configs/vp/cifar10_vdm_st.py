"""CIFAR-10, a network for likelihood after VDM (arXiv 2107.00630), with soft truncation.

All levels are at full resolution: 32 blocks of 128 channels down and 33 up, without resampling;
attention in the middle; Fourier features of the pixels. The network predicts the velocity, of the
levels themselves, and the bound is that of truncated-normal dequantisation. VDM's β is learned and
its attention has one head; both are fixed here. Nobody has published this combination.
"""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.data.update(dequantization="lossless", random_flip=False)
    config.model.update(
        nf=128,
        ch_mult=(1,),
        num_res_blocks=32,
        attn_resolutions=(),
        fourier_feature=True,
        parametrization="velocity",
        dtype="bfloat16",
    )
    config.optim.update(weight_decay=0.0, warmup=1000)
    config.training.update(n_iters=2_000_001, eval_freq=1000, stratified_times=True)
    config.eval.update(truncated_normal=True, num_draws=10, nll_steps=64)
    return config
