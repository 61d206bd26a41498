"""Launching on pods and clusters that are not here: gcloud, srun and kubectl are stand-ins, all else is real."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from launching import Ended

from mora_jax import config as configs
from mora_jax import errors
from mora_jax.planning import topologies

LAUNCH = ROOT / "experiments" / "launch"
TRAIN = ["--config=configs/llm_cl.py:smoke", "--workdir=gs://bucket/a run", "--config.benchmark.tasks=a,b"]
SECONDS = 60
CARRIED = ("PYTHON", "MORA_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "HF_TOKEN")  # to the workers
# What a worker is told to do with the copy.
UNPACK = r"""for pid in mora_jax/launches/*/pid; do state=${pid%/pid}
    if [ -s "$pid" ] && [ ! -s "$state/code" ] && grep -qs "launch.sh\|mora_jax" "/proc/$(cat "$pid")/cmdline"
    then rm mora_jax.tgz; echo "$run busy ${state##*/}"; exit 75; fi
done
rm -f mora_jax/.hf_token; mkdir -p mora_jax && tar -xzf mora_jax.tgz -C mora_jax; code=$?; rm mora_jax.tgz; exit $code
""".strip()

# gcloud: writes down every call and does to the folders workers/0, workers/1 ... what it would do to workers. BREAK
# names the one whose connection breaks once, LOSE the one that is never reached.
GCLOUD = f"""#!{sys.executable} -S
import json, os, shutil, subprocess, sys, tarfile, time
words, here = sys.argv[1:], os.environ["FAKE"]
with open(f"{{here}}/calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
count = int(os.environ["WORKERS"])
homes = [f"{{here}}/workers/{{i}}" for i in range(count)]
if words[3] == "describe":
    if words[4] != "pod":
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND")
    print(";".join(f"10.0.0.{{i}}" for i in range(count)))
elif words[3] == "scp":
    for home in homes:
        os.makedirs(home, exist_ok=True)
        shutil.copy(words[4], f"{{home}}/{{words[5].partition(':')[2]}}")
    if "HF_TOKEN" in os.environ:
        with open(f"{{here}}/modes", "w") as modes, tarfile.open(words[4]) as archive:
            print(oct(os.stat(words[4]).st_mode & 0o777), oct(archive.getmember(".hf_token").mode), file=modes)
elif words[3] == "ssh":
    command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
    def connect(i):
        there = {{k: v for k, v in os.environ.items() if k not in {CARRIED}}}
        return subprocess.Popen(["bash", "-c", command], cwd=homes[i], env=there | {{"WORKER": str(i)}})
    training = "tpu_worker" in command
    reached = [i for i in range(count) if not (training and os.environ.get("LOSE") == str(i))]
    connected = {{i: connect(i) for i in reached}}
    if training and (broken := os.environ.get("BREAK")):
        while not os.path.exists(f"{{homes[int(broken)]}}/mora_jax/trained"):
            time.sleep(0.05)
        connected[int(broken)].kill()
        connected[int(broken)].wait()
        connected[int(broken)] = connect(int(broken))
    codes = [connection.wait() for connection in connected.values()]
    sys.exit(255 if len(reached) < count else max(codes))
"""
# Python of a worker: makes its venv, installs nothing, and trains as FAIL (a worker) and WAIT (for SIGTERM) say.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip" | "-c "*) ;;
    "- "*) echo stamp ;;
    "-m mora_jax.train")
        trap 'echo "worker $WORKER saved"; kill $!; exit 0' TERM
        printf '%s\\n' "$MORA_JAX_PLATFORM" "${@:3}" >>trained
        printf '%s\\n' "${PYTHON:-}" "${XLA_FLAGS:-}" "${HF_TOKEN:-}" >>carried
        echo "worker $WORKER trains"
        if [[ -n ${WAIT:-} ]]; then sleep 30 & wait; fi
        sleep 0.5
        [[ ${FAIL:-} != "$WORKER" ]] || { echo "error: no such folder" >&2; exit 2; } ;;
    *) exit 9 ;;
esac
"""
CURL = '#!/usr/bin/env bash\n[[ $* == *"/attributes/agent-worker-number" ]] && printf %s "$WORKER"\n'


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `launch.sh tpu` among stand-ins; keywords are their variables."""
    for name, text in (("gcloud", GCLOUD), ("curl", CURL), ("python3.13", PYTHON)):
        stand_in(tmp_path / "bin", name, text)
    started = []

    def start(*words: str, **variables: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {k: v for k, v in os.environ.items() if k not in CARRIED}
        environment |= {"PATH": path, "FAKE": str(tmp_path), "WORKERS": "2"} | variables
        command = ["bash", str(ROOT / "launch.sh"), "tpu", *words]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ended(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def trained(folder: Path, worker: int) -> list[str]:
    """What the train binary of a worker was given: the platform, then its arguments."""
    return (folder / "workers" / str(worker) / "mora_jax" / "trained").read_text().splitlines()


def test_a_pod_gets_the_tree_and_every_worker_trains(pod, tmp_path: Path):
    run = ended(pod("pod", "us-west4-a", "--", *TRAIN))
    assert run.code == 0, run
    described, copied, unpacked, started = calls(tmp_path)
    compute, zone = ["compute", "tpus", "tpu-vm"], "--zone=us-west4-a"
    assert described == [*compute, "describe", "pod", "--format=value(networkEndpoints[].ipAddress)", zone]
    assert copied == [*compute, "scp", copied[4], "pod:mora_jax.tgz", "--worker=all", zone]
    name = next(tmp_path.glob("workers/0/mora_jax/launches/*")).name
    unpack = f"--command=run={name}; {UNPACK}"
    assert unpacked == [*compute, "ssh", "pod", "--worker=all", unpack, zone]
    assert started == [*compute, "ssh", "pod", "--worker=all", started[6], zone]
    words = ["bash", "mora_jax/experiments/launch/tpu_worker.sh", name, *TRAIN]
    assert shlex.split(started[6].removeprefix("--command=")) == words
    for worker in range(2):
        assert trained(tmp_path, worker) == ["tpu", *TRAIN]
        there = tmp_path / "workers" / str(worker) / "mora_jax"
        assert (there / "mora_jax" / "train.py").read_bytes() == (ROOT / "mora_jax" / "train.py").read_bytes()
        assert (there / "launches" / name / "code").read_text() == "0\n"
        assert not (there / ".git").exists()
    assert "worker 0 trains" in run.out
    assert "worker 1" not in run.out  # its output stays there
    assert not Path(copied[4]).exists()  # nothing is left here


def test_the_workers_get_the_variables_of_the_shell_and_the_token_through_a_file(pod, tmp_path: Path):
    flags, token = "--xla_a=1 --xla_b='x y'", "hf_secret"
    run = ended(pod("pod", "z", "--", *TRAIN, PYTHON="python3.13", XLA_FLAGS=flags, HF_TOKEN=token))
    assert run.code == 0, run
    command = calls(tmp_path)[3][6].removeprefix("--command=")
    assert shlex.split(command)[:3] == ["PYTHON=python3.13", f"XLA_FLAGS={flags}", "bash"]
    assert token not in (tmp_path / "calls").read_text() + run.out + run.err
    for worker in range(2):
        home = tmp_path / "workers" / str(worker)
        assert (home / "mora_jax" / "carried").read_text().splitlines() == ["python3.13", flags, token]
        assert not (home / "mora_jax.tgz").exists()
        assert not (home / "mora_jax" / ".hf_token").exists()
    assert (tmp_path / "modes").read_text().split() == ["0o600", "0o600"]  # of the archive and of the token in it


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_that_fails_is_named_with_its_exit_code(pod, worker):
    run = ended(pod("pod", "z", "--", *TRAIN, FAIL=str(worker)))
    assert run.code == 2, run
    assert f"failed: worker {worker} exit code 2\n" in run.err
    assert "error: no such folder" in run.out


def test_a_worker_that_is_never_reached_is_named(pod):
    run = ended(pod("pod", "z", "--", *TRAIN, WORKERS="3", LOSE="1"))
    assert run.code == 255, run
    assert "failed: worker 1 without an exit code\n" in run.err


def test_a_broken_connection_does_not_end_or_repeat_the_run(pod, tmp_path: Path):
    run = ended(pod("pod", "z", "--", *TRAIN, BREAK="0"))
    assert run.code == 0, run
    assert trained(tmp_path, 0) == ["tpu", *TRAIN]  # once


def test_a_signal_makes_all_workers_save(pod, tmp_path: Path):
    process = pod("pod", "z", "--", *TRAIN, WAIT="1")
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and len(list(tmp_path.glob("workers/*/mora_jax/trained"))) < 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    run = ended(process)
    assert run.code == 0, run
    assert "worker 0 saved" in run.out
    name = next(tmp_path.glob("workers/0/mora_jax/launches/*")).name
    assert calls(tmp_path)[-1][6] == f"--command=kill -TERM $(cat mora_jax/launches/{name}/pid)"
    assert "worker 1 saved" in (tmp_path / f"workers/1/mora_jax/launches/{name}/log").read_text()


def test_a_pod_whose_run_goes_on_is_refused_before_its_code_is_written_over(pod, tmp_path: Path):
    """As when the machine that started it was shut, and the same command is given again."""
    process = pod("pod", "z", "--", *TRAIN, WAIT="1")
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and len(list(tmp_path.glob("workers/*/mora_jax/trained"))) < 2:
        time.sleep(0.1)
    process.kill()
    kept = tmp_path / "workers/0/mora_jax/README.md"
    kept.write_text("as it was")
    run = ended(pod("pod", "z", "--", *TRAIN))
    name = next(tmp_path.glob("workers/0/mora_jax/launches/*")).name
    there = "gcloud compute tpus tpu-vm ssh pod --zone=z --worker"
    stop = f"kill $(cat mora_jax/launches/{name}/pid)"
    assert run.code == 2, run
    assert run.err.splitlines()[-1] == (
        f"launch.sh: {name} still runs on pod. Look at it: {there}=0 --command='tail -f mora_jax/launches/{name}/log'; "
        f"make it save and end: {there}=all --command='{stop}'"
    )
    assert kept.read_text() == "as it was"
    for worker in range(2):
        home = tmp_path / "workers" / str(worker)
        subprocess.run(["bash", "-c", stop], cwd=home, check=True)
        while time.monotonic() < until and not (home / "mora_jax/launches" / name / "code").exists():
            time.sleep(0.1)
        assert f"worker {worker} saved" in (home / "mora_jax/launches" / name / "log").read_text()
    process.communicate(timeout=SECONDS)  # what the killed one had started ends with the run
    (tmp_path / f"workers/0/mora_jax/launches/{name}/code").unlink()  # as a restart of the host leaves it
    again = ended(pod("pod", "z", "--", *TRAIN))
    assert again.code == 0, again
    assert kept.read_bytes() == (ROOT / "README.md").read_bytes()


@pytest.mark.parametrize("words", [(), ("pod", "z"), ("pod", "z", "--"), ("pod", "z", *TRAIN)])
def test_a_command_line_without_its_parts_is_refused(words, pod, tmp_path: Path):
    run = ended(pod(*words))
    assert run.code == 2
    assert "launch.sh: usage: bash launch.sh tpu NAME ZONE -- " in run.err
    assert not (tmp_path / "calls").exists()


def test_an_unknown_pod_is_refused_before_anything_is_copied(pod, tmp_path: Path):
    run = ended(pod("other", "z", "--", *TRAIN))
    assert run.code == 2
    assert "NOT_FOUND" in run.err
    assert "cannot describe the TPU other in zone z" in run.err
    assert len(calls(tmp_path)) == 1


# ---------------------------------------------------------------- a run that a scheduler starts again


def test_a_stopped_run_asks_to_be_started_again(environment, tmp_path: Path, smoke):
    """AGAIN after a SIGTERM, where the train binary itself says 0."""
    command = [sys.executable, str(LAUNCH / "train_to_end.py"), *smoke("smoke,benchmark=folder,method=inc_lora")]
    command += ["--config.train.steps_per_task=300"]
    process = subprocess.Popen(command, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and not (tmp_path / "w" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=SECONDS) == errors.AGAIN


# ---------------------------------------------------------------- SLURM

SRUN = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$FAKE/srun.said"\nexit "$CODE"\n'
SCONTROL = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$FAKE/scontrol.said"\n'


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, None, False),
        (errors.AGAIN, None, True),
        (errors.LOST, "19", True),
        (errors.AGAIN, "20", False),
        (errors.REFUSED, None, False),
        (137, None, False),
    ],
)
def test_slurm_starts_one_process_per_gpu_and_queues_a_job_that_may_go_on_again(code, restarts, again, tmp_path: Path):
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", SCONTROL)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_in(tmp_path / ".venv" / "bin", "python", "")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "CODE": str(code)}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    job = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], env=environment, check=False)
    assert job.returncode == code
    program = [".venv/bin/python", "experiments/launch/train_to_end.py"]
    assert (tmp_path / "srun.said").read_text().splitlines() == ["--kill-on-bad-exit=1", *program, *TRAIN]
    assert (ROOT / program[1]).is_file()
    said = tmp_path / "scontrol.said"
    assert (said.read_text().split() if said.exists() else None) == (["requeue", "17"] if again else None)


def test_slurm_without_an_installation_says_so(tmp_path: Path):
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    job = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch")], env=environment, capture_output=True, check=False)
    assert job.returncode == 2
    assert b"launch.sh install" in job.stderr


def test_the_options_of_the_slurm_job_fit_together():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    words = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --")]
    options = {name: value for name, _, value in words}
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert {"requeue", "nodes", "time"} <= options.keys()
    assert options["signal"].startswith("TERM@")  # to the processes; B: would be to the script alone
    assert options["open-mode"] == "append"  # the log of the time before the requeue stays
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch reads none after the first command


# ---------------------------------------------------------------- Kubernetes

# Fields of the API, as far as the example uses that level: JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go), Job
# batch/v1, Pod core/v1 (kubernetes.io/docs/reference). One that is misspelt would be dropped or refused by the cluster.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
        "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies",
    },
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "spec.replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "activeDeadlineSeconds", "podFailurePolicy", "successPolicy", "backoffLimit",
        "backoffLimitPerIndex", "maxFailedIndexes", "selector", "manualSelector", "template", "completionMode",
        "ttlSecondsAfterFinished", "suspend", "podReplacementPolicy", "managedBy",
    },
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": {"action", "onExitCodes", "onPodConditions"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes": {"containerName", "operator", "values"},
    "spec.replicatedJobs.template.spec.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec.template.spec": {
        "restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "containers", "volumes", "hostNetwork",
        "dnsPolicy", "serviceAccountName", "priorityClassName", "tolerations", "subdomain", "initContainers",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers": {
        "name", "image", "workingDir", "command", "args", "ports", "resources", "env", "volumeMounts",
        "imagePullPolicy", "securityContext",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers.resources": {"requests", "limits", "claims"},
}  # fmt: skip


def unknown_fields(node: Any, path: str = "") -> list[str]:
    found = []
    for part in node if isinstance(node, list) else [node]:
        if isinstance(part, dict):
            names = FIELDS.get(path, part.keys())
            found += [f"{path}.{name}" for name in part.keys() - names]
            for name, below in part.items():
                found += unknown_fields(below, f"{path}.{name}".lstrip("."))
    return found


def test_the_jobset_has_the_fields_of_the_api_and_one_process_per_host():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown_fields(jobset) == []
    assert unknown_fields({"spec": {"replicatedJobs": [{"nam": "x"}]}}) == ["spec.replicatedJobs.nam"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"]
    slice_of = topologies.target(f"v5e:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}")
    assert job["parallelism"] == job["completions"] == math.ceil(slice_of.devices / chips)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert (ROOT / container["command"][1]).is_file()
    (rule,) = job["podFailurePolicy"]["rules"]
    fails = rule["onExitCodes"]
    assert (rule["action"], fails["operator"], fails["containerName"]) == ("FailJob", "In", container["name"])
    assert fails["values"] == [errors.REFUSED]  # after every other code the JobSet starts again
    options, overrides = configs.split(container["args"], ("config", "workdir", "config.KEY"))
    assert configs.load(options["config"], overrides).benchmark.name == "trace"  # a config that exists, with its keys
