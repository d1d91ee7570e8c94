"""Models on the Hugging Face hub, with the real client and a server that speaks the hub's API.

They need the package huggingface_hub (`make hub`), and are skipped without it.
"""

import base64
import hashlib
import http.server
import json
import re
import sys
import threading

import numpy as np
import pytest
import yaml

import build
import run_lib
import soft_truncation as st
from configs.errors import UserError
from modes import transfer
from runtime.pictures import save_grid
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("small_network")
TOKEN, COMMIT = "hf_of_the_tests", "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
    """The hub's API, as far as the client uses it for models. Large files are sent as LFS's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        repos = self.server.repos
        found = re.fullmatch("/(?:api/models/)?(.+?/.+?)(?:/resolve/(.+?)/(.+))?", self.path)
        name, revision, path = found.groups()
        if name not in repos:
            self._answer(b"", 401, X_Error_Code="RepoNotFound", X_Error_Message="Not Found")
        elif revision not in ("main", COMMIT):
            self._answer(b"", 404, X_Error_Code="RevisionNotFound", X_Error_Message="Not Found")
        elif path not in repos[name]:
            self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message="Not Found")
        else:
            content = repos[name][path]
            digest = hashlib.sha256(content).hexdigest()
            self._answer(content, X_Repo_Commit=COMMIT, ETag=f'"{digest}"')

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(b"")

    def do_POST(self):
        path, body, repos = self.path.partition("?")[0], self._body(), self.server.repos
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in repos
            repos.setdefault(name, {})
            self._answer({"url": f"{self.server.address}/{name}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._answer({"warnings": [], "errors": []})
        elif "/preupload/" in path:
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": (p := file["path"]), "uploadMode": kinds[p.endswith("tensors")]}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif path.endswith("/objects/batch"):
            objects = [
                x | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = re.fullmatch("/api/models/(.+)/commit/main", path)[1]
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    repos[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repos[name][value["path"]] = self.server.large[value["oid"]]
            self._answer({"commitUrl": f"{self.server.address}/{name}", "commitOid": COMMIT})
        else:
            self._answer({"error": path}, 404)

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = iter(lambda: int(self.rfile.readline(), 16), 0)
        body = b"".join(self.rfile.read(size + 2)[:size] for size in parts)
        self.rfile.readline()
        return body


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """{user/name: {file: content}} of the hub that HF_ENDPOINT names."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.repos, server.large = {}, {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
        given |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            pytest.importorskip("huggingface_hub")  # it reads the environment now
            yield server.repos
        server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_network):
    """(parts, folder) of a run."""
    folder, config = tmp_path_factory.mktemp("hub") / "run", tiny_config(n_iters=3, snapshot_freq=3)
    config.sampling.update(method="dpm_solver", num_steps=2, n_images=4)
    config.model.license = "cc-by-4.0"
    run_lib.train(config, folder)
    save_grid(np.zeros((4, 8, 8, 1), np.uint8), folder / "samples" / "step_00000003.png")
    return build.open_run(config, folder), folder


def test_a_run_is_pushed_and_loaded_elsewhere(repos, run, monkeypatch):
    transfer.push(*run, "hf://me/of-a-run")
    files = repos["me/of-a-run"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "samples.png"}
    _, front, card = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0",
        "library_name": "soft-truncation",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["score-based-diffusion", "soft-truncation", "jax"],
    }
    assert card.startswith("\n# of-a-run\n") and "![Samples](samples.png)" in card
    model = st.load("hf://me/of-a-run")
    np.testing.assert_array_equal(model.sample(2), st.load(run[1]).sample(2))
    assert st.load(f"hf://me/of-a-run@{COMMIT}").step == model.step == 3
    monkeypatch.setitem(repos, "me/of-a-run", {})  # as for a model that is in the cache
    assert st.load(f"hf://me/of-a-run@{COMMIT}").step == 3


def test_an_exported_model_is_pushed_as_it_is(repos, run, tmp_path):
    setup, folder = run
    model = transfer.export(setup, folder, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    for extra in ("samples/samples.npz", ".git/config", "eval/report.json"):
        (model / extra).parent.mkdir()
        (model / extra).write_text("not to be published")
    transfer.push(setup, model, "hf://me/exported")
    names = {path.name for path in model.iterdir() if path.is_file()}
    assert repos["me/exported"] == {name: (model / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("hf://me/typo", "there is no such model, or it is not yours to see"),
        ("hf://me/of-others", "it is no model of this project, which has config.json and model"),
        ("hf://me/typo/config.json", "is no address of the hub; they are hf://user/name"),
        ("hf://../secrets", "can't|Repo id"),
        ("hf://me/of-others@v2", "Revision Not Found|v2"),
    ],
)
def test_what_can_not_be_fetched_is_told_in_a_line(repos, address, reason):
    repos["me/of-others"] = {"pytorch_model.bin": b"of another project"}
    with pytest.raises(UserError, match=reason) as told:
        st.load(address)
    assert "\n" not in str(told.value) and address in str(told.value)


def test_a_token_that_may_not_write_is_told_in_a_line(repos, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="me/mine: the hub does not let you; hf auth login") as told:
        transfer.push(*run, "hf://me/mine")
    assert "\n" not in str(told.value) and "me/mine" not in repos


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", lambda text: b"[" * 9_999_999, "is damaged"),
        ("config.json", lambda text: text.replace(b'"ncsnpp"', b'"os.system"'), "model.name"),
        ("model.safetensors", lambda text: text[:-4], "can't be read"),
        ("model.safetensors", lambda text: text[:-4] + b"\0\0\x80\x7f", "its checksum is another"),
        ("model.safetensors", lambda text: b"\x80\x04cos\nsystem\n(S'id'\ntR.", "can't be read"),
    ],
)
def test_files_of_the_hub_are_refused_as_those_of_any_stranger(
    repos, run, tmp_path, file, change, reason
):
    model = transfer.export(*run, tmp_path / "model")
    name = f"evil/{hashlib.sha256(repr((file, reason)).encode()).hexdigest()[:8]}"
    repos[name] = {path.name: path.read_bytes() for path in model.iterdir()}
    repos[name][file] = change(repos[name][file])
    with pytest.raises(UserError, match=reason):
        st.load(f"hf://{name}")


def test_without_the_package_a_line_names_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: st.load("hf://me/model"), lambda: transfer.push(*run, "hf://me/model")):
        with pytest.raises(UserError, match="needs another package: pip install huggingface_hub"):
            use()
