"""Which code this is: in a repository, in an archive of one, in an image."""

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def told(folder: Path) -> str:
    return runpy.run_path(str(folder / "infra" / "version.py"))["code_version"]().partition(" ")[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "infra").mkdir(parents=True)
    for name in (".gitattributes", "infra/version.py", "infra/COMMIT"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "all")
    return folder


def test_a_repository_tells_its_commit_and_changes(repository: Path):
    commit = git(repository, "rev-parse", "--short", "HEAD").strip()
    assert told(repository) == f"({commit})"
    (repository / ".gitattributes").write_text("")
    assert told(repository) == f"({commit}+)"


def test_an_archive_tells_the_commit_it_was_made_of(repository: Path, tmp_path: Path):
    git(repository, "archive", "--prefix=tessera/", f"--output={tmp_path}/tessera.tar.gz", "HEAD")
    subprocess.run(["tar", "--extract", "--gzip", "--file", "tessera.tar.gz"], cwd=tmp_path, check=True)
    assert told(tmp_path / "tessera") == f"({git(repository, 'rev-parse', '--short', 'HEAD').strip()})"


@pytest.mark.parametrize(("written", "says"), [("abc1234+\n", "(abc1234+)"), ("\n", "")])
def test_an_image_tells_what_it_was_built_with(repository: Path, tmp_path: Path, written: str, says: str):
    image = (repository / "infra").rename(tmp_path / "infra").parent
    (image / "infra" / "COMMIT").write_text(written)
    assert told(image) == says


def test_shipped_code_tells_the_version_it_had_at_home(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_TESSERA_CODE", "0.1.0 (abc1234)")
    assert told(repository) == "(abc1234)"
