#!/bin/bash
# Train on four nodes of eight GPUs; submit with: sbatch examples/many_nodes.sh DATASET
#SBATCH --job-name=detector
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail
dataset=${1:?usage: sbatch examples/many_nodes.sh DATASET}

# each node reads and caches the annotations on a disk of its own: ranks of a node share the pages of that file
cache=${SLURM_TMPDIR:-/tmp}/annotations-$USER
srun --ntasks-per-node=1 mkdir -p "$cache"

# total batch: 4 nodes x 8 GPUs x 2 images; the learning rate follows from base_batch_size
srun convnext-det fit \
    --data.root "$dataset" \
    --data.cache "$cache" \
    --data.batch_size 2 \
    --data.num_workers 7 \
    --model.base_batch_size 16 \
    --trainer.num_nodes "$SLURM_NNODES" \
    --trainer.devices 8 \
    --trainer.precision bf16-mixed
