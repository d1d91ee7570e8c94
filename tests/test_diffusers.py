"""Networks of diffusers against its own outputs, and the way there and back.

The golden outputs are those of UNet2DModel (diffusers 0.42.1, PyTorch 2.14.1), with weights by
`weights` below for each name in its state_dict.
"""

import itertools
import json
import math
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import build
import sampling
import soft_truncation as st
from configs.errors import UserError
from configs.saved import as_recorded
from official import diffusers
from tests import jobs, torch_file
from tests.helpers import GOLDEN, environment_of, nhwc

NAMES = ["ncsnpp", "ncsnpp_attention", "ddpm"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(name, shape):
    a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return base + 0.1 * a if name != "time_proj.weight" else a
    return a / np.float32(math.sqrt(np.prod(shape[1:])))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """The folders of the golden networks, by their names."""
    folders = {}
    for name in NAMES:
        about = json.loads((GOLDEN / "diffusers" / f"{name}.json").read_text())
        unet = tmp_path_factory.mktemp(name) / "unet"
        unet.mkdir()
        (unet / "config.json").write_text(json.dumps(about["config"]))
        arrays = {key: weights(key, tuple(shape)) for key, shape in about["shapes"].items()}
        if name == "ddpm":  # without attention that ours do not have
            for kind in ("weight", "bias"):
                arrays[f"up_blocks.0.attentions.0.to_out.0.{kind}"] *= 0
        save_file(arrays, unet / WEIGHTS)
        folders[name] = unet.parent
    return folders


def imported(folder):
    """(the parts of the network's config, its weights)."""
    setup = build.set_up(diffusers.get_config(str(folder)))
    return setup, diffusers.load_params(folder, setup.fields, setup.state_shape.params)


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_network_gives_the_outputs_of_diffusers(pipelines, name):
    setup, params = imported(pipelines[name])
    given = np.load(GOLDEN / "diffusers" / f"{name}.npz")
    ours = jax.jit(setup.model.apply)({"params": params}, nhwc(given["x"]), given["t"])
    theirs = nhwc(given["y"])
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_bit_for_bit(pipelines, name, tmp_path, caplog):
    setup, params = imported(pipelines[name])
    diffusers.write(tmp_path / "back", setup.fields, params)
    again, same = imported(tmp_path / "back")
    assert again.fields["model"] == setup.fields["model"] and again.shape == setup.shape
    # Its pipelines are for images in [0, 1] of ncsnpp, and in [-1, 1] of ddpm.
    assert ("use its unet" in caplog.text) == (name == "ncsnpp")
    jax.tree.map(np.testing.assert_array_equal, params, same)
    ours, theirs = (load_file(f / "unet" / WEIGHTS) for f in (tmp_path / "back", pipelines[name]))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if name != "ddpm" or not key.startswith("up_blocks.0.attentions.0."):
            np.testing.assert_array_equal(ours[key], value)


def changed(pipelines, tmp_path, name="ncsnpp", arrays=None, **fields):
    """The folder of a network with other fields or tensors."""
    folder, source = tmp_path / "changed", pipelines[name] / "unet"
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / WEIGHTS) | (arrays or {}), folder / WEIGHTS)
    return folder


WRONG = (
    ({"os.system": "ls"}, "'os.system' is no field of UNet2DModel"),
    ({"attention_head_dim": 8}, "attention_head_dim is 8"),
    ({"norm_eps": 1e-5}, "norm_eps is 1e-05"),
    ({"act_fn": "relu"}, "act_fn is 'relu'"),
    ({"norm_num_groups": 32}, "norm_num_groups is 32"),
    ({"num_class_embeds": 10}, "num_class_embeds is 10"),
    ({"mid_block_scale_factor": 1.0}, "mid_block_scale_factor is 1.0"),
    ({"block_out_channels": [8, 12, 16]}, "not multiples of the first"),
    ({"block_out_channels": [8, 16, 10**12]}, "a size is 1000000000000"),
    ({"block_out_channels": "many"}, "block_out_channels is 'many'"),
    ({"layers_per_block": True}, "a size is True"),
    ({"layers_per_block": 1000}, "a size is 1000; it must be a whole number from 1 to 64"),
    ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D", "X"]}, "down_block_types is"),
    ({"up_block_types": {}}, "up_block_types is {}"),
    ({"sample_size": [16, 16]}, r"a size is \[16, 16\]"),
    ({"in_channels": 1, "out_channels": 1}, "images of 3 channels"),
    ({"out_channels": 6}, "out_channels is not in_channels"),
    ({"center_input_sample": "no"}, "center_input_sample is neither"),
    ({"dropout": -1}, "dropout is -1"),
    (
        {
            "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"],
            "up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
        },
        "attention of less than 128 channels",
    ),
    ({"up_block_types": ["SkipUpBlock2D"] * 2 + ["AttnSkipUpBlock2D"]}, "at other levels"),
)


@pytest.mark.parametrize(("fields", "told"), WRONG, ids=lambda x: str(x)[:40])
def test_a_config_that_no_network_here_can_have_is_refused(pipelines, tmp_path, fields, told):
    folder = changed(pipelines, tmp_path, **fields)
    with pytest.raises(UserError, match=told) as caught:
        diffusers.get_config(str(folder))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(pipelines, tmp_path):
    extra = changed(pipelines, tmp_path, arrays={"more": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="no network here has 'more'"):
        imported(extra)
    wide = {"conv_in.weight": np.zeros((9, 3, 3, 3), np.float32)}
    with pytest.raises(UserError, match=r"Conv_0.*kernel.*is \(3, 3, 3, 9\) there"):
        imported(changed(pipelines, tmp_path, arrays=wide))
    flat = {"conv_in.weight": np.zeros(9, np.float32)}
    with pytest.raises(UserError, match=r"conv_in\.weight has the shape \(9,\)"):
        imported(changed(pipelines, tmp_path, arrays=flat))
    ddpm = changed(pipelines, tmp_path, "ddpm")
    arrays = load_file(ddpm / WEIGHTS)
    del arrays["up_blocks.0.attentions.0.to_q.bias"]
    save_file(arrays, ddpm / WEIGHTS)
    with pytest.raises(UserError, match=r"it has no up_blocks\.0\.attentions\.0\.to_q\.bias"):
        imported(ddpm)
    used = {"up_blocks.0.attentions.0.to_out.0.bias": np.ones(256, np.float32)}
    with pytest.raises(UserError, match="attention that no network here has"):
        imported(changed(pipelines, tmp_path, "ddpm", used))
    folder = changed(pipelines, tmp_path)
    arrays = load_file(folder / WEIGHTS)
    del arrays["conv_out.bias"]
    save_file(arrays, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"it has no conv_out\.bias"):
        imported(folder)
    raw = (folder / WEIGHTS).read_bytes()
    for damaged in (b"", raw[:100], raw[:-4], b"\xff" * 8 + raw[8:]):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(UserError, match="can't be read"):
            imported(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"\.bin can't be read"):
        imported(folder)
    (folder / "config.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"config\.json can't be read"):
        diffusers.get_config(str(folder))


def test_old_names_and_files_of_torch_are_read(pipelines, tmp_path):
    _, params = imported(pipelines["ncsnpp"])
    folder = changed(pipelines, tmp_path)
    arrays = load_file(folder / WEIGHTS)
    for old, new in diffusers._OLD_NAMES.items():
        arrays = {name.replace(new, old): value for name, value in arrays.items()}
    assert any("proj_attn" in name for name in arrays)
    arrays["time_proj.W"] = arrays.pop("time_proj.weight")
    (folder / WEIGHTS).unlink()
    torch_file.save_row(arrays, (folder / WEIGHTS).with_suffix(".bin"))
    jax.tree.map(np.testing.assert_array_equal, params, imported(folder)[1])


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("model", "name", "ncsnv2_64", "model.name is ncsnv2_64"),
        ("model", "fir", False, "model.fir is False"),
        ("model", "parametrization", "velocity", "model.parametrization is 'velocity'"),
        ("model", "num_classes", 10, "model.num_classes is 10"),
        ("training", "sde", "rvesde", "its pipeline is for vesde"),
        ("data", "num_channels", 1, "images of 3 channels"),
        ("model", "attn_resolutions", [8], "less than 128 channels"),
    ],
)
def test_a_network_that_diffusers_has_no_blocks_for_is_refused(
    pipelines, tmp_path, section, field, value, told
):
    fields = as_recorded(diffusers.get_config(str(pipelines["ncsnpp"])))
    fields[section][field] = value
    with pytest.raises(UserError, match=told):
        diffusers.write(tmp_path, fields, {})


def test_a_network_samples_as_the_pipeline_of_diffusers(pipelines):
    # The golden samples are those of ScoreSdeVePipeline with 5 steps, σ from 0.02 to 50, snr 0.15
    # and the noise below in place of its own. Unlike ours, it corrects once more at the end.
    config = diffusers.get_config(str(pipelines["ncsnpp"]))
    config.model.update(sigma_min=0.02, sigma_max=50.0)
    setup = build.set_up(config)
    params = diffusers.load_params(pipelines["ncsnpp"], setup.fields, setup.state_shape.params)
    sde, score_fn = setup.sde, jax.jit(setup.make_score_fn(params))
    noise = (sampling.normal(jax.random.key(0), (4, 16, 16, 3), i) for i in itertools.count())
    times, x = sde.time_grid(1e-5, 5), sde.prior_std() * next(noise)
    for i in range(5):
        step = sampling.Step(sde, score_fn, times[i], times[min(i + 1, 4)])
        x, _ = sampling.langevin(0.15)(step, x, next(noise))
        if i < 4:
            x, _ = sampling.reverse_diffusion()(step, x, next(noise))
    x = sampling.denoise(sde, score_fn, x, 1e-5)
    theirs = np.load(GOLDEN / "diffusers" / "ncsnpp_samples.npy")
    assert np.abs(x - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
def test_a_pipeline_becomes_a_run_and_again_a_pipeline_by_commands(pipelines, tmp_path):
    run, to = tmp_path / "run", tmp_path / "exported"
    pipeline = pipelines["ncsnpp"]
    (pipeline / "scheduler").mkdir()
    scheduler = {"sigma_min": 0.02, "sigma_max": 50}
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    steps = ["--config.sampling.method=heun", "--config.sampling.num_steps=3"]
    begun = ["--mode=import", f"--checkpoint={pipeline}", f"--workdir={run}"]
    for args in (
        begun,
        [f"--workdir={run}", "--mode=export", "--format=diffusers", f"--to={to}"],
        [f"--workdir={run}", "--mode=sample", "--config.sampling.n_images=2", *steps],
    ):
        command = [sys.executable, *jobs.MAIN, *args]
        subprocess.run(command, cwd=jobs.ROOT, env=environment_of(1), check=True)
    ours, theirs = (load_file(f / "unet" / WEIGHTS) for f in (to, pipeline))
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    kept = json.loads((to / "scheduler" / "scheduler_config.json").read_text())
    assert (kept["sigma_min"], kept["sigma_max"]) == (0.02, 50)
    model = st.load(run)
    assert model.sigma_range == pytest.approx((0.02, 50), rel=1e-3)
    x = jnp.ones((1, 16, 16, 3))
    assert np.isfinite(np.asarray(model.denoise(x, sigma=1.0))).all()
