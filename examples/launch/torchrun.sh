#!/bin/sh
# Several machines with torchrun: run this on each of them, with the same HEAD, an address of one of them.
#
#   HEAD=10.0.0.1 MACHINES=2 GPUS=8 examples/launch/torchrun.sh train.py --out_dir=/shared/run
#
# A run's folder and its text must be on a file system that all machines share. One machine needs no HEAD:
#
#   torchrun --nproc_per_node=8 train.py --out_dir=run
set -eu
exec torchrun \
    --nnodes="${MACHINES:-1}" \
    --nproc_per_node="${GPUS:-gpu}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv_id="${JOB:-lossmith}" \
    "$@"
