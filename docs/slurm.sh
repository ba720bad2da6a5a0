#!/usr/bin/env bash
#SBATCH --job-name=plainloop
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# sbatch docs/slurm.sh --config conf/adult.toml run.dir=/shared/runs/adult
#
# One torchrun a node. Five minutes before the time limit SLURM warns this shell: it passes SIGUSR1 to torchrun, which passes it
# to every rank; they save at the same step and leave, and the job goes back into the queue. A preempted job is requeued by SLURM.
set -u
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a node that comes back waits in vain for the others

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

save_and_requeue() {
  echo "time is nearly up: saving and requeueing"
  scancel --signal=USR1 "$SLURM_JOB_ID.0"   # step 0 is the srun below
  wait "$step"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap save_and_requeue USR1

# shellcheck disable=SC2016  # $SLURM_… are expanded on each node
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${PROCESSES:-gpu}" --max-restarts 2 \
  --signals-to-handle SIGTERM,SIGUSR1 --shutdown-timeout 240 \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$0:29400" \
  --rdzv_conf "is_host=$([ "$SLURM_NODEID" = 0 ] && echo 1 || echo 0)" --local_addr "$(hostname -i | cut -d" " -f1)" \
  train.py "$@"' "$host" "$@" &
step=$!
wait "$step"
