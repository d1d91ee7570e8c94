"""Plausible mistakes, each of which a fast test must see: `python -m tests.mutations`.

It copies the tracked files to a temporary folder, makes one mistake at a time there, and runs the
fast tests of its subject. It is not part of the tests: all mistakes take half an hour.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]

# [the file | arguments of pytest after tests/], and under it a line for each mistake:
# name: what stands in the file, exactly once → what is put in its place.
TABLE = """
[sde_lib.py | test_sde_lib.py]
drift without its half: return -0.5 * self.beta(t) → return -self.beta(t)
integral of beta between: 0.5 * (t + s) → 0.5 * (t - s)
diffusion of VE: return self.std(t) * math.sqrt(2 * → return self.std(t) * math.sqrt(
clock of RVE: return -1 / jnp.asarray(t) → return -jnp.asarray(t)
time grid without its end: self.solver_time(eps), num) → self.solver_time(eps), num, False)
prior of a wrong scale: + sq / scale**2) → + sq / scale)
[sde_lib.py | test_sampling.py -k denoising]
Tweedie with σ: (x + std**2 * score) / alpha → (x + std * score) / alpha

[losses.py | test_losses.py -k "prior_icdf or drawn"]
density of uniform times: jnp.broadcast_to(sde.T - tau, u.shape) → jnp.ones_like(u)
density of the prior: ratio ** (-self.k) → ratio ** (1 - self.k)
[losses.py | test_losses.py -k "equivalent_weight_in and 1-True-True"]
equivalent weight from above: weight * self.prior.cdf(t) → weight * (1 - self.prior.cdf(t))
[losses.py | test_losses.py -k devices]
truncation of each device: (tau_key)  # one → (jax.random.fold_in(tau_key, index[0]))  # one
[losses.py | test_losses.py -k "golden_losses or decoder"]
sign of the noise in the loss: (scaled_score + z) ** 2) → (scaled_score - z) ** 2)
closed lowest level: -jnp.inf, error - half → error - half, error - half
[losses.py | test_losses.py -k "residual or flipped or ratio_of_halves"]
normaliser of the decoder: - dims * jnp.log(alpha) → + dims * jnp.log(alpha)
one noise for two terms: normal(draws.keys.residual, → normal(draws.keys.noise,
training without flips: flip=train) → flip=False)
balance of one device: if axis_name else mean) → if False else mean)
balance of wrong pairs: jnp.roll(losses, -1) → jnp.roll(losses, 1)
[losses.py | test_universal.py -k "stratified_times_are or weighting_is_the_cdf"]
strata of one device: + index / → + jnp.arange(len(index)) /
velocity's weight: jnp.exp(0.5 * gamma) → jnp.exp(gamma)

[losses.py | test_edm.py -k "noise_of_training or objective_weighs"]
weight without σ_d: self.sde.std(t) / self.sigma_data) ** 2 → self.sde.std(t)) ** 2
a truncation's part as the whole: weight = 2 * (high - low) * square → weight = 2 * square

[likelihood.py | test_likelihood.py -k "fixed_steps or constants or error_of_a_mean or each_nll"]
end weights reversed: [:3] *= (3 / 8, 7 / 6, 23 / 24) → [:3] *= (23 / 24, 7 / 6, 3 / 8)
drift in the bound: importance_normalizer(eps) + drift) → importance_normalizer(eps) - drift)
error of draws: (draws * count) → count
sign of the change of scale: divergence + dims * scale → divergence - dims * scale
no residual but noise: to_bits_per_dim(-logp_x0, → to_bits_per_dim(-logp_x_eps,
[likelihood.py | test_universal.py -k "truncated_normal or draws_close"]
mass of the cut normal: np.log(2 * np.pi) - log_mass → np.log(2 * np.pi) + log_mass
sum over draws: np.log(np.mean(np.exp(nats - top) → np.log(np.sum(np.exp(nats - top)

[sampling.py | test_sampling.py -k golden]
corrector's step: 2 * a**2 * (snr * norm(z) → 2 * (snr * norm(z)
[sampling.py | test_sampling.py -k "large_ancestral or chain or its_key"]
noise of the posterior: b * sde.std(step.t_next) / sde.std(step.t) * z → b * z
noise used twice: number = number + 1 → number = number
one evaluation too many: nfe = (num_steps - 1) * each → nfe = num_steps * each
keys of the first batch: start + jnp.arange(count)) → jnp.arange(count))
[sampling.py | test_sampling.py -k "solver or ode_sample"]
extrapolated twice as far: jnp.where(i == 0, 1.0, 2 * before) → jnp.where(i == 0, 1.0, before)
Heun is Euler: slope(y + dr * first, i + 1) → first

[controllable_generation.py | test_sampling.py -k "known or color or complet or mask"]
known part without α: (sde.mean_coeff(t) * images + → (images +
bottom is top: "bottom": np.s_[height // 2 :] → "bottom": np.s_[: height // 2]
one noise for all batches: COMPLETIONS), i, size) → COMPLETIONS), 0, size)
[controllable_generation.py | test_stacks.py -k padding]
padding is known: constant_values=1) → constant_values=0)

[train_step.py | test_losses.py -k "ema or optimizer or weight_decay or training_step"]
EMA a step late: ema_decay(recipe.ema_rate, state.step + 1) → ema_decay(recipe.ema_rate, state.step)
EMA the wrong way: e + (1 - decay) * (p - e) → e + decay * (p - e)
gradients of one device: loss, grads = jax.lax.pmean((loss, grads), AXIS) → pass
a NaN gradient is applied: jnp.isfinite(loss) & jnp.isfinite(grad_norm) → jnp.isfinite(loss)
micro-batches are summed: lambda x: x / num_parts, total) → lambda x: x, total)
frequencies decay: weight_decay * m * p → weight_decay * p
packed ones decay: (updates, trained=trained) → (updates, trained=trained, fixed=params.fixed)
steps over an evaluation: loop.eval_freq, *regular) → *regular)
[train_step.py | test_run_lib.py -k skipped]
streak over a good step: jnp.where(row == len(skipped), sums["streak"], 0) → sums["streak"]

[data/pixels.py | test_datasets.py -k "levels or flip or independent or ends"]
levels rounded up: jnp.floor(x * self.num_levels) → jnp.round(x * self.num_levels)
flipped upside down: image[:, ::-1], image) → image[::-1], image)
one key for flip and noise: jax.vmap(jax.random.split, out_axes=1)(keys) → keys, keys
mean of the noise forgotten: (images.astype(np.float32) + 0.5) → images.astype(np.float32)
width of a cell: else 1.0) / self.num_levels → else 1.0) / (self.num_levels - 1)
highest level not counted: levels == num_levels - 1) → levels == num_levels)
[data/batches.py | test_datasets.py -k share]
process's share: process_index * share, (process_index + 1) * share → 0, share

[models/layers.py | test_models.py -k "golden_scores or attention"]
time embedding: (half - 1) * jnp.arange(half) → half * jnp.arange(half)
attention without its scale: (scores - largest) / math.sqrt(query.shape[-1]) → scores - largest
[models/layers.py | test_models.py -k "resampling or waves or each_layer or folded"]
filter without gain: [up * tap / sum(kernel) → [tap / sum(kernel)
filter shifted: ((rest + 1) // 2 + 1, rest // 2), up=2) → (rest // 2, (rest + 1) // 2 + 1), up=2)
Fourier features: for scale in (128, 256) → for scale in (64, 128)
Fourier embedding: 2 * math.pi * x.astype → math.pi * x.astype
patches of a row: size, c).transpose(0, 1, 3, 2, 4, 5) → size, c)
all layers drop alike: zlib.crc32("/".join(self.path).encode()) → 0
[models/ncsnpp.py | test_models.py -k "first_layer"]
range of the data: x if self.centered else 2 * x - 1 → x
embedding of σ itself: project(jnp.log(time_cond)) → project(time_cond)
[models/ncsnpp.py | test_labels.py -k label_changes]
no label is label 0: jnp.full(len(temb), self.num_classes) → jnp.full(len(temb), 0)
[models/edm.py | test_edm.py -k denoises]
time of EDM: jnp.log(sigma) / 4 → jnp.log(sigma) / 2
VE's time in EDM: jnp.log(sigma / 2) → jnp.log(sigma)
scale of labels: math.sqrt(self.num_classes) * → 1.0 *
[models/ncsnv2.py | test_models.py -k "first_layer or instance"]
range of NCSNv2's data: x if self.centered else 2 * x - 1 → x
variance of means: axis=-1, keepdims=True, ddof=1) → axis=-1, keepdims=True)
[models/score.py | test_losses.py -k "golden_losses and ve_"]
VE divided twice: self.scale_by_sigma and not self._sees_sigma → self.scale_by_sigma
[models/score.py | test_labels.py -k guidance]
guidance the wrong way: (with_label - without) → (without - with_label)
[models/normalization.py | test_normalization.py -k "dropout or left_to_xla or some_gradients"]
dropout without its scale: y / (1 - options.rate) → y
groups interleaved: jnp.repeat(mean, size, axis=-1) → jnp.tile(mean, (1, size))

[metrics/distances.py | test_distances.py]
biased kernel distance: (len(x) * (len(x) - 1)) → len(x) ** 2
precision is recall: return share_within(fake, real), → return share_within(real, fake),
Gaussian of unbiased variance: fitted.cov * ((fitted.count - 1) / fitted.count) → fitted.cov
[metrics/statistics.py | test_features.py -k subset]
always the first rows: chosen[start : start + len(batch)] → chosen[: len(batch)]
[metrics/scorers.py | test_features.py -k "scored or subset"]
one subset of both sets: images.count, seed=1) → images.count, seed=0)
error of the subset: error * np.sqrt(len(fake.features) / fake.count) → error
agreement of all: == images.labels)[told] → == images.labels)
[metrics/report.py | test_evaluation.py -k "best or gain or earlier or later"]
best precision is the least: "precision, on Inception", "", -1) → "precision, on Inception", "", 1)
gain over a baseline: gain = report[f"nll_{name}"] → gain = -report[f"nll_{name}"]
scores of other weights: "step", "weights_digest") → "step")
[metrics/bits_per_dim.py | test_stacks.py -k padding]
padding not counted: value * whole → value
baseline's padding not counted: bits * (dims / math.prod(setup.shape)) → bits
[metrics/bits_per_dim.py | test_evaluation.py -k "table or row"]
error of one draw: ddof=1) / len(of_draws) ** 0.5 → ddof=1)

[readers/stl10.py | test_readers.py -k stl10]
rows are columns: transpose(0, 3, 2, 1) → transpose(0, 2, 3, 1)
[readers/tfrecords.py | test_readers.py -k tfrecord]
mirrored records: .reshape(shape).transpose(1, 2, 0) → .reshape(shape).transpose(2, 1, 0)
[readers/cifar.py | test_readers.py -k "written and 2017"]
labels from 1: labels.astype(np.int64) - first → labels.astype(np.int64)
[readers/splits.py | test_stacks.py -k labels]
labels of the first: [of[i] for i in chosen] → of[: len(chosen)]

[runtime/pictures.py | test_stacks.py -k "pictures or grid"]
grid by columns: left = gap + (i % columns) → left = gap + (i // columns)
[runtime/metrics_log.py | test_faults.py -k metrics]
last row lost: r["step"] <= first_step → r["step"] < first_step
[runtime/checkpointing.py | test_faults.py -k "checkpoint and not killed"]
the oldest is the newest: manager.all_steps(), reverse=True) → manager.all_steps())
last checkpoint left out: first <= step <= last → first <= step < last
[runtime/exported.py | test_exported.py]
memory as it lies: np.float32, order="C") → np.float32)
[runtime/workdir.py | test_exported.py -k hash]
hash without names: whole.update(jax.tree_util.keystr(path).encode()) → pass
[runtime/memory.py | test_accelerators.py -k counts_what_is_alive]
work within not counted: during = max(made, operation.within) → during = made

[official/import_checkpoint.py | test_import_checkpoint.py]
moments exchanged: moment("exp_avg"), → moment("exp_avg_sq"),
kernel transposed: value.transpose(2, 3, 1, 0) → value.transpose(3, 2, 1, 0)
[official/export_checkpoint.py | test_import_checkpoint.py -k exported]
EMA of frequencies: if one] → if one is not None]
[official/edm.py | test_edm.py -k denoises]
key and value are the query: weight[i::3, → weight[::3,
[official/edm_pickle.py | test_edm.py -k another_network]
every name is known: if (module, name) not in _NAMES: → if False:
[runtime/unpickling.py | test_pth_reader.py -k opcodes]
opcodes not counted: self.left -= 1 → pass
[data/told_labels.py | test_labels.py -k of_samples]
labels of the first batch: chosen[np.arange(start, start + count) → chosen[np.arange(count)
[models/networks.py | test_run_lib.py -k "refused or cannot_work"]
frequencies divided by 0: or embedding_dim == 2: → or False:
[configs/validate.py | test_run_lib.py -k "refused or cannot_work"]
truncation at T: if get(name) >= 1: → if get(name) > 1:
one class: if told < 0 or told == 1: → if told < 0:
odd micro-batch of pairs: (num_devices * micro * pair) → (num_devices * micro)
"""


class Mutation(NamedTuple):
    """A mistake: `old` becomes `new` in a file, and `tests` of it are run."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def mutations():
    """The mistakes of the table."""
    found, file, tests = [], "", ""
    for line in TABLE.strip().splitlines():
        if line.startswith("["):
            file, tests = line.strip("[]").split(" | ")
        elif line:
            name, change = line.split(": ", 1)
            found.append(Mutation(name, file, *change.split(" → "), tests))
    return found


def copy_of_tracked_files(folder):
    """Copy what git knows, as it lies in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0")[:-1]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def pass_in(folder, tests):
    """Whether the fast tests pass there; a mistake that makes them hang fails them."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    # Python would take a file that changed twice in a second for the one that it has compiled.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    file, *chosen = shlex.split(tests)
    command += ["-m", "not slow and not release", f"tests/{file}", *chosen]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):  # 1: a test failed
        raise SystemExit(f"pytest {tests}: {done.stdout.decode()[-2000:]}")
    return done.returncode == 0


def survives(folder, mutation):
    """Whether the tests pass with a mistake."""
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.old!r} must be once in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        return pass_in(folder, mutation.tests)
    finally:
        path.write_text(text)


def main():
    """Print whether each mistake is caught; the exit status is 1 if one is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="those whose name or file contains this")
    only = parser.parse_args().only or ""
    chosen = [m for m in mutations() if only in m.name or only in m.file]
    survived, passed = [], set()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy_of_tracked_files(folder)
        for mutation in chosen:
            if mutation.tests not in passed and not pass_in(folder, mutation.tests):
                raise SystemExit(f"tests/{mutation.tests} fail without any mistake")
            passed.add(mutation.tests)
            start = time.time()
            if survives(folder, mutation):
                survived.append(mutation.name)
            said = "SURVIVED" if mutation.name in survived[-1:] else "caught"
            seconds = time.time() - start
            print(f"{said:8} {seconds:5.0f} s  {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen)} mistakes, {len(chosen) - len(survived)} caught, {len(survived)} survived")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
