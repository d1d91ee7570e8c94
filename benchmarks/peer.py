"""DDPM++'s training step and Inception-v3 in PyTorch, for comparison of speed.

Only the benchmarks use this module; PyTorch is not a requirement of the project. DDPM++ is as fast
as we can make it: the network of `models.ncsnpp` with DDPM++'s options (arXiv 2011.13456, appendix
H), and the objective of `configs/vp/cifar10_st.py`. Arguments and results are NHWC; the network
uses NCHW tensors in the "channels_last" memory format, which has the same layout in memory.
"""

import contextlib
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import take_turn

BETA_MIN, BETA_MAX = 0.1, 20.0  # VP SDE; T = 1
EPS = 1e-5  # smallest truncation
LEARNING_RATE, WARMUP, GRAD_CLIP, EMA_RATE = 2e-4, 5000, 1.0, 0.9999


def _init(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Initialise a layer with Xavier-uniform weights times √scale (0: 1e-10) and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, size: int = 3, scale: float = 1.0) -> nn.Module:
    return _init(nn.Conv2d(inputs, outputs, size, padding=size // 2), scale)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Attention(nn.Module):
    """Single-head self-attention over the pixels, with a rescaled residual connection."""

    def __init__(self, channels: int) -> None:
        """For `channels` channels."""
        super().__init__()
        self.norm = _norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)  # one product is faster than three
        for block in self.query_key_value.weight.chunk(3):
            nn.init.xavier_uniform_(block, gain=math.sqrt(0.1))
        nn.init.zeros_(self.query_key_value.bias)
        self.out = _init(nn.Linear(channels, channels), 0.0)

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
        self.dense = _init(nn.Linear(width, outputs))
        self.norm2, self.dropout = _norm(outputs), nn.Dropout(dropout, inplace=True)
        self.conv2 = _conv(outputs, outputs, scale=0.0)
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
        self.nf, size, width = nf, image_size, 4 * nf
        self.dense1, self.dense2 = _init(nn.Linear(nf, width)), _init(nn.Linear(width, width))
        self.conv_in = _conv(channels, nf)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = nf, [nf]
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                layers = [Block(current, nf * mult, width, dropout)]
                current = nf * mult
                layers += [Attention(current)] if size in attn_resolutions else []
                self.down.append(nn.ModuleList(layers))
                skips.append(current)
            if level != len(ch_mult) - 1:
                block = Block(current, current, width, dropout, "down")
                self.down.append(nn.ModuleList([block]))
                skips.append(current)
                size //= 2
        self.middle = nn.ModuleList(
            [
                Block(current, current, width, dropout),
                Attention(current),
                Block(current, current, width, dropout),
            ]
        )
        for level, mult in reversed(list(enumerate(ch_mult))):
            for i in range(num_res_blocks + 1):
                layers = [Block(current + skips.pop(), nf * mult, width, dropout)]
                current = nf * mult
                if i == num_res_blocks:
                    layers += [Attention(current)] if size in attn_resolutions else []
                    if level != 0:
                        layers.append(Block(current, current, width, dropout, "up"))
                        size *= 2
                self.up.append(nn.ModuleList(layers))
        self.norm_out, self.conv_out = _norm(current), _conv(current, channels, scale=0.0)
        half = nf // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) and labels (N,), 0 … 999 → (N, C, H, W)."""
        angles = labels[:, None] * self.frequencies
        temb = self.dense1(torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = F.silu(self.dense2(F.silu(temb)))

        def run(layers: nn.ModuleList, h: Tensor) -> Tensor:
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


def build(
    nf: int,
    ch_mult: Sequence[int],
    num_res_blocks: int,
    attn_resolutions: Sequence[int],
    dropout: float,
    image_size: int,
    channels: int,
) -> nn.Module:
    """DDPM++ in the channels_last layout; the arguments are the fields of our config."""
    sizes = (dropout, image_size, channels)
    network = DDPMpp(nf, ch_mult, num_res_blocks, attn_resolutions, *sizes)
    return network.to(memory_format=torch.channels_last)


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

    def __init__(
        self, network: nn.Module, device: torch.device | str, compiled: str, autocast: bool
    ) -> None:
        """Move `network` to `device`.

        Args:
          network: from `build`.
          device: where it computes.
          compiled: what torch.compile is given: "network"; "blocks", each on its own, which takes
            it a fraction of the time; or "nothing".
          autocast: whether it computes in bfloat16.
        """
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # TF32, which is XLA's default there too
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._params = list(self.network.parameters())
        self.ema_params = [p.detach().clone() for p in self._params]
        self._run = torch.compile(self.network) if compiled == "network" else self.network
        if compiled == "blocks":
            torch._dynamo.config.recompile_limit = 256  # one program for each different shape
            for module in self.network.modules():
                if isinstance(module, (Block, Attention)):
                    module.compile()
        self._autocast = autocast
        self._adam = torch.optim.Adam(self._params, lr=LEARNING_RATE, eps=1e-8, fused=True)
        self._num_updates = 0

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

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
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The network without dropout: (N, H, W, C) and (N,) → (N, H, W, C) float32."""
        self.network.eval()
        with self._precision():
            return self._run(x.permute(0, 3, 1, 2), labels).float().permute(0, 2, 3, 1)


def _seconds_a_call(call: Callable[[], Any], wait: Callable[[], None], at_least: float) -> float:
    """As `measure.seconds_a_call`; `wait` waits for the device."""

    def measure(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    measure(1)
    once = measure(1)
    if once > at_least:
        return once
    count = max(1, round(at_least / 5 / once))
    return sorted(measure(count) for _ in range(5))[2]


def ddpmpp_rows(job: dict[str, Any], wait: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Rows for benchmarks/train.py."""
    on_gpu = torch.cuda.is_available()
    size, channels = job["network"][-2:]
    device, autocast = "cuda" if on_gpu else "cpu", job["dtype"] == "bfloat16"
    trainer = Trainer(build(*job["network"]), device, job["compiled"], autocast)
    shape = (job["batch"], size, size, channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=trainer.device)
    x, labels = torch.randn(shape, device=trainer.device), torch.linspace(0, 999, job["batch"])
    labels = labels.to(trainer.device)
    calls = {
        "training": lambda: trainer.step(images),
        "forward": lambda: trainer.forward(x, labels),
    }
    first = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        wait()
        first[name] = time.perf_counter() - start
    take_turn()
    for name, call in calls.items():
        row = {"": f"{name}, {job['dtype']}", "first": first[name]}
        yield {**row, "seconds": _seconds_a_call(call, wait, 3.0)}


def _layer(kind: str, inputs: int, outputs: int, size: int) -> Callable[[Tensor], Tensor]:
    """A layer of `benchmarks.cpu.Layer`."""
    if kind == "attention":
        return Attention(inputs)
    if kind == "convolution":
        return _conv(inputs, outputs, size)
    norm, dropout = _norm(inputs), nn.Dropout(0.1, inplace=True)
    if kind == "normalisation":
        return lambda x: F.silu(norm(x))
    return lambda x: dropout(F.silu(norm(x + x.new_ones(len(x), inputs, 1, 1))))


def layer_rows(job: dict[str, Any], wait: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Rows for benchmarks/cpu.py: seconds of each layer's forward pass, and with its gradient."""
    for kind, (n, h, w, channels), outputs, size in job["layers"]:
        layer = _layer(kind, channels, outputs, size)
        x = torch.randn(n, channels, h, w).to(memory_format=torch.channels_last)
        x.requires_grad_()
        g = torch.randn_like(layer(x))

        @torch.no_grad()
        def forward(layer: Any = layer, x: Tensor = x) -> None:
            layer(x)

        def both(layer: Any = layer, x: Tensor = x, g: Tensor = g) -> None:
            x.grad = None
            layer(x).backward(g)

        yield {"seconds": [_seconds_a_call(call, wait, 0.5) for call in (forward, both)]}


def build_inception() -> tuple[str, nn.Module, Callable[[Tensor], Any]]:
    """Inception-v3 with random weights: torch-fidelity's if it is installed, else torchvision's.

    Returns:
      (name of the package; the network; function from images (N, 3, H, W) uint8 to features and
      logits).
    """
    import torchvision

    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False, transform_input=False
    ).eval()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        resize = functools.partial(F.interpolate, size=(299, 299), mode="bilinear")
        return "torchvision", network, lambda x: (network((resize(x.float()) - 128) / 128),)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(network.state_dict(), file.name)
        layers = ["2048", "logits_unbiased"]
        theirs = FeatureExtractorInceptionV3("inception", layers, file.name)
    return "torch-fidelity", theirs, theirs


@torch.inference_mode()
def inception_rows(job: dict[str, Any], wait: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Rows for benchmarks/inception.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    name, network, run = build_inception()
    network.to(device, memory_format=torch.channels_last)
    for precision in ("float32", "TF32") if device == "cuda" else ("float32",):
        torch.backends.cudnn.allow_tf32 = precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
        for size in job["sizes"]:
            images = torch.randint(0, 256, (job["images"], 3, size, size), dtype=torch.uint8)
            batches = images.split(job["batch"])

            def call(batches: Sequence[Tensor] = batches) -> None:
                for batch in batches:
                    for values in run(batch.to(device)):
                        values.cpu()

            start = time.perf_counter()
            call(batches[:1])
            first = time.perf_counter() - start
            row = {"": f"{name}'s, {precision}", "size": size, "first": first}
            yield {**row, "seconds": _seconds_a_call(call, wait, 3.0)}


def main() -> None:
    """Print the rows of a job as JSON; the job is the first argument, also JSON."""
    job = json.loads(sys.argv[1])
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    rows = []
    measure = inception_rows if "sizes" in job else layer_rows if "layers" in job else ddpmpp_rows
    for row in measure(job, wait):
        row["peak"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
