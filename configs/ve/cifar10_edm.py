"""CIFAR-10, EDM's training of DDPM++ (arXiv 2206.00364, appendix F), without soft truncation.

EDM's augmentation is not here: images are mirrored. With labels: model.num_classes=-1 and
training.label_dropout=0.
"""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    # EDM trains on the levels themselves. Their bits have a bound without a decoder.
    config.data.dequantization = "lossless"
    config.eval.truncated_normal = True
    config.model.update(
        name="edm",
        parametrization="velocity",
        sigma_data=0.5,
        ch_mult=(2, 2, 2),
        dropout=0.13,
        sigma_min=0.002,
        sigma_max=80.0,
        ema_rate=0.5 ** (512 / 500_000),  # half is forgotten after 500,000 images
    )
    config.optim.update(lr=1e-3, warmup=19_531, grad_clip=-1.0)  # 10 million images
    with config.unlocked():
        config.training.update(p_mean=-1.2, p_std=1.2)
    config.training.update(
        objective="edm",
        sde="vesde",
        truncation="fixed",
        reduce_mean=False,
        batch_size=512,
        n_iters=390_625,  # 200 million images
    )
    config.sampling.update(method="heun", num_steps=17)  # 35 evaluations, the last one denoises
    return config
