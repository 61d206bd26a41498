"""Files read straight out of archives: wheels (zip), npm's tarballs and Debian's packages (ar)."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mora_jax.errors import MoraError

_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60  # bytes; see ar(5)


def names(path: Path) -> tuple[str, ...]:
    """The sorted names of the files in a .whl, .tgz or .deb."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return tuple(sorted(name for name in archive.namelist() if not name.endswith("/")))
    with _tar(path) as archive:
        return tuple(sorted(_name(member) for member in archive if member.isfile()))


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of the files whose names are `wanted`, in sorted order; one pass over the archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in sorted(filter(wanted, archive.namelist()))}
    found = {}
    with _tar(path) as archive:
        for member in archive:
            # Links are left out: what they point to has a name of its own, or lies outside.
            if member.isfile() and wanted(_name(member)):
                found[_name(member)] = archive.extractfile(member).read()
    return dict(sorted(found.items()))


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    if path.suffix == ".deb":
        with tarfile.open(fileobj=io.BytesIO(_data_of_deb(path)), mode="r:*") as archive:
            yield archive
    else:
        # A stream: a tarball is never read backwards, and seeking in gzip is slow.
        with tarfile.open(path, mode="r|*") as archive:
            yield archive


def _data_of_deb(path: Path) -> bytes:
    """The compressed tarball of a package's files: the member data.tar.* of an ar archive (deb(5))."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise MoraError(f"{path}: not a Debian package")
        while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
            name, size = header[:16].decode("ascii").strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                return file.read(size)
            file.seek(size + size % 2, io.SEEK_CUR)  # members begin at even offsets
    raise MoraError(f"{path}: a Debian package without data")
