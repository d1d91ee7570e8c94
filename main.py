"""Train, evaluate, sample, …: python main.py --config configs/vp/digits_st.py --mode train."""

import importlib.metadata
import logging
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # On a CPU, these versions' new convolutions are up to twice as slow as the old ones. The flag
    # must be set before JAX starts, and another version that does not know it would stop.
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_experimental_ynn_fusion_type="]
    )

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from configs.default import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe; --config.section.field=value overrides a field.", lock_config=True
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "sample", "stats", "import"], "What to do."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "--mode import: an official .pth file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Default: runs/<config's folder>/<its name>.")


def _parse(argv: list[str]) -> list[str]:
    """Flags, with every mistake as one line."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise UserError("--config is missing; for example --config configs/vp/digits_st.py")
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(path).is_file():
            raise UserError(f"--config: there is no file {path}")
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; overrides look like --config.seed=1")
    except (UserError, flags.Error) as error:
        _fail(error)
    except Exception as error:  # a recipe is Python: it can raise anything at all
        field = str(error.args[0]).split()[-1].strip("'\"") if error.args else ""
        given = [arg for arg in argv if arg.startswith("--config.") and field and field in arg]
        if given and isinstance(error, (AttributeError, KeyError)):
            _fail(UserError(f"the config has no such field: {' '.join(given)}"))
        _fail(UserError(f"--config can't be loaded: {type(error).__name__}: {error}"))
    return rest


def _fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _default_workdir() -> str:
    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    return str(pathlib.Path("runs") / path.parent.name / path.stem)


def main(argv: list[str]) -> None:
    """Do what the flags say."""
    del argv
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("soft_truncation").setLevel(logging.INFO)
    import run_lib

    run = {
        "train": run_lib.train,
        "eval": run_lib.evaluate,
        "sample": run_lib.sample,
        "stats": run_lib.make_statistics,
    }
    workdir = _WORKDIR.value or _default_workdir()
    try:
        if _MODE.value == "import":
            if not _CHECKPOINT.value:
                raise UserError("--mode import needs --checkpoint, an official .pth file")
            run_lib.import_official(_CONFIG.value, workdir, _CHECKPOINT.value)
        elif _CHECKPOINT.value:
            raise UserError("--checkpoint is for --mode import")
        else:
            run[_MODE.value](_CONFIG.value, workdir)
    except UserError as error:
        _fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
