"""`iskd push`: what would go up, what is refused before anything is sent, and what is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iskd.commands.push import run
from iskd.export import hub
from iskd.export.lineage import LICENCES, licence_keys
from iskd.export.write import export
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Record, Remove, Replace, Spec
from tests.factories import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, teacher = tiny("llama", vocab=257), tiny("llama", vocab=257)
    record = surgery.apply(model, Record(4), [Replace(1, Spec("iskd.blocks.linear.Linear", {})), Remove(2)])
    source = {"kind": "hub", "name": "owner/teacher", "license": "A licence of our own, v2"}
    found = export(tmp_path / "model", model, record, teacher.config, byte_tokenizer(), verify=False, teacher=source)
    (found / ".DS_Store").write_text("")
    return found


class Hub:
    """Takes what is sent."""

    calls: dict[str, Any]

    def __init__(self) -> None:
        Hub.calls = {}

    def create_repo(self, repo: str, **keys: Any) -> None:
        self.calls["repo"] = (repo, keys)

    def repo_info(self, repo: str) -> Any:
        return type("Info", (), {"private": repo != "owner/public"})

    def create_branch(self, repo: str, **keys: Any) -> None:
        self.calls["branch"] = keys["branch"]

    def create_commit(self, repo: str, operations: list[Any], **keys: Any) -> Any:
        self.calls["files"] = {each.path_in_repo: each.path_or_fileobj for each in operations}
        return type("Commit", (), {"commit_url": f"{repo}/commit"})


def test_a_dry_run_lists_and_sends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("sent"))
    run([str(folder), "owner/student", "--dry-run"])
    said = capsys.readouterr().out
    files = sorted(file.name for file in folder.iterdir() if file.name != ".DS_Store")
    assert all(f"bytes  {name}\n" in said for name in files)
    assert f"in {len(files)} files" in said
    assert "readers need iskd installed" in said
    assert ".DS_Store" not in said


def test_what_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One commit of every file; the card loads the student by its name there."""
    monkeypatch.setattr(hub, "HfApi", Hub)
    run([str(folder), "owner/student", "--private", "--revision", "v1"])
    assert Hub.calls["repo"] == ("owner/student", {"private": True, "exist_ok": True})
    assert Hub.calls["branch"] == "v1"
    card = Hub.calls["files"].pop("README.md").decode()
    assert 'from_pretrained("owner/student"' in card
    assert "license: other\nlicense_name: a-licence-of-our-own-v2\n" in card
    assert '= iskd.load(snapshot_download("owner/student"))' in card
    assert "DIR" not in card.replace("--local-dir DIR` and then `iskd verify DIR`", "")
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_iskd.py"} <= Hub.calls["files"].keys()
    assert "owner/student/commit" in capsys.readouterr().out


def test_who_may_see_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub leaves a place that is there as public as it is; without the flag its owner's default counts."""
    monkeypatch.setattr(hub, "HfApi", Hub)
    hub.push(hub.upload_of(folder, "owner/public"))
    assert Hub.calls["repo"][1]["private"] is None
    with pytest.raises(ValueError, match="owner/public is there and public"):
        hub.push(hub.upload_of(folder, "owner/public"), private=True)
    assert "files" not in Hub.calls


def test_only_the_students_own_files_go_up(folder: Path, tmp_path: Path) -> None:
    (folder / "big.log").write_text("mine")
    (folder / "LICENSE").write_text("yours")
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    upload = hub.upload_of(folder, "owner/student")
    assert "LICENSE" in upload.files
    assert not {"big.log", "notes.txt", ".DS_Store"} & upload.files.keys()
    assert sum("stays here" in note for note in upload.notes) == 2
    assert "big.log" in hub.upload_of(folder, "owner/student", ["big.log"]).files
    with pytest.raises(ValueError, match=r"notes\.txt is a link out of its folder"):
        hub.upload_of(folder, "owner/student", ["notes.txt"])
    with pytest.raises(ValueError, match=r"has no file 'other\.txt'"):
        hub.upload_of(folder, "owner/student", ["other.txt"])
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="LICENSE is a link out of its folder"):
        hub.upload_of(folder, "owner/student")


@pytest.mark.parametrize(
    ("change", "repo", "message"),
    [
        ("", "student", "give OWNER/NAME"),
        ("", "owner/stu dent", "names no place on a hub"),
        ("license: somebody's", "owner/student", "license in its head is .* must be one of the hub's names"),
        ("license: [mit, somebody's]", "owner/student", "license in its head is .* must be one of the hub's names"),
        ("base_model: teachers/mine/v2", "owner/student", "base_model in its head .*must be OWNER/NAME"),
        ("base_model_relation: child", "owner/student", "must be one of finetune"),
        ("datasets: [some texts of mine]", "owner/student", "datasets in its head is .* a list of names on the hub"),
        ("language: English", "owner/student", "language in its head .* a code of two or three letters"),
        ("model-index: [{name: mine}]", "owner/student", "model-index in its head"),
        ("tags: [iskd", "owner/student", "its head is no YAML"),
        ("weights", "owner/student", "was changed after it was exported"),
        ("network", "owner/student", r"could not be sent to owner/student \(ConnectionError: no route\).*HF_TOKEN"),
    ],
)
def test_what_a_hub_would_refuse_is_not_sent(
    change: str, repo: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        assert change == "network"
        api = Hub()
        monkeypatch.setattr(Hub, "create_commit", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
        return api

    monkeypatch.setattr(hub, "HfApi", refuse)
    if ":" in change:
        (folder / "README.md").write_text(f"---\n{change}\n---\n# A student\n")
    elif change == "weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=message):
        hub.push(hub.upload_of(folder, repo))


def test_licences_of_cards_are_those_of_hubs() -> None:
    assert licence_keys("Apache-2.0") == {"license": "apache-2.0"}
    assert licence_keys(None) == {"license": None}
    assert licence_keys("Qwen Research") == {"license": "other", "license_name": "qwen-research"}
    assert {"other", "openmdw-1.1", "eupl-1.2"} < LICENCES
