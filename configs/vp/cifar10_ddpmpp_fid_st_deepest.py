"""CIFAR-10, wide and deep DDPM++, mixed objective, soft truncation, for samples."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.model.update(
        nf=512, ch_mult=(1, 1, 1), num_res_blocks=8, dropout=0.2, fir=True, embedding_dim=128
    )
    config.training.update(k=0.9, mixed=True, ddpm_weight=100.0)
    config.sampling.method = "pc"
    return config
