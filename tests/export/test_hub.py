"""Uploading: only where a run says so, private unless it says otherwise, and nothing that is private in the files."""

import json

import huggingface_hub
import pytest

from tokenkit.config import UserError, build
from tokenkit.export.hub import HubConfig, push
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun


class Client:
    """Notes what it is asked to do; `private` is what the repository is."""

    calls: list = []
    private = True

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"hub://{repo_id}"

    def model_info(self, repo_id):
        return type("Info", (), {"private": self.private})()

    def create_branch(self, repo_id, **options):
        self.calls.append(("branch", repo_id, options))

    def upload_folder(self, **options):
        files = sorted(path.name for path in options["folder_path"].iterdir())
        self.calls.append(("upload", options["repo_id"], {**options, "files": files}))


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(Client, "calls", [])
    monkeypatch.setattr(Client, "private", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return Client


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "losses": {"clm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": {"steps": 1, "batch_size": 2, "mode": "embeddings"},
            "eval": {"source": {**source, "max_bytes": 200}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


def test_a_default_run_never_touches_the_hub(run, monkeypatch):
    """Not its client, nor any connection: whoever would ask gets an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    for name, value in vars(huggingface_hub.HfApi).items():
        if callable(value) and name[:1] != "_":
            monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(AssertionError, match="the hub was asked"):
        huggingface_hub.HfApi().model_info("a/b")  # the guard guards
    results = distill(run(), quiet=True)
    assert results["steps"] == 1
    assert (run().output / "model" / "README.md").is_file()


def test_a_run_that_says_so_uploads_the_model_with_its_card_privately(run, client):
    distill(run(push_to_hub=True, hub={"repo_id": "me/small"}), quiet=True)
    (made, _, options), (sent, name, upload) = client.calls
    assert (made, sent, name) == ("create", "upload", "me/small")
    assert options == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*upload["files"]}


def test_pushing_nowhere_is_refused_before_anything_is_trained(run):
    with pytest.raises(UserError, match=r"write hub\.repo_id=OWNER/NAME"):
        run(push_to_hub=True)


def test_a_public_repository_is_not_taken_for_a_private_one(tmp_path, client):
    client.private = False
    (tmp_path / "README.md").write_text("plain", "utf-8")
    with pytest.raises(UserError, match=r"is public; write hub\.private=false"):
        push(tmp_path, HubConfig(repo_id="me/x"))
    assert [call[0] for call in client.calls] == ["create"]
    assert push(tmp_path, HubConfig(repo_id="me/x", private=False, revision="dev")) == "hub://me/x"
    assert [call[0] for call in client.calls] == ["create", "create", "branch", "upload"]


@pytest.mark.parametrize("file", ["README.md", "config.json"])
@pytest.mark.parametrize("text", ["at /home/ann/run", "hf_abcdefghijklmnopqrst"])
def test_private_things_in_a_folder_are_not_uploaded(tmp_path, client, file, text):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / file).write_text(json.dumps({"note": text}), "utf-8")
    with pytest.raises(UserError, match="nothing was uploaded") as told:
        push(tmp_path / "model", HubConfig(repo_id="me/x"))
    assert text.split()[-1] not in str(told.value)  # the message does not repeat it
    assert client.calls == []
