#!/bin/bash
# my-run: 4 x 8 GPUs, dp_replicate 4 x dp_shard 8. Written by amt launch.
#   sbatch THIS_FILE
#SBATCH --job-name=my-run
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=04:00:00
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300   # before the limit, and where the site sends it, before a preemption

# Shared by all nodes: tokens are made once, models are downloaded once.
export AMT_CACHE="${AMT_CACHE:-$HOME/.cache/automodel_trainer}"
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
mkdir -p "$AMT_CACHE" "$HF_HOME"
# NCCL finds its network by itself. Where it picks a wrong one, name yours (`ip -brief address` lists them):
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0

# Every rank is a task: the Trainer finds the others in Slurm's variables. SIGUSR1 saves, and queues this job
# again; max_time is below the limit by the time to start, so it saves first where no signal comes.
# A rank that dies is noticed by the others (Watchdog), so Slurm must not kill them: code 75 would be lost.
srun --kill-on-bad-exit=0 \
  amt fit --config /home/me/run.yaml --trainer.num_nodes 4 --trainer.devices 8 --trainer.max_time 00:03:50:00 --ckpt_path auto
code=$?
# 75: stopped by SIGTERM or max_time, to be started again. 0: done, or Slurm has queued it already.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
