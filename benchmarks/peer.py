"""DDPM++'s training step in PyTorch, for comparison of speed.

Only the benchmarks use this module; PyTorch is not a requirement of the project. DDPM++ is as fast
as we can make it: the network of `models.ncsnpp` with DDPM++'s options (arXiv 2011.13456, appendix
H), and the objective of `configs/vp/cifar10_st.py`. Arguments and results are NHWC; the network
uses NCHW tensors in the "channels_last" memory format, which has the same layout in memory.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import seconds_a_call, take_turn, timed

BETA_MIN, BETA_MAX = 0.1, 20.0  # VP SDE; T = 1
EPS = 1e-5  # smallest truncation
LEARNING_RATE, WARMUP, GRAD_CLIP, EMA_RATE = 2e-4, 5000, 1.0, 0.9999


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Attention(nn.Module):
    """Single-head self-attention over the pixels, with a rescaled residual connection."""

    def __init__(self, channels: int) -> None:
        """For `channels` channels."""
        super().__init__()
        self.norm = _norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)  # one product is faster than three
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        y = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = self.query_key_value(y)[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(query, key, value)[:, 0]
        y = self.out(y).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return (x + y) * math.sqrt(0.5)


class Block(nn.Module):
    """BigGAN's residual block with a time embedding; `resample` is "", "up" or "down"."""

    def __init__(
        self, inputs: int, outputs: int, width: int, dropout: float, resample: str = ""
    ) -> None:
        """From `inputs` to `outputs` channels; the time embedding has size `width`."""
        super().__init__()
        self.resample = resample
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.dense = nn.Linear(width, outputs)
        self.norm2, self.dropout = _norm(outputs), nn.Dropout(dropout, inplace=True)
        self.conv2 = _conv(outputs, outputs)
        same = inputs == outputs and not resample
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, size=1)

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample else x

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """(N, C, H, W) and silu(embedding) (N, E) → (N, C', H', W')."""
        y = self.conv1(self._resample(F.silu(self.norm1(x))))
        y = y + self.dense(temb)[:, :, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return (self.shortcut(self._resample(x)) + y) * math.sqrt(0.5)


class DDPMpp(nn.Module):
    """The U-Net; the arguments are the fields of our config."""

    frequencies: Tensor

    def __init__(
        self,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        image_size: int,
        channels: int,
    ) -> None:
        """See `models.ncsnpp.NCSNpp`."""
        super().__init__()
        size, width, current, skips = image_size, 4 * nf, nf, [nf]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        def layers(outputs: int, inputs: int = 0, resample: str = "", attends: bool = False) -> Any:
            block = Block(inputs or current, outputs, width, dropout, resample)
            return nn.ModuleList([block, Attention(outputs)] if attends else [block])

        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.down.append(layers(nf * mult, attends=size in attn_resolutions))
                current = nf * mult
                skips.append(current)
            if level != len(ch_mult) - 1:
                self.down.append(layers(current, resample="down"))
                skips.append(current)
                size //= 2
        self.middle = layers(current, attends=True).extend(layers(current))
        for level, mult in reversed(list(enumerate(ch_mult))):
            for i in range(num_res_blocks + 1):
                last = i == num_res_blocks
                attends = last and size in attn_resolutions
                stage = layers(nf * mult, current + skips.pop(), attends=attends)
                current = nf * mult
                if last and level != 0:
                    stage.extend(layers(current, resample="up"))
                self.up.append(stage)
            size *= 2
        self.dense1, self.dense2 = nn.Linear(nf, width), nn.Linear(width, width)
        self.conv_in, self.conv_out = _conv(channels, nf), _conv(current, channels)
        self.norm_out, half = _norm(current), nf // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Images (N, C, H, W) and times (N,), 0 … 999 → (N, C, H, W)."""
        angles = times[:, None] * self.frequencies
        temb = self.dense1(torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = F.silu(self.dense2(F.silu(temb)))

        def run(layers: Any, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, temb) if isinstance(layer, Block) else layer(h)
            return h

        h = self.conv_in(x)
        skips = [h]
        for layers in self.down:
            h = run(layers, h)
            skips.append(h)
        h = run(self.middle, h)
        for layers in self.up:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(F.silu(self.norm_out(h)))


def _integral_beta(t: Tensor) -> Tensor:
    """B(t) = ∫₀ᵗ β(s) ds."""
    return t * (BETA_MIN + 0.5 * t * (BETA_MAX - BETA_MIN))


def _gamma(t: Tensor) -> Tensor:
    """γ(t) = log σ²/α², elementwise."""
    b = _integral_beta(t)
    return b + torch.log(-torch.expm1(-b))


def _importance_time(u: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Times (N,) with density ∝ g²/σ² on [τ, 1], from uniform u (N,), and the normaliser Z_τ."""
    low, high = _gamma(tau), _gamma(torch.ones_like(tau))
    b = F.softplus(low + u * (high - low))
    slope = BETA_MAX - BETA_MIN
    t = 2 * b / (BETA_MIN + torch.sqrt(BETA_MIN**2 + 2 * slope * b))
    return torch.clamp(t, EPS, 1.0), high - low


class Trainer:
    """A training step and a forward pass, with PyTorch's own optimisations."""

    def __init__(self, network: Any, autocast: bool) -> None:
        """Move `network` to the GPU, if there is one, and compile it there.

        Args:
          network: a `DDPMpp`.
          autocast: whether it computes in bfloat16.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._run, self._autocast = self.network, autocast
        if self.device == "cuda":  # TF32, which is XLA's default there too
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
            self._run = torch.compile(self.network)
        self._params = list(self.network.parameters())
        self.ema_params = [p.detach().clone() for p in self._params]
        self._adam = torch.optim.Adam(self._params, lr=LEARNING_RATE, eps=1e-8, fused=True)
        self._num_updates = 0

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self._autocast)

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels (N, H, W, C) uint8 → (x_t, t, z, the weight Z_τ)."""
        x = images.permute(0, 3, 1, 2) * (2 / 255) - 1
        flip = torch.rand(len(x), 1, 1, 1, device=self.device) < 0.5
        x = torch.where(flip, x.flip(3), x)
        u = torch.rand(len(x) + 1, device=self.device)
        tau = EPS ** (1 - u[0])  # P_1(τ) ∝ 1/τ
        t, normalizer = _importance_time(u[1:], tau)
        b = _integral_beta(t)[:, None, None, None]
        z = torch.randn_like(x)
        return torch.exp(-0.5 * b) * x + torch.sqrt(-torch.expm1(-b)) * z, t, z, normalizer

    def step(self, images: Tensor) -> Tensor:
        """One update with images (N, H, W, C) uint8 on the device; returns the loss at once."""
        self.network.train()
        x_t, t, z, normalizer = self._draw(images)
        with self._precision():
            output = self._run(x_t, 999 * t)
        # λ = g² over the density g²/(σ² Z_τ) gives ½ Z_τ ‖z - output‖² for the predicted noise.
        loss = 0.5 * normalizer * F.mse_loss(output.float(), z)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._params, GRAD_CLIP)
        for group in self._adam.param_groups:
            group["lr"] = LEARNING_RATE * min(self._num_updates / WARMUP, 1.0)
        self._adam.step()
        self._num_updates += 1
        decay = min(EMA_RATE, (1 + self._num_updates) / (10 + self._num_updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema_params, self._params, 1 - decay)
        return loss.detach()

    @torch.no_grad()
    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """The network without dropout: (N, H, W, C) and (N,) → (N, H, W, C) float32."""
        self.network.eval()
        with self._precision():
            return self._run(x.permute(0, 3, 1, 2), times).float().permute(0, 2, 3, 1)


def _wait(result: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(network: dict[str, Any], batch: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Rows for benchmarks/train.py; `network` has the arguments of `DDPMpp`."""
    trainer = Trainer(DDPMpp(**network), dtype == "bfloat16")
    shape = (batch, network["image_size"], network["image_size"], network["channels"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=trainer.device)
    x = torch.randn(shape, device=trainer.device)
    times = torch.linspace(0, 999, batch, device=trainer.device)
    calls = {
        "training": lambda: trainer.step(images),
        "forward": lambda: trainer.forward(x, times),
    }
    first = {name: timed(call, wait=_wait) for name, call in calls.items()}
    take_turn()
    for name, call in calls.items():
        row = {"": f"{name}, {dtype}", "first": first[name]}
        row["seconds"] = seconds_a_call(call, wait=_wait)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        yield {**row, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(list(measure(**json.loads(sys.argv[1])))))
