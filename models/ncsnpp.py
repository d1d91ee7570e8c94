"""DDPM++ (arXiv 2011.13456, §4.3 and appendix H): a U-Net of BigGAN blocks with attention."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from models import layers


class NCSNpp(nn.Module):
    """The U-Net.

    Attributes:
      nf: channels at full resolution.
      ch_mult: factor of the channels at each resolution, each half of the one before.
      num_res_blocks: blocks at each resolution on the way down; one more on the way up.
      attn_resolutions: image sizes at which every block is followed by attention.
      dropout: rate.
      skip_rescale: divide sums of a skip and a block by √2.
      init_scale: scale of the initial weights of each block's last layer.
      centered: the data are in [-1, 1]; else they are brought there first.
      dtype: compute dtype; parameters are float32.
    """

    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    skip_rescale: bool
    init_scale: float
    centered: bool = True
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, labels: Array, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The network's output.

        Args:
          x: images, (N, H, W, C); H and W divisible by 2^(len(ch_mult) - 1).
          labels: time labels, (N,).
          train: apply dropout, which takes `dropout_keys` (N,), one key an image.

        Returns:
          (N, H, W, C), float32.
        """
        keys = dropout_keys if train else None
        if train and keys is None and self.dropout:
            raise ValueError("train=True takes dropout_keys, one key an image")
        common: dict[str, Any] = {
            "skip_rescale": self.skip_rescale,
            "init_scale": self.init_scale,
            "dtype": self.dtype,
        }
        res_block: Any = functools.partial(layers.ResBlock, dropout=self.dropout, **common)
        attn_block: Any = functools.partial(layers.AttnBlock, **common)
        dense = functools.partial(
            nn.Dense, 4 * self.nf, kernel_init=layers.variance_scaling(), dtype=self.dtype
        )
        channels = x.shape[-1]

        temb = dense()(layers.timestep_embedding(labels, self.nf))
        temb = dense()(nn.silu(temb))

        h = x if self.centered else 2 * x - 1
        h = layers.Conv(self.nf, dtype=self.dtype)(h)
        skips = [h]
        last = len(self.ch_mult) - 1
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = res_block(self.nf * mult)(h, temb, keys)
                if h.shape[1] in self.attn_resolutions:
                    h = attn_block()(h)
                skips.append(h)
            if level != last:
                h = res_block(self.nf * mult, resample=layers.downsample)(h, temb, keys)
                skips.append(h)

        h = res_block(h.shape[-1])(h, temb, keys)
        h = attn_block()(h)
        h = res_block(h.shape[-1])(h, temb, keys)

        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = res_block(self.nf * mult)(
                    jnp.concatenate([h, skips.pop()], axis=-1), temb, keys
                )
            if h.shape[1] in self.attn_resolutions:
                h = attn_block()(h)
            if level != 0:
                h = res_block(self.nf * mult, resample=layers.upsample)(h, temb, keys)

        h = nn.silu(layers.group_norm(h, self.dtype))
        init = layers.variance_scaling(self.init_scale)
        h = layers.Conv(channels, kernel_init=init, dtype=self.dtype)(h)
        return h.astype(jnp.float32)
