"""CIFAR-10, wide and deep DDPM++, mixed objective, soft truncation, for likelihood.

The second half of a batch is weighted by a hundredth of the halves' ratio.
"""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.model.update(nf=512, ch_mult=(1, 1, 1), num_res_blocks=8, dropout=0.2)
    config.model.update(fir=True, embedding_dim=128)
    config.training.update(k=2.0, mixed=True, balanced=True, ddpm_weight=0.01)
    config.sampling.method = "pc"
    return config
