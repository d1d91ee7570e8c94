"""NCSN++ and DDPM++ (arXiv 2011.13456, §4.3 and appendix H): U-Nets with attention.

With their options they are also the unbounded UNCSN++ and UDDPM++, and the plain DDPM U-Net.
"""

import functools
import itertools
import math
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
      attn_resolutions: image sizes at which blocks are followed by attention: each one on the way
        down, the last one on the way up.
      dropout: rate.
      skip_rescale: divide sums of a skip and a block by √2.
      init_scale: scale of the initial weights of each block's last layer.
      resblock_type: "biggan" (blocks resample) or "ddpm" (layers of their own do).
      resamp_with_conv: the layers that resample between "ddpm" blocks have a convolution.
      fir_kernel: taps of the filter with which images are resampled; empty: none.
      progressive: the output is that of the last level ("none"), the sum of one of every level
        ("output_skip"), or levels are joined by a residual pyramid ("residual").
      progressive_input: the image enters at full resolution alone ("none"), at every level
        ("input_skip"), or through a residual pyramid ("residual").
      progressive_combine: "sum" or "cat": how "input_skip" joins it to the features.
      embedding_type: "positional" (of the labels) or "fourier" (of their logarithm).
      embedding_dim: width of the positional embedding; 0: nf.
      fourier_scale: deviation of the Fourier embedding's frequencies.
      fourier_feature: the image comes with sines and cosines of its values.
      scale_by_sigma: divide the output by the labels, which are σ(t).
      centered: the data are in [-1, 1]; else they are brought there first.
      dtype: compute dtype; parameters are float32.
      remat: keep only the convolutions' results for the gradient, and compute the rest again.
    """

    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    skip_rescale: bool
    init_scale: float
    resblock_type: str = "biggan"
    resamp_with_conv: bool = True
    fir_kernel: tuple[float, ...] = ()
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    embedding_type: str = "positional"
    embedding_dim: int = 0
    fourier_scale: float = 16.0
    fourier_feature: bool = False
    scale_by_sigma: bool = False
    centered: bool = True
    dtype: layers.Dtype = jnp.float32
    remat: bool = False

    def _resample_conv(self, features: int, up: bool) -> nn.Module:
        if self.fir_kernel:
            return layers.FIRConv(features, up, self.fir_kernel, self.dtype)
        return layers.ResampleConv(features, up, self.dtype)

    def _embed(self, labels: Array) -> Array:
        """Labels (N,) → the time embedding (N, E)."""
        if self.embedding_type == "fourier":
            width = self.nf
            project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
            temb = project(jnp.log(labels))
        else:
            width = self.embedding_dim or self.nf
            temb = layers.timestep_embedding(labels, width)
        init = layers.variance_scaling()
        temb = nn.Dense(4 * width, kernel_init=init, dtype=self.dtype)(temb)
        return nn.Dense(4 * width, kernel_init=init, dtype=self.dtype)(nn.silu(temb))

    def _output(self, h: Array, features: int, init_scale: float, train: bool) -> Array:
        init = layers.variance_scaling(init_scale)
        h = layers.GroupNorm(dtype=self.dtype)(h, train=train)
        return layers.Conv(features, kernel_init=init, dtype=self.dtype)(h)

    @nn.compact
    def __call__(
        self, x: Array, labels: Array, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The network's output.

        Args:
          x: images, (N, H, W, C); H and W divisible by 2^(len(ch_mult) - 1).
          labels: (N,), what the time embedding is of.
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
        numbers = itertools.count()
        kind: Any = layers.ResBlock
        if self.remat:
            kind = nn.remat(kind, policy=layers.SAVE_CONVOLUTIONS, static_argnums=(4,))

        def res_block(features: int, resample: Any = None) -> Any:
            return kind(
                features,
                dropout=self.dropout,
                resblock_type=self.resblock_type,
                resample=resample,
                **common,
                name=f"ResBlock_{next(numbers)}",  # whatever class nn.remat makes
            )

        attn_block: Any = functools.partial(layers.AttnBlock, **common)
        up = functools.partial(layers.upsample, fir_kernel=self.fir_kernel)
        down = functools.partial(layers.downsample, fir_kernel=self.fir_kernel)
        rescale = 1 / math.sqrt(2) if self.skip_rescale else 1.0
        channels, last = x.shape[-1], len(self.ch_mult) - 1

        def resample(h: Array, function: Any) -> Array:
            if self.resblock_type == "biggan":
                return res_block(h.shape[-1], resample=function)(h, temb, keys, train)
            if self.resamp_with_conv:
                return self._resample_conv(h.shape[-1], up=function is up)(h)
            return function(h)

        temb = self._embed(labels)
        x = x if self.centered else 2 * x - 1
        in_pyramid = x
        x = layers.fourier_features(x) if self.fourier_feature else x
        h = layers.Conv(self.nf, dtype=self.dtype)(x)
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = res_block(self.nf * mult)(h, temb, keys, train)
                if h.shape[1] in self.attn_resolutions:
                    h = attn_block()(h, train)
                skips.append(h)
            if level != last:
                h = resample(h, down)
                if self.progressive_input == "input_skip":
                    in_pyramid = down(in_pyramid)
                    h = layers.Combine(self.progressive_combine, self.dtype)(in_pyramid, h)
                elif self.progressive_input == "residual":
                    in_pyramid = self._resample_conv(h.shape[-1], up=False)(in_pyramid)
                    h = in_pyramid = rescale * (in_pyramid + h)
                skips.append(h)

        h = res_block(h.shape[-1])(h, temb, keys, train)
        h = attn_block()(h, train)
        h = res_block(h.shape[-1])(h, temb, keys, train)

        out_pyramid: Any = None
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = res_block(self.nf * mult)(
                    jnp.concatenate([h, skips.pop()], axis=-1), temb, keys, train
                )
            if h.shape[1] in self.attn_resolutions:
                h = attn_block()(h, train)
            if self.progressive == "output_skip":
                output = self._output(h, channels, self.init_scale, train)
                out_pyramid = output if level == last else up(out_pyramid) + output
            elif self.progressive == "residual" and level == last:
                out_pyramid = self._output(h, h.shape[-1], 1.0, train)
            elif self.progressive == "residual":
                out_pyramid = self._resample_conv(h.shape[-1], up=True)(out_pyramid)
                h = out_pyramid = rescale * (out_pyramid + h)
            if level != 0:
                h = resample(h, up)

        if self.progressive == "output_skip":
            h = out_pyramid
        else:
            h = self._output(h, channels, self.init_scale, train)
        h = h.astype(jnp.float32)
        return h / labels[:, None, None, None] if self.scale_by_sigma else h
