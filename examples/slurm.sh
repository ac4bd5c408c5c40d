#!/bin/bash
# A run on the GPUs of several nodes under Slurm; see docs/scale.md.
#
#     sbatch examples/slurm.sh my.toml DATA WORKSPACE
#
# DATA, WORKSPACE, the Python environment and the models are on a file system that all nodes share. If the job ends
# too early, submit it again with the same arguments: it continues from the units that are committed.
#SBATCH --job-name=hardbatch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail
manifest=$1 data=$2 workspace=$3
export RAY_USAGE_STATS_ENABLED=0

# This script runs on the first node, which becomes the head. `--block` keeps Ray within its job step.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}')
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE")
step=(srun --overlap --nodes=1 --ntasks=1)
"${step[@]}" --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$head" --port=6379 --include-dashboard=false "${resources[@]}" --block &
until ray status --address="$head:6379" > /dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
    "${step[@]}" --nodelist="$node" ray start --address="$head:6379" "${resources[@]}" --block &
done

# One worker for each GPU. A node that joins late is used as soon as it is there.
hardbatch run "$manifest" --data-root "$data" --workspace "$workspace" \
    --executor ray --ray-address "$head:6379" --workers $((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
