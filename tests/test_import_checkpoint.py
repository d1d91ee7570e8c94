import io
import os
import pickle
import zipfile

import pytest

import import_checkpoint
from configs.default import UserError
from tests.helpers import GOLDEN, golden_config

PTH = GOLDEN / "vp_ddpmpp.pth"


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path):
    payload = io.BytesIO()
    pickle.dump({"model": Command(tmp_path / "ran")}, payload)
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", payload.getvalue())
    with pytest.raises(UserError, match="system, which no checkpoint needs"):
        import_checkpoint.read_pth(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    raw = PTH.read_bytes()
    (tmp_path / "cut.pth").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        import_checkpoint.load(tmp_path / "cut.pth", golden_config("vp_ddpmpp"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        import_checkpoint.read_pth(tmp_path / "none.pth")


def test_a_config_of_another_network_is_refused_by_the_tensor():
    config = golden_config("vp_ddpmpp")
    config.model.nf = 16
    with pytest.raises(UserError, match=r"AttnBlock_0.*Dense_0.*\(16,\) there and \(32,\)"):
        import_checkpoint.load(PTH, config)
