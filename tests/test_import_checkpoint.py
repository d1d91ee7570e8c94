import jax
import numpy as np
import optax
import pytest

import build
import run_lib
from configs import fields
from configs.errors import UserError
from configs.shapes import image_shape
from models import utils as mutils
from modes import transfer
from official import export_checkpoint, import_checkpoint
from official.pth_reader import read_pth
from official.pth_writer import write_pth
from tests.helpers import GOLDEN, golden_config, param_shapes, tiny_config

PTH = GOLDEN / "vp_ddpmpp.pth"


def test_a_config_of_another_network_is_refused_by_the_tensor():
    config = golden_config("vp_ddpmpp")
    config.model.nf = 16
    with pytest.raises(UserError, match=r"AttnBlock_0.*Dense_0.*\(16,\) there and \(32,\)"):
        import_checkpoint.load(PTH, config)


def load_state(path, config):
    return import_checkpoint.load_state(path, param_shapes(config), build.get_optimizer(config))


def official_names(config):
    """The tensors that the release's `ddpm` has for a config, in its order: (key, shape)."""
    nf, (first, second) = config.model.nf, config.model.ch_mult
    dims, keys, index = 4 * nf, [], 0

    def module(**tensors):
        nonlocal index
        keys.extend((f"module.all_modules.{index}.{k}", v) for k, v in tensors.items())
        index += 1

    def layer(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def block(before, after):
        module(
            **layer("GroupNorm_0", before),
            **layer("Conv_0", after, before, 3, 3),
            **layer("Dense_0", after, dims),
            **layer("GroupNorm_1", after),
            **layer("Conv_1", after, after, 3, 3),
            **({"NIN_0.W": (before, after), "NIN_0.b": (after,)} if before != after else {}),
        )

    def attention(width):
        nins = {f"NIN_{i}.{k}": (width,) * n for i in range(4) for k, n in (("W", 2), ("b", 1))}
        module(**layer("GroupNorm_0", width), **nins)

    a, b = nf * first, nf * second
    module(weight=(dims, nf), bias=(dims,))
    module(weight=(dims, dims), bias=(dims,))
    module(weight=(nf, 1, 3, 3), bias=(nf,))
    block(nf, a)
    module(**layer("Conv_0", a, a, 3, 3))  # down
    block(a, b)
    attention(b)
    block(b, b)
    attention(b)
    block(b, b)
    block(2 * b, b)
    block(b + a, b)
    attention(b)
    module(**layer("Conv_0", b, b, 3, 3))  # up
    block(b + a, a)
    block(a + nf, a)
    module(weight=(a,), bias=(a,))
    module(weight=(1, a, 3, 3), bias=(1,))
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
def test_a_ddpm_comes_with_the_moments_of_adam_and_trains_on(tmp_path, trained):
    config = tiny_config()
    config.model.update(
        name="ddpm", parametrization="noise", nf=8, ch_mult=(1, 2), attn_resolutions=(4,)
    )
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.standard_normal(shape).astype(np.float32)

    names = official_names(config)
    model = {k: 0.1 * draw(shape) for k, shape in names}
    moments = {
        i: {"step": 7, "exp_avg": draw(shape), "exp_avg_sq": draw(shape) ** 2}
        for i, (_, shape) in enumerate(names)
    }
    checkpoint = {
        "optimizer": {"state": moments if trained else {}, "param_groups": []},
        "model": model,
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": [v + 1 for v in model.values()]},
        "step": 7,
    }
    write_pth(tmp_path / "ddpm.pth", checkpoint)
    state = load_state(tmp_path / "ddpm.pth", config)
    shapes = jax.tree.map(lambda x: x.shape, param_shapes(config))
    for tree in (state.params, state.ema_params):
        assert jax.tree.map(lambda x: x.shape, tree) == shapes
    adam = state.opt_state[2]
    last = max(i for i, (k, _) in enumerate(names) if k.endswith("weight"))

    def kernel(tree):
        return tree[max(tree, key=lambda k: (k[:5] == "Conv_", k))]["kernel"]

    np.testing.assert_array_equal(kernel(state.params), model[names[last][0]].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(kernel(state.ema_params), kernel(state.params) + 1)
    if trained:
        expected = moments[last]["exp_avg"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel(adam.mu), expected)
        np.testing.assert_array_equal(
            kernel(adam.nu), moments[last]["exp_avg_sq"].transpose(2, 3, 1, 0)
        )
    assert int(adam.count) == (7 if trained else 0)
    assert int(state.opt_state[3].count) == 7  # the warm-up goes on

    # What an import that was killed has left is not in the way.
    (tmp_path / "run" / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    imported = transfer.import_official(
        build.open_run(config, tmp_path / "run"), tmp_path / "run", tmp_path / "ddpm.pth"
    )
    assert int(imported.step) == 7
    transfer.export_official(
        build.open_run(config, tmp_path / "run"), tmp_path / "run", tmp_path / "again.pth"
    )
    again = read_pth(tmp_path / "again.pth")
    assert list(again["model"]) == ["module.sigmas", *model]
    assert_equal({k: again["model"][k] for k in model}, model)
    assert_equal(again["optimizer"]["state"], checkpoint["optimizer"]["state"])
    assert_equal(again["ema"], checkpoint["ema"])
    assert again["step"] == 7
    with pytest.raises(UserError, match="has checkpoints already"):
        transfer.import_official(
            build.open_run(config, tmp_path / "run"), tmp_path / "run", tmp_path / "ddpm.pth"
        )
    config.training.n_iters = 9
    assert int(run_lib.train(config, tmp_path / "run").step) == 9


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        if path.stem in ("vp_ddpmpp", "ve_ncsnpp_skip")
        else pytest.param(path.stem, marks=pytest.mark.slow)
        for path in sorted(GOLDEN.glob("*.pth"))
    ],
)
def test_an_official_checkpoint_is_exported_as_it_was(tmp_path, name):
    config = golden_config(name)
    state = load_state(GOLDEN / f"{name}.pth", config)
    given = {"model": mutils.create_model(config), "shape": image_shape(config)}
    given |= {"path": tmp_path / "again.pth", "state": state}
    fields.call(export_checkpoint.write, config, "optim", "model", **given)
    ours, theirs = (
        read_pth(folder / f) for folder, f in ((tmp_path, "again.pth"), (GOLDEN, f"{name}.pth"))
    )
    assert list(ours["model"]) == list(theirs["model"])
    sigmas = [tree["model"].pop("module.sigmas") for tree in (ours, theirs)]
    np.testing.assert_allclose(*sigmas, rtol=1e-12)
    assert sigmas[0].dtype == sigmas[1].dtype
    for part in ("model", "ema", "step"):
        assert_equal(ours[part], theirs[part])
    assert ours["optimizer"]["state"] == theirs["optimizer"]["state"] == {}
    (group,), (expected,) = (tree["optimizer"]["param_groups"] for tree in (ours, theirs))
    assert group == {key: expected[key] for key in group}
    again = load_state(tmp_path / "again.pth", config)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_what_the_release_does_not_have_is_not_exported():
    config = tiny_config()
    with pytest.raises(UserError, match=r"predict the noise: model\.parametrization must be noise"):
        fields.call(import_checkpoint.check_network, config, "model")
    config.model.update(parametrization="noise", num_classes=10)
    with pytest.raises(UserError, match=r"not told labels"):
        fields.call(import_checkpoint.check_network, config, "model")
    config.model.update(num_classes=0, patch_size=2)
    with pytest.raises(UserError, match=r"do not fold pixels"):
        fields.call(import_checkpoint.check_network, config, "model")
    config.model.patch_size, config.optim.optimizer = 1, "AdamW"
    with pytest.raises(UserError, match=r"checkpoints are of Adam"):
        fields.call(import_checkpoint.check_network, config, "model", "optim")


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    write_pth(tmp_path / "other.pth", {"model": {"weight": np.ones((2, 2))}, "step": 3})
    with pytest.raises(UserError, match="not laid out as an official checkpoint"):
        import_checkpoint.load(tmp_path / "other.pth", golden_config("vp_ddpmpp"))
    config = golden_config("ve_ncsnpp")
    config.model.name = "ncsnv2_64"
    with pytest.raises(UserError, match="official checkpoints are of ncsnpp and ddpm"):
        import_checkpoint.load(GOLDEN / "ve_ncsnpp.pth", config)


def test_the_moments_of_adam_are_told_apart(tmp_path):
    checkpoint = read_pth(GOLDEN / "vp_ddpmpp.pth")
    model = [v for k, v in checkpoint["model"].items() if ".all_modules." in k]
    checkpoint["optimizer"]["state"] = {
        i: {"step": 7, "exp_avg": -v, "exp_avg_sq": v**2} for i, v in enumerate(model)
    }
    write_pth(tmp_path / "trained.pth", checkpoint)
    state = load_state(tmp_path / "trained.pth", golden_config("vp_ddpmpp"))
    mean, variance = (optax.tree_utils.tree_get(state.opt_state, n) for n in ("mu", "nu"))
    assert_equal(mean, jax.tree.map(lambda p: -p, state.params))
    assert_equal(variance, jax.tree.map(lambda p: p**2, state.params))
