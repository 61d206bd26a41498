#!/usr/bin/env bash
# What `launch.sh tpu` runs on every worker of a pod: bash tpu_worker.sh RUN ARGS.
# The run is detached, so a connection that breaks does not end it; gcloud connects anew with the same RUN and finds it
# going on. Worker 0 prints the output of its run; another one only the end of it, where it failed. The last line tells
# launch.sh which worker this is and how it ended, because gcloud has one exit code for all of them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
run=$1 state=launches/$1
shift
# The number that JAX goes by too (jax/_src/clusters/cloud_tpu_cluster.py).
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
worker=$(curl -sf -H 'Metadata-Flavor: Google' "$metadata/agent-worker-number") || worker="?"

mkdir -p launches
if mkdir "$state" 2>/dev/null; then
    if [[ -e .hf_token ]]; then
        HF_TOKEN=$(<.hf_token)
        export HF_TOKEN
        rm .hf_token
    fi
    # shellcheck disable=SC2016  # expanded by the inner shell
    MORA_JAX_PLATFORM=tpu setsid bash -c 'bash launch.sh "$@" & echo $! >"$0/pid"; wait $!; echo $? >"$0/code"' \
        "$state" "$@" >"$state/log" 2>&1 </dev/null &
fi
until [[ -s $state/pid ]]; do sleep 0.1; done
[[ $worker != 0 ]] || tail -n +1 -s 0.2 -f --pid="$(<"$state/pid")" "$state/log"
until [[ -s $state/code ]]; do sleep 0.5; done
code=$(<"$state/code")
[[ $worker == 0 || $code == 0 ]] || tail -n 20 "$state/log" | sed "s/^/[worker $worker] /"
echo "$run worker $worker exit $code"
