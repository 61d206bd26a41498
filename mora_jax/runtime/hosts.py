"""Several processes as one run: start-up, agreeing on what is run, and ending together.

Everything goes through `jax.distributed`, whose coordination service runs beside process 0. A run with one process
never gets here: every function then does nothing, or what one host would do.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mora_jax import errors
from mora_jax.errors import MoraError

CONNECT_SECONDS = 300  # until all processes must have come
LOST_SECONDS = 30  # without a sign of life until a process counts as lost and the others end
OPTIONS = ("coordinator", "processes", "process")


class Cluster(NamedTuple):
    """How the processes find each other: `method` is JAX's name of it, None where JAX is to look itself; the rest is
    given for `deactivate`, the explicit one, and found by `start` for the others.

    `place` says in an error where the coordinator was looked for.
    """

    method: str | None
    place: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def from_options(options: Mapping[str, str]) -> Cluster | None:
    """The cluster of --coordinator=HOST:PORT --processes=N --process=I, or else the one that started this process.

    None where there is one process. Raises MoraError for options that are incomplete or have no meaning.
    """
    given = {name: options[name] for name in OPTIONS if name in options}
    if not given:
        return _found(os.environ)
    usage = "legal: --coordinator=HOST:PORT --processes=N --process=I with 0 <= I < N, all three"
    if missing := [name for name in OPTIONS if name not in given]:
        raise MoraError(f"--{next(iter(given))} needs --{missing[0]} beside it; {usage}")
    port = re.fullmatch(r".+:(\d{1,5})", given["coordinator"])
    if not port or not 1 <= int(port[1]) <= 65535:
        raise MoraError(f"--coordinator={given['coordinator']} is no HOST:PORT with 1 <= PORT <= 65535; {usage}")
    for name in OPTIONS[1:]:
        if not given[name].isdecimal():
            raise MoraError(f"--{name}={given[name]} is no whole number; {usage}")
    processes, process = int(given["processes"]), int(given["process"])
    if process >= processes:
        raise MoraError(f"--process={process} does not lie below --processes={processes}; {usage}")
    if processes == 1:
        return None
    place = f"--coordinator={given['coordinator']}"
    return Cluster("deactivate", place, given["coordinator"], processes, process)


def _found(environment: Mapping[str, str]) -> Cluster | None:
    """What SLURM, Open MPI or a TPU pod says of itself in the environment of every process that it starts."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return Cluster("slurm", f"the first of SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']}")
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        address = environment.get("OMPI_MCA_orte_hnp_uri")
        if address is None:  # Open MPI 5 no longer says it
            raise MoraError(
                "this Open MPI does not say where process 0 is; add --coordinator=HOST:PORT "
                "--processes=$OMPI_COMM_WORLD_SIZE --process=$OMPI_COMM_WORLD_RANK"
            )
        return Cluster("ompi", f"OMPI_MCA_orte_hnp_uri={address}")
    # JAX has a method each for the metadata of Compute Engine and for Kubernetes, and knows which of them answers here.
    return Cluster(None, "the first worker of this TPU pod") if _in_pod(environment) else None


def _in_pod(environment: Mapping[str, str]) -> bool:
    """On a TPU virtual machine whose slice may have more hosts: there JAX knows the others, and one host is legal."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    workers = environment.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:  # Kubernetes, and notebooks with one host
        return "," in workers or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def start(cluster: Cluster | None) -> None:
    """Joins the other processes; to be called before anything asks JAX for devices.

    Where they have not all come within CONNECT_SECONDS the process ends with one line: JAX's own time-out aborts it.
    """
    if cluster is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def give_up() -> None:
        print(
            f"error: the {cluster.processes or 'other'} processes have not met within {CONNECT_SECONDS} s at "
            f"{cluster.place}; start all of them, and check that every host reaches that address",
            file=sys.stderr,
        )
        end(errors.AGAIN)

    watch = threading.Timer(CONNECT_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    try:
        cluster = _located(cluster)
        if cluster.coordinator and cluster.process == 0:
            _check_free(cluster)
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            cluster_detection_method=cluster.method,
            initialization_timeout=2 * CONNECT_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except (RuntimeError, ValueError) as problem:
        told = str(problem) or repr(problem)
        alone = "; for one process alone: --coordinator=localhost:1 --processes=1 --process=0"
        raise MoraError(
            f"the processes cannot meet at {cluster.place}: {told}{'' if cluster.method else alone}",
            errors.AGAIN if isinstance(problem, RuntimeError) else errors.REFUSED,
        ) from problem
    finally:
        watch.cancel()


def _located(cluster: Cluster) -> Cluster:
    """With the coordinator's address, the number of processes and that of this one, as `initialize` would find them."""
    if cluster.method == "deactivate":
        return cluster
    # No public name finds an address without binding its port. Here, so that another jax can be imported without it.
    from jax._src.clusters import ClusterEnv

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, cluster.method, 2 * CONNECT_SECONDS
    )
    return cluster._replace(**dict(zip(OPTIONS, found, strict=False)))


def _check_free(cluster: Cluster) -> None:
    """MoraError if the coordinator's port is taken on this host, where JAX would end in a segmentation fault."""
    port = int(cluster.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as problem:
        raise MoraError(
            f"{cluster.place}: port {port} of this host cannot be had ({problem.strerror}); does an older run still "
            "hold it?"
        ) from problem


def several() -> bool:
    """Whether the run has more than one process. Asks JAX for devices only if it has been told of others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not several() or jax.process_index() == 0


def wait() -> None:
    """Returns once all processes have come here."""
    if several():
        multihost_utils.sync_global_devices("wait")


def gathered(value: Any) -> list[Any]:
    """A JSON value of every process, in their order; on all of them."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(padded, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[dict[str, Any]]:
    """All processes do what stands inside, or none goes on; what they put into the dict must be the same on all.

    Raises MoraError on every process if one failed inside, or if the values differ: it names the process and the key.
    """
    facts: dict[str, Any] = {}
    problem = None
    try:
        yield facts
    except (MoraError, OSError) as error:
        problem = error
    if not several():
        if problem:
            raise problem
        return
    own = {"problem": problem and str(problem), "code": problem and errors.code_of(problem)}
    told = gathered({"host": socket.gethostname(), **own, "facts": facts})
    if problem:
        raise problem
    for number, other in enumerate(told):
        if other["problem"]:
            raise MoraError(f"process {number} ({other['host']}) has stopped: {other['problem']}", other["code"])
    reference = told[0]["facts"]
    for number, other in enumerate(told):
        keys = sorted(reference.keys() | other["facts"].keys())
        differing = [key for key in keys if reference.get(key) != other["facts"].get(key)]
        if differing:
            rows = (f"{key}: {reference.get(key)!r} and {other['facts'].get(key)!r}" for key in differing)
            raise MoraError(
                f"processes 0 ({told[0]['host']}) and {number} ({other['host']}) were started differently; "
                f"{'; '.join(rows)}"
            )


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """`errors.exit_code` for a binary that may be one of several processes.

    They end together. After an error a process leaves at once, and the others notice that within LOST_SECONDS; what it
    sees of that itself, a computation that fails, is an error too (LOST).
    """
    try:
        code = errors.exit_code(run, argv)
        if several() and not code:
            wait()
    except jax.errors.JaxRuntimeError as problem:
        if not several():
            raise
        reason = str(problem).splitlines()[0]
        print(f"error: a computation of all processes failed, another one may be lost: {reason}", file=sys.stderr)
        code = errors.LOST
    if several():
        if code:
            if first():  # the coordination service goes with this process, and then the others abort in mid-sentence
                time.sleep(1)
            end(code)
        jax.distributed.shutdown()
    return code


def end(code: int) -> None:
    """Ends this process without waiting for others, as the usual way out would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
