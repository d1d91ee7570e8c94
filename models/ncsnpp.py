"""NCSN++ and DDPM++ (arXiv 2011.13456, §4.3 and appendix H): U-Nets with attention.

The same module, with other options, is UNCSN++, UDDPM++ and the plain DDPM U-Net.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from models import layers


class NCSNpp(nn.Module):
    """A U-Net with attention and a time embedding.

    Attributes:
      nf: number of channels at full resolution.
      ch_mult: factor of the number of channels at each level; each level halves the resolution.
      num_res_blocks: residual blocks at each level on the way down; one more on the way up.
      attn_resolutions: image sizes at which attention follows each block on the way down, and the
        last block on the way up.
      dropout: dropout rate.
      skip_rescale: divide sums of a skip and a block by √2.
      init_scale: scale of the initial weights of each block's last layer.
      resblock_type: "biggan" (blocks resample) or "ddpm" (separate layers resample).
      resamp_with_conv: whether the layers that resample between "ddpm" blocks have a convolution.
      fir: whether to resample with an FIR filter; otherwise by nearest neighbour and 2×2 means.
      fir_kernel: its taps.
      progressive: the output is that of the last level ("none"), the sum of the outputs of all
        levels ("output_skip"), or the levels are joined by a residual pyramid ("residual").
      progressive_input: the image is the input of the first level ("none"), of every level
        ("input_skip"), or of a residual pyramid ("residual").
      progressive_combine: how "input_skip" joins the image to the features, "sum" or "cat".
      embedding_type: "positional" (of the time) or "fourier" (of its logarithm).
      embedding_dim: width of the positional embedding; 0: nf.
      fourier_scale: standard deviation of the Fourier embedding's frequencies.
      fourier_feature: append sines and cosines of its values to the image.
      scale_by_sigma: whether the output is divided by σ(t); here, if it is the time (`sees_sigma`).
      centered: whether the data are in [-1, 1]; data in [0, 1] are scaled to [-1, 1] first.
      dtype: compute dtype; parameters are float32.
      remat: for the gradient, keep only the results of convolutions and compute the rest again.
      num_classes: the number of classes whose labels it can be told; 0: none.
      patch_size: P, for which each P×P pixels of the image become the channels of one position;
        the levels' sizes are those of the folded image.
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
    fir: bool = False
    fir_kernel: tuple[float, ...] = (1, 3, 3, 1)
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
    num_classes: int = 0
    patch_size: int = 1

    @property
    def sees_sigma(self) -> bool:
        """Whether its time is σ(t), if the SDE is of VE's kind; see `models.score.ScoreModel`."""
        return self.embedding_type == "fourier"

    @property
    def _taps(self) -> tuple[float, ...]:
        return tuple(self.fir_kernel) if self.fir else ()

    def _resample_conv(self, features: int, up: bool) -> nn.Module:
        if self.fir:
            return layers.FIRConv(features, up, self._taps, self.dtype)
        return layers.ResampleConv(features, up, self.dtype)

    def _embed(self, time_cond: Array, labels: Array | None) -> Array:
        """Times and labels (N,) → their embedding (N, E)."""
        if self.embedding_type == "fourier":
            width = self.nf
            project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
            temb = project(jnp.log(time_cond))
        else:
            width = self.embedding_dim or self.nf
            temb = layers.timestep_embedding(time_cond, width)
        temb = layers.Dense(4 * width, dtype=self.dtype)(temb)
        temb = layers.Dense(4 * width, dtype=self.dtype)(nn.silu(temb))
        if not self.num_classes:
            return temb
        # Added as in ADM (arXiv 2105.05233).
        chosen = jnp.full(len(temb), self.num_classes) if labels is None else labels
        init = nn.initializers.normal(1.0)
        embed = nn.Embed(self.num_classes + 1, temb.shape[-1], self.dtype, embedding_init=init)
        return temb + embed(chosen)

    def _output(self, h: Array, features: int, init_scale: float, train: bool) -> Array:
        init = layers.variance_scaling(init_scale)
        h = layers.GroupNorm(dtype=self.dtype)(h, train=train)
        return layers.Conv(features, kernel_init=init, dtype=self.dtype)(h)

    def _blocks(
        self, temb: Array, keys: Array | None, train: bool
    ) -> tuple[Callable[..., Array], Callable[[Array], Array]]:
        """(a residual block: (h, features, resample=None) → h, attention: h → h)."""
        common: dict[str, Any] = {
            "skip_rescale": self.skip_rescale,
            "init_scale": self.init_scale,
            "dtype": self.dtype,
        }
        numbers = itertools.count()
        kind: Any = layers.ResBlock
        if self.remat:
            kind = nn.remat(kind, policy=layers.SAVE_CONVOLUTIONS, static_argnums=(4,))

        def res_block(h: Array, features: int, resample: Any = None) -> Array:
            block = kind(
                features,
                dropout=self.dropout,
                resblock_type=self.resblock_type,
                resample=resample,
                **common,
                name=f"ResBlock_{next(numbers)}",  # the name must not depend on nn.remat
            )
            return block(h, temb, keys, train)

        def attend(h: Array) -> Array:
            return layers.AttnBlock(**common)(h, train)

        return res_block, attend

    def _resample(self, h: Array, function: Any, up: bool, res_block: Any) -> Array:
        """Between two levels."""
        if self.resblock_type == "biggan":
            return res_block(h, h.shape[-1], function)
        if self.resamp_with_conv:
            return self._resample_conv(h.shape[-1], up)(h)
        return function(h)

    @property
    def _rescale(self) -> float:
        return 1 / math.sqrt(2) if self.skip_rescale else 1.0

    def _encode(self, x: Array, res_block: Any, attend: Any) -> tuple[Array, list[Array]]:
        """The way down: (features of the last level, the skips)."""
        down = functools.partial(layers.downsample, fir_kernel=self._taps)
        in_pyramid, last = x, len(self.ch_mult) - 1
        x = layers.fourier_features(x) if self.fourier_feature else x
        # In float32 whatever the others compute in: bfloat16 has steps of 2^-8 below 1, larger than
        # the noise at small t.
        h = layers.Conv(self.nf, precision="highest")(x).astype(self.dtype)
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = res_block(h, self.nf * mult)
                if h.shape[1] in self.attn_resolutions:
                    h = attend(h)
                skips.append(h)
            if level != last:
                h = self._resample(h, down, False, res_block)
                if self.progressive_input == "input_skip":
                    in_pyramid = down(in_pyramid)
                    h = layers.Combine(self.progressive_combine, self.dtype)(in_pyramid, h)
                elif self.progressive_input == "residual":
                    in_pyramid = self._resample_conv(h.shape[-1], up=False)(in_pyramid)
                    h = in_pyramid = self._rescale * (in_pyramid + h)
                skips.append(h)
        return h, skips

    def _decode(
        self, h: Array, skips: list[Array], channels: int, res_block: Any, attend: Any, train: bool
    ) -> Array:
        """The way up: the output, with so many channels."""
        up = functools.partial(layers.upsample, fir_kernel=self._taps)
        out_pyramid: Any = None
        last = len(self.ch_mult) - 1
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = res_block(jnp.concatenate([h, skips.pop()], axis=-1), self.nf * mult)
            if h.shape[1] in self.attn_resolutions:
                h = attend(h)
            if self.progressive == "output_skip":
                output = self._output(h, channels, self.init_scale, train)
                out_pyramid = output if level == last else up(out_pyramid) + output
            elif self.progressive == "residual" and level == last:
                out_pyramid = self._output(h, h.shape[-1], 1.0, train)
            elif self.progressive == "residual":
                out_pyramid = self._resample_conv(h.shape[-1], up=True)(out_pyramid)
                h = out_pyramid = self._rescale * (out_pyramid + h)
            if level != 0:
                h = self._resample(h, up, True, res_block)
        if self.progressive == "output_skip":
            return out_pyramid
        return self._output(h, channels, self.init_scale, train)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time_cond: Array,
        train: bool = False,
        dropout_keys: Array | None = None,
        labels: Array | None = None,
    ) -> Array:
        """The network's output.

        Args:
          x: images, (N, H, W, C); H and W divisible by
            patch_size · 2^(len(ch_mult) - 1).
          time_cond: (N,), the time as the network is told it; `models.score` computes it.
          train: whether to apply dropout.
          dropout_keys: (N,), one key for each image; needed for dropout.
          labels: classes (N,) int32, for a network with `num_classes`, which itself stands for no
            label; None: no label for all images.

        Returns:
          (N, H, W, C), float32.
        """
        keys = dropout_keys if train else None
        if train and keys is None and self.dropout:
            raise ValueError("train=True takes dropout_keys, one key an image")
        res_block, attend = self._blocks(self._embed(time_cond, labels), keys, train)
        x = layers.fold(x if self.centered else 2 * x - 1, self.patch_size)
        h, skips = self._encode(x, res_block, attend)
        h = attend(res_block(h, h.shape[-1]))
        h = res_block(h, h.shape[-1])
        h = self._decode(h, skips, x.shape[-1], res_block, attend, train).astype(jnp.float32)
        h = layers.unfold(h, self.patch_size)
        divides = self.scale_by_sigma and self.sees_sigma
        return h / time_cond[:, None, None, None] if divides else h
