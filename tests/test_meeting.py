"""Several real processes find each other, say why where they cannot, and end together."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import pytest
from interruptions import ended, wait_for
from jax._src.clusters import cloud_tpu_cluster
from processes import address, all_ended, of_pair, said, start

from mora_jax import errors
from mora_jax.errors import MoraError
from mora_jax.runtime import hosts

# ---------------------------------------------------------------- what is said of other processes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--coordinator=a:1"], "--coordinator needs --processes beside it"),
        (["--process=0", "--processes=2"], "needs --coordinator beside it"),
        (["--coordinator=a", "--processes=2", "--process=0"], "--coordinator=a is no HOST:PORT"),
        (["--coordinator=a:0", "--processes=2", "--process=0"], "--coordinator=a:0 is no HOST:PORT with 1 <= PORT"),
        (["--coordinator=a:65536", "--processes=2", "--process=0"], "a:65536 is no .* PORT <= 65535"),
        (["--coordinator=a:1", "--processes=two", "--process=0"], "--processes=two is no whole number"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "--process=2 does not lie below --processes=2"),
    ],
)
def test_options_without_a_meaning_are_refused(options, says):
    given = dict(option.removeprefix("--").split("=") for option in options)
    with pytest.raises(MoraError, match=says):
        hosts.from_options(given)


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # a batch script, outside of srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-4]"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),  # a notebook
    ],
)
def test_who_started_this_process_is_known_from_its_environment(environment, method, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = hosts.from_options({})
    assert (found and found.method) == method


def test_an_open_mpi_that_does_not_say_where_it_began_is_told_what_to_add(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(MoraError, match=r"--processes=\$OMPI_COMM_WORLD_SIZE"):
        hosts.from_options({})


# ---------------------------------------------------------------- meeting and losing each other

MEET = """
import sys
from mora_jax.runtime import hosts
hosts.CONNECT_SECONDS, hosts.LOST_SECONDS = 60, 3
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
hosts.start(hosts.from_options(options))
import jax
"""
GREET = MEET + "print(hosts.gathered({'me': jax.process_index(), 'text': 'x' * (1 + jax.process_index())}))"
LOSE = (
    MEET
    + """
import os, signal
from jax.experimental import multihost_utils
def run(argv):
    for step in range(1000):
        if step == 3 and jax.process_index() == WHO:
            ENDS
        multihost_utils.process_allgather(jax.numpy.ones(4))
sys.exit(hosts.exit_code(run, []))
"""
)


def slurm(number: int) -> tuple[list[str], dict[str, str]]:
    job = str(20_000 + os.getpid() % 4000)  # decides the port
    values = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "PROCID": str(number), "LOCALID": "0"}
    return [], {f"SLURM_{name}": value for name, value in values.items()}


def open_mpi(number: int) -> tuple[list[str], dict[str, str]]:
    job = (6000 + os.getpid() % 2000) * 4096  # decides the port
    size = {"SIZE": "2", "RANK": str(number), "LOCAL_RANK": "0"}
    names = {f"OMPI_COMM_WORLD_{name}": value for name, value in size.items()}
    return [], names | {"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:34911"}


@pytest.mark.parametrize("started_by", [slurm, open_mpi])
def test_processes_of_a_launcher_meet_and_hear_each_other(started_by, environment):
    processes = []
    for number in range(2):
        options, variables = started_by(number)
        processes.append(start([sys.executable, "-c", GREET, *options], environment | variables))
    for run in all_ended(processes):
        assert run.code == 0, run.err
        assert said(run) == ["[{'me': 0, 'text': 'x'}, {'me': 1, 'text': 'xx'}]"]


POD = """
import os
from jax._src.clusters import cloud_tpu_cluster
from mora_jax.runtime import hosts
cloud_tpu_cluster.running_in_cloud_tpu_vm = hosts._in_pod = lambda *_: True
hosts.start(hosts.from_options({}))
import jax
print(hosts.gathered(jax.process_index()))
"""


def pod_of_two(port: object) -> dict[str, str]:
    """What Kubernetes tells each worker; the last three keep JAX from asking Google's metadata server."""
    pod = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "JAX_COORDINATOR_PORT": str(port)}
    return pod | {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}


def test_workers_of_a_tpu_pod_meet_as_jax_finds_them(environment):
    pod = pod_of_two(address().rpartition(":")[2])
    each = [environment | pod | {"TPU_WORKER_ID": str(i)} for i in range(2)]
    for run in all_ended([start([sys.executable, "-c", POD], variables) for variables in each]):
        assert run.code == 0, run.err
        assert said(run) == ["[0, 1]"]


def test_a_taken_port_is_told_in_one_line():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MoraError, match=rf"--coordinator={place}: port \d+ of this host cannot be had"):
            hosts.start(hosts.from_options({"coordinator": place, "processes": "2", "process": "0"}))


@pytest.mark.parametrize(
    ("started_by", "place"),
    [(slurm, "the first of SLURM_STEP_NODELIST=127.0.0.1"), (open_mpi, "OMPI_MCA_orte_hnp_uri=")],
)
def test_a_taken_port_is_told_where_a_launcher_chose_it(started_by, place, monkeypatch):
    """In JAX it ends in a segmentation fault, which would end the tests too."""
    for name, value in started_by(0)[1].items():
        monkeypatch.setenv(name, value)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
        with pytest.raises(MoraError, match=rf"^{place}.*: port {port} of this host cannot be had"):
            hosts.start(hosts.from_options({}))


def test_a_taken_port_is_told_on_a_pod(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(hosts, "_in_pod", lambda *_: True)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        for name, value in (pod_of_two(taken.getsockname()[1]) | {"TPU_WORKER_ID": "0"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MoraError, match=r"^the first worker of this TPU pod: port \d+ of this host cannot be had"):
            hosts.start(hosts.from_options({}))


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_meets_nobody_says_where_it_waited(number, environment):
    place = address()
    alone = GREET.replace("CONNECT_SECONDS, hosts.LOST_SECONDS = 60", "CONNECT_SECONDS, hosts.LOST_SECONDS = 2")
    (run,) = all_ended([start([sys.executable, "-c", alone, *of_pair(number, place)], environment)])
    assert run.code == errors.AGAIN
    assert run.err.count("\n") == 1, run.err
    assert f"within 2 s at --coordinator={place}" in run.err


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others(lost, environment):
    place, began = address(), time.monotonic()
    program = LOSE.replace("WHO", str(lost)).replace("ENDS", "os._exit(9)")
    pair = [start([sys.executable, "-c", program, *of_pair(number, place)], environment) for number in range(2)]
    runs = all_ended(pair)
    kept = runs.pop(1 - lost)
    assert runs[0].code == 9
    assert kept.code not in (0, None)
    assert "error" in kept.err.lower()
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_frozen_process_ends_the_others_in_a_minute(lost, environment):
    program = LOSE.replace("WHO", str(lost)).replace("ENDS", "os.kill(os.getpid(), signal.SIGSTOP)")
    program = program.replace("hosts.CONNECT_SECONDS, hosts.LOST_SECONDS = 60, 3", f"print({hosts.LOST_SECONDS})")
    place = address()
    pair = [start([sys.executable, "-c", program, *of_pair(number, place)], environment) for number in range(2)]
    try:
        frozen = Path(f"/proc/{pair[lost].pid}/stat")
        wait_for(pair[1 - lost], lambda: frozen.read_text().rpartition(")")[2].split()[0] == "T")
        began = time.monotonic()
        kept = ended(pair[1 - lost])
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert kept.code not in (0, None)
    assert time.monotonic() - began < 60


def test_the_trouble_of_one_process_has_its_exit_code_on_all(monkeypatch):
    trouble = {"host": "there", "problem": "no answer", "code": errors.AGAIN, "facts": {}}
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "gathered", lambda own: [own, trouble])
    with pytest.raises(MoraError, match=r"process 1 \(there\) has stopped: no answer") as caught, hosts.together():
        pass
    assert caught.value.code == errors.AGAIN
