import hashlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_adapt.checkpoint.card import OPEN
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFWriter
from megatron_adapt.checkpoint.release import release_model
from megatron_adapt.config import ConvertCheckpoint, ReleaseModel
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.tiny import write_byte_tokenizer, write_llama
from tests.test_tools import assert_refused, call


def export(folder):
    """Return a folder that a conversion back to Hugging Face wrote."""
    write_llama(folder / "hf", max_shard_size="30KB")
    convert_checkpoint(ConvertCheckpoint(source=folder / "hf", to="megatron", output=folder / "megatron"))
    convert_checkpoint(ConvertCheckpoint(source=folder / "megatron", to="hf", output=folder / "export"))
    return folder / "export"


def read_sums(folder):
    return dict(reversed(line.split("  ", 1)) for line in (folder / "SHA256SUMS").read_text().splitlines())


class FakeApi:
    """Takes what would go to the Hub."""

    def __init__(self):
        self.calls = []
        self.private = True

    def create_repo(self, repository, **settings):
        self.calls.append((repository, settings))
        self.private &= settings["private"]

    def repo_info(self, repository):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings):
        self.calls.append(settings)


@pytest.fixture
def hub(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return api


def test_an_export_is_ready_for_release(tmp_path, monkeypatch):
    monkeypatch.setitem(HFWriter.__init__.__kwdefaults__, "max_shard_bytes", 40_000)
    folder = export(tmp_path)
    names = {file.name for file in folder.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert names - shards == {
        "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors.index.json",
        "stage.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    sums = read_sums(folder)
    assert set(sums) == names - {"README.md", "SHA256SUMS", "stage.json"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert OPEN in (folder / "README.md").read_text()
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    release_model(ReleaseModel(model=folder))
    assert read_sums(folder) == sums


def test_a_card_may_be_edited_and_a_file_added_but_none_changed_or_lost(tmp_path):
    folder = export(tmp_path)
    (folder / "README.md").write_text("mine")
    (folder / "LICENSE").write_text("free")
    release_model(ReleaseModel(model=folder))
    assert read_sums(folder)["LICENSE"] == hashlib.sha256(b"free").hexdigest()
    config = folder / "generation_config.json"
    raw = config.read_bytes()
    config.write_bytes(raw.replace(b"{", b"{ ", 1))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: is not the file that SHA256SUMS names; rest"):
        release_model(ReleaseModel(model=folder))
    config.unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: is gone that SHA256SUMS names; restore it"):
        release_model(ReleaseModel(model=folder))


def test_a_folder_of_any_origin_gets_its_checksums(tmp_path):
    folder = write_llama(tmp_path / "model")
    release_model(ReleaseModel(model=folder))
    assert "model.safetensors" in read_sums(folder)
    (folder / "SHA256SUMS").write_text("abc\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: a line is no checksum and name; remove the file"):
        release_model(ReleaseModel(model=folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "deeper/training_args.pkl", "__0_0.distcp"])
def test_a_pickle_never_leaves(tmp_path, hub, name):
    folder = write_llama(tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"{name}: is read by unpickling, .*; remove it"):
        release_model(ReleaseModel(model=folder, push_to_hub="me/mine"))
    assert not hub.calls
    assert not (folder / "SHA256SUMS").exists()


def test_a_model_without_rows_for_its_tokens_never_leaves(tmp_path, hub):
    folder = write_llama(tmp_path / "model")
    write_byte_tokenizer(folder, 310)
    with pytest.raises(CheckpointError, match="has 310 tokens, the model only 300 rows"):
        release_model(ReleaseModel(model=folder, push_to_hub="me/mine"))
    assert not hub.calls


def test_a_push_sends_the_files_with_checksums_and_the_card_to_a_private_repository(tmp_path, hub):
    folder = export(tmp_path)
    release_model(ReleaseModel(model=folder, push_to_hub="me/mine"))
    (repository, made), sent = hub.calls
    assert (repository, made) == ("me/mine", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", str(folder))
    assert set(sent["allow_patterns"]) == {*read_sums(folder), "README.md", "SHA256SUMS"}
    assert "stage.json" not in sent["allow_patterns"], "holds paths of this machine"


def test_a_public_push_waits_for_the_open_fields(tmp_path, hub):
    folder = export(tmp_path)
    config = ReleaseModel(model=folder, push_to_hub="me/mine", public=True)
    with pytest.raises(ConfigError, match=r"README\.md: missing, or its fields are still open, .*; fill"):
        release_model(config)
    assert not hub.calls
    card = folder / "README.md"
    card.write_text(card.read_text().replace(OPEN, "said"))
    release_model(config)
    assert hub.calls[0][1]["private"] is False
    assert len(hub.calls) == 2


def test_a_repository_that_is_public_already_waits_for_them_too(tmp_path, hub):
    folder = export(tmp_path)
    hub.private = False
    with pytest.raises(ConfigError, match=r"its fields are still open, such as the licence; .* a private repository"):
        release_model(ReleaseModel(model=folder, push_to_hub="me/mine"))
    assert len(hub.calls) == 1, "made or found, and nothing sent"


def test_without_a_token_nothing_is_sent(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"--push-to-hub: no token of the Hub; run `hf auth login`, or set HF_TOKEN"):
        release_model(ReleaseModel(model=write_llama(tmp_path / "model"), push_to_hub="me/mine"))
    assert not hub.calls


def test_without_the_library_the_way_out_is_named(tmp_path, monkeypatch):
    folder = write_llama(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="--push-to-hub: huggingface_hub is missing; pip install huggingface_hub"):
        release_model(ReleaseModel(model=folder, push_to_hub="me/mine"))


def test_what_the_hub_says_is_one_line(tmp_path, hub):
    def refuse(**settings):
        raise RuntimeError("403 Forbidden: no write access\nrequest id 7")

    hub.upload_folder = refuse
    with pytest.raises(ConfigError, match=r"^--push-to-hub: me/mine: 403 Forbidden: no write access; start again"):
        release_model(ReleaseModel(model=write_llama(tmp_path / "model"), push_to_hub="me/mine"))


@pytest.mark.parametrize("repository", ["mine", "a/b/c", "https://x/y", "me /mine"])
def test_a_wrong_name_is_refused_before_anything_is_read(tmp_path, repository):
    with pytest.raises(ConfigError, match=r"^--push-to-hub: '.*' names no repository; write USER/NAME$"):
        ReleaseModel(model=tmp_path, push_to_hub=repository)
    with pytest.raises(ConfigError, match=r"^--public: has no effect without --push-to-hub; add it$"):
        ReleaseModel(model=tmp_path, public=True)


def test_the_tool_says_it_in_one_line(tmp_path):
    assert_refused(call("release_model", "--model", tmp_path), "no Hugging Face model folder")
    folder = write_llama(tmp_path / "model")
    assert call("release_model", "--model", folder).returncode == 0
    assert "model.safetensors" in read_sums(folder)


def test_the_checksums_of_a_killed_run_are_written_anew(tmp_path, monkeypatch):
    folder = export(tmp_path)
    partial = tmp_path / ".export.partial"
    folder.rename(partial)
    (partial / "SHA256SUMS").write_text(json.dumps("what the killed run had written"))
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "megatron", to="hf", output=folder))
    assert "config.json" in read_sums(folder)
