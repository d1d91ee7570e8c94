"""EDM's networks and loss in NumPy and float64, written down from arXiv 2206.00364."""

import numpy as np


class Reference:
    """A network from the tensors and arguments of an EDM file; images are (N, H, W, C)."""

    def __init__(self, network):
        self.kind, self.state, self.arguments = network.kind, network.state, network.arguments
        self.tensors = {k: np.asarray(v, np.float64) for k, v in network.tensors.items()}
        taps = np.asarray(self.arguments.get("resample_filter", [1, 1]), float)
        self.taps = taps / taps.sum()

    def denoise(self, x, sigma, labels=None):
        """D(x; σ) by table 1, for σ (N,) and one-hot labels (N, L)."""
        s = np.asarray(sigma, float)
        if self.kind == "EDMPrecond":
            d = self.state["sigma_data"]
            c_in, c_skip = (s**2 + d**2) ** -0.5, d**2 / (s**2 + d**2)
            c_out, time = s * d * c_in, np.log(s) / 4
        elif self.kind == "VPPrecond":
            low, slope = self.state["beta_min"], self.state["beta_d"]
            t = (np.sqrt(low**2 + 2 * slope * np.log1p(s**2)) - low) / slope
            c_in, c_skip, c_out, time = (1 + s**2) ** -0.5, 1, -s, (self.state["M"] - 1) * t
        else:
            c_in, c_skip, c_out, time = 1, 1, s, np.log(s / 2)
        c_in, c_skip, c_out = (np.reshape(c, (-1, 1, 1, 1)) for c in (c_in, c_skip, c_out))
        return c_skip * x + c_out * self.network(c_in * x, time, labels)

    def loss(self, x0, noise, sigma, labels=None):
        """EDM's loss, λ(σ) ‖D(x_0 + σ n; σ) - x_0‖², a mean over images."""
        d = self.state["sigma_data"]
        weight = (sigma**2 + d**2) / (sigma * d) ** 2
        denoised = self.denoise(x0 + sigma[:, None, None, None] * noise, sigma, labels)
        return np.mean(weight * np.sum((denoised - x0) ** 2, axis=(1, 2, 3)))

    def network(self, x, time, labels):
        """F(x, time)."""
        temb = self.embed(time, labels)
        skips, pyramid = [], x
        for name in self.modules("enc."):
            if name.endswith("_aux_residual"):
                down = self.down(self.conv(name, self.padded(pyramid)), padded=True)
                x = skips[-1] = pyramid = (x + down) / np.sqrt(2)
                continue
            x = self.conv(name, x) if name.endswith("_conv") else self.block(name, x, temb)
            skips.append(x)
        for name in self.modules("dec."):
            if name.endswith("_aux_norm"):
                x = silu(self.norm(name, x))
            elif name.endswith("_aux_conv"):
                x = self.conv(name, x)
            else:
                if x.shape[-1] != self.tensors[f"{name}.norm0.weight"].shape[0]:
                    x = np.concatenate([x, skips.pop()], axis=-1)
                x = self.block(name, x, temb)
        return x

    def modules(self, start):
        """The names of the modules of one half, in order."""
        names = [".".join(k.split(".")[:2]) for k in self.tensors if k.startswith(start)]
        return list(dict.fromkeys(names))

    def embed(self, time, labels):
        time = np.broadcast_to(time, (len(time),))[:, None]
        if "map_noise.freqs" in self.tensors:
            angles = time * 2 * np.pi * self.tensors["map_noise.freqs"]
        else:
            half = self.arguments["model_channels"] // 2
            angles = time * 10_000 ** (-np.arange(half) / (half - 1))
        y = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        if "map_label.weight" in self.tensors:
            count = self.tensors["map_label.weight"].shape[1]
            told = np.zeros((len(y), count)) if labels is None else labels
            y = y + self.linear("map_label", told * np.sqrt(count))
        return silu(self.linear("map_layer1", silu(self.linear("map_layer0", y))))

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def conv(self, name, x):
        weight = self.tensors[f"{name}.weight"]
        size = weight.shape[-1]
        padded = np.pad(x, [(0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
        y = np.einsum("nhwcij,ocij->nhwo", windows, weight, optimize=True)
        return y + self.tensors[f"{name}.bias"]

    def padded(self, x):
        edge = ((len(self.taps) - 1) // 2,) * 2
        return np.pad(x, [(0, 0), edge, edge, (0, 0)])

    def down(self, x, padded=False):
        x = x if padded else self.padded(x)
        for axis in (1, 2):
            view = np.lib.stride_tricks.sliding_window_view(x, len(self.taps), axis)
            x = np.take(view @ self.taps, np.arange(0, view.shape[axis], 2), axis)
        return x

    def up(self, x):
        """The transpose of `down`, times 4."""
        rows, columns = (
            2 * self.down(np.tile(np.eye(2 * size)[:, :, None, None], (1, 1, 8, 1)))[:, :, 1, 0]
            for size in x.shape[1:3]
        )
        return np.einsum("nhwc,Hh,Ww->nHWc", x, rows, columns)

    def norm(self, name, x):
        n, h, w, c = x.shape
        groups = x.reshape(n, h * w, min(32, c // 4), -1)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        normed = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def block(self, name, x, temb):
        kinds = {"down": self.down, "up": self.up}
        resample = kinds.get(name.rsplit("_", 1)[1], lambda x: x)
        y = self.conv(f"{name}.conv0", resample(silu(self.norm(f"{name}.norm0", x))))
        y = y + self.linear(f"{name}.affine", temb)[:, None, None]
        y = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", y)))
        if f"{name}.skip.weight" in self.tensors:
            x = self.conv(f"{name}.skip", resample(x))
        x = (x + y) / np.sqrt(2)
        if f"{name}.qkv.weight" not in self.tensors:
            return x
        n, h, w, c = x.shape
        parts = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).reshape(n, h * w, c, 3)
        query, key, value = np.moveaxis(parts, -1, 0)
        scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(c))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        return (x + self.conv(f"{name}.proj", mixed.reshape(x.shape))) / np.sqrt(2)


def silu(x):
    return x / (1 + np.exp(-x))
