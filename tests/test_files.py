"""New folders: complete or not at all, wherever --out points."""

import errno
import os
from pathlib import Path

import pytest

from llamalora import files
from llamalora.files import new_folder, why_not_new


def fill(target: Path) -> None:
    with new_folder(target) as folder:
        for name in ("config.json", "a.txt", "b.txt"):
            (folder / name).write_text(name)
        (folder / "deeper").mkdir()


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["a.txt", "b.txt", "config.json", "deeper"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder, with an empty folder in it and links to that one and to nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("later/deep")
    return tmp_path


@pytest.mark.parametrize("target, real", [
    ("new/deep", "new/deep"), ("empty", "empty"), ("link", "empty"), ("dangling", "later/deep"),
    ("link/new", "empty/new"),
])  # fmt: skip
def test_a_new_folder_is_where_a_path_leads(target, real, place):
    assert why_not_new(Path(target)) is None
    fill(Path(target))
    assert contents(place / real) == contents(Path(target)) == WHOLE
    assert why_not_new(Path(target)) == "exists and is not an empty folder"
    assert not list(place.rglob("*tmp-*"))


def test_an_empty_folder_stays_the_same_one(place, monkeypatch):
    """A mount point cannot be replaced, and a shell would stand in a folder that is gone."""
    before = os.stat("empty").st_ino
    monkeypatch.chdir("empty")
    fill(Path())
    assert os.stat(place / "empty").st_ino == before == os.stat(".").st_ino
    assert contents(Path()) == WHOLE


@pytest.mark.parametrize("target", ["new/deep", "empty", "link"])
@pytest.mark.parametrize("moment", ["while it is filled", "at the end"])
def test_what_fails_leaves_nothing_and_names_the_folder_that_was_given(target, moment, place, monkeypatch):
    def fail(path, *_):
        raise OSError(errno.EIO, "broken", str(path))

    whole, rename = [], Path.rename
    if moment == "while it is filled":
        monkeypatch.setattr(Path, "write_text", fail)
    else:

        def second(path, to):
            whole.append(path.name)
            return fail(path) if len(whole) == 2 or path.name.startswith("deep.tmp") else rename(path, to)

        monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(OSError, match="broken") as failed:
        fill(Path(target))
    assert failed.value.filename == target
    assert contents(place) == ["dangling", "empty", "link"] and not contents(place / "empty")


def test_the_configuration_comes_last(place, monkeypatch):
    """A process that is killed between two files leaves no folder that reads as a model."""
    order, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: order.append(path.name) or rename(path, to))
    fill(Path("empty"))
    assert sorted(order) == WHOLE and order[-1] == "config.json"


def test_a_folder_that_was_filled_meanwhile_is_left_alone(place):
    with pytest.raises(OSError, match="not empty"), new_folder(Path("empty")) as folder:
        (folder / "a.txt").write_text("ours")
        (place / "empty/a.txt").write_text("theirs")
    assert contents(place / "empty") == ["a.txt"] and (place / "empty/a.txt").read_text() == "theirs"


def test_what_cannot_be_written_is_found_out_before(place, monkeypatch):
    (place / "file").touch()
    assert why_not_new(Path("file")) == "exists and is not an empty folder"
    assert why_not_new(Path("file/new")) == f"{place / 'file'} is a file"
    (place / "loop").symlink_to("loop")
    assert why_not_new(Path("loop")) == "is a link that leads back to itself"

    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "TemporaryFile", refuse)
    assert why_not_new(Path("new/deep")) == f"{place} cannot be written to (Read-only file system)"
    assert why_not_new(Path("link")) == f"{place / 'empty'} cannot be written to (Read-only file system)"
