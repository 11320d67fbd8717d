#!/bin/sh
# Both stages of one schedule, in pieces: run it again until it exits with 0; it goes on where it was stopped.
#   sh deploy/training/run.sh paper|short|cpu [SECONDS] [PYTHON]
# SECONDS is how long one piece may take (default 540). Needs torch, numpy and safetensors alone.
set -eu
schedule=${1:?expected paper, short or cpu} limit=${2:-540} python=${3:-python3}
ends=$(($(date +%s) + limit))
for stage in teacher student; do
    [ "$stage" = teacher ] && command=train || command=distill
    left=$((ends - $(date +%s)))
    [ "$left" -gt 0 ] || exit 4
    "$python" -m registration_engine.training_cli "$command" --config "deploy/training/$stage-$schedule.toml" \
        --time-limit "$left" || exit $?
done
