import io
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest

from configs.errors import UserError
from official.pth_reader import read_pth
from official.pth_writer import write_pth
from tests import torch_file
from tests.helpers import GOLDEN

PTH = GOLDEN / "vp_ddpmpp.pth"
HEAD = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


def write(layout, path, payload, storage=bytes(16)):
    """A file of either layout, with one storage of four floats."""
    if layout == "row":
        # Its references to storages have a sixth member, None.
        payload = payload.replace(b"K\x04tQ", b"K\x04NtQ")
        keys = pickle.dumps(["0"], 2)
        path.write_bytes(HEAD + payload + keys + (4).to_bytes(8, "little") + storage)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", storage)


both_layouts = pytest.mark.parametrize("layout", ["archive", "row"])


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@both_layouts
def test_a_pickle_that_would_run_a_command_is_refused(layout, tmp_path):
    payload = io.BytesIO()
    pickle.dump({"model": Command(tmp_path / "ran")}, payload, protocol=2)
    write(layout, tmp_path / "evil.pth", payload.getvalue())
    with pytest.raises(UserError, match="system, which no checkpoint needs"):
        read_pth(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@both_layouts
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(layout, tmp_path, share):
    raw = PTH.read_bytes()
    if layout == "row":
        torch_file.save_row({"a": np.ones(500), "b": np.ones((20, 20))}, tmp_path / "whole.pth")
        raw = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        read_pth(tmp_path / "cut.pth")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_pth(tmp_path / "none.pth")


@both_layouts
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (pickle.dumps({"model": bytearray(3)}, protocol=5), "opcode BYTEARRAY8"),
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"builtins\.eval"),
        (b"\x80\x02cnumpy\nload\n.", r"numpy\.load"),
        (b"\x80\x02}", "can't be read"),
        (b"\x80\x02" + b"]" * 2**20, "more than 1,048,576 pickle opcodes"),
    ],
)
def test_other_opcodes_and_names_are_refused(layout, tmp_path, payload, reason):
    write(layout, tmp_path / "odd.pth", payload)
    with pytest.raises(UserError, match=reason):
        read_pth(tmp_path / "odd.pth")


def rebuild(size, stride, kind=b"FloatStorage", offset=b"K\x00"):
    """A pickle of one tensor with the given pickled size and stride, of storage 0."""

    def name(text):
        return b"X" + len(text).to_bytes(4, "little") + text

    kind = b"ctorch\n" + kind + b"\n"
    storage = b"(" + name(b"storage") + kind + name(b"0") + name(b"cpu") + b"K\x04tQ"
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return b"\x80\x02" + function + b"(" + storage + offset + size + stride + b"tR."


@both_layouts
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (rebuild(b"K\x05\x85", b"K\x01\x85"), "beyond its storage"),
        (rebuild(b"K\x02\x85", b"K\x01\x85", offset=b"K\x03"), "beyond its storage"),
        (rebuild(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "beyond its storage"),  # stride 0
        (rebuild(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "not a whole number"),
        (rebuild(b"ctorch\nIntStorage\n\x85", b"K\x01\x85"), "not a whole number"),
        (rebuild(b"ctorch\nIntStorage\n(K\x02tR\x85", b"K\x01\x85"), "calls what"),
        # A storage's values, exchanged for what the bounds are not checked against.
        (rebuild(b"", b"").split(b"K\x00")[0] + b"}b.", "sets attributes"),
        (b"\x80\x02})" + b"\x85" * 1000 + b"Ns.", "neither a name nor a number"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "calls what"),
        (b"\x80\x02]K\x00Ns.", "what is no dictionary"),
    ],
)
def test_tensors_can_not_reach_beyond_the_file(layout, tmp_path, payload, reason):
    write(layout, tmp_path / "odd.pth", payload)
    with pytest.raises(UserError, match=reason):
        read_pth(tmp_path / "odd.pth")
    whole = rebuild(b"K\x02K\x02\x86", b"K\x02K\x01\x86")
    write(layout, tmp_path / "good.pth", whole, np.arange(4, dtype=np.float32).tobytes())
    tensor = read_pth(tmp_path / "good.pth")
    np.testing.assert_array_equal(tensor, [[0, 1], [2, 3]])


def test_a_compressed_archive_is_refused(tmp_path):
    whole = rebuild(b"K\x02K\x02\x86", b"K\x02K\x01\x86")
    with zipfile.ZipFile(tmp_path / "odd.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", whole)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(UserError, match="it is compressed"):
        read_pth(tmp_path / "odd.pth")


def test_the_layout_before_pytorch_1_6_is_read(tmp_path):
    # Inception's published weights have it.
    rng = np.random.default_rng(0)
    tree = {f"layer{i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(12)}
    torch_file.save_row({"state": tree, "step": 7}, tmp_path / "row.pth")
    write_pth(tmp_path / "archive.pth", {"state": tree, "step": 7})
    for name in ("row", "archive"):
        loaded = read_pth(tmp_path / f"{name}.pth")
        assert loaded["step"] == 7 and list(loaded["state"]) == list(tree)
        for key, value in tree.items():
            np.testing.assert_array_equal(loaded["state"][key], value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)), "torch.save wrote"),
        (lambda raw: raw.replace(b"\x88", b"\x89", 1), "byte order"),
        # The storage says that it has 2³⁰ values, then that it is another one.
        (lambda raw: raw.replace(b"K\x04Nt", b"J\x00\x00\x00\x40Nt"), "longer than the file"),
        (lambda raw: raw.replace(pickle.dumps(["0"], 2), pickle.dumps(["1"], 2)), "not those of"),
        (lambda raw: raw.replace(pickle.dumps(["0"], 2), pickle.dumps(["0", "0"], 2)), "not those"),
        (lambda raw: raw[:-16] + bytes(8), "ends within storage 0"),
    ],
)
def test_a_damaged_row_is_refused(tmp_path, change, reason):
    path = tmp_path / "row.pth"
    write("row", path, rebuild(b"K\x02\x85", b"K\x01\x85"))
    assert read_pth(path).shape == (2,)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=reason):
        read_pth(path)


def test_entries_of_an_archive_that_overlap_are_refused(tmp_path):
    write_pth(tmp_path / "a.pth", {"a": np.ones(5011, np.float32), "b": np.ones(5000, np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pth") as whole:
        (root,) = {name.split("/")[0] for name in whole.namelist()}
        tree = whole.read(f"{root}/data.pkl")
    values = np.ones(5000, np.float32).tobytes()
    inner = zipfile.ZipInfo("archive/data/1")
    inner.CRC, inner.file_size, inner.compress_size = zlib.crc32(values), len(values), len(values)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/data/0", inner.FileHeader() + values)
        outer = archive.getinfo("archive/data/0")
        inner.header_offset = outer.header_offset + len(outer.FileHeader())
        archive.filelist.append(inner)
    with pytest.raises(UserError, match="its storages are longer than the file"):
        read_pth(tmp_path / "a.pth")
