#!/bin/bash
# my-run: 4 x 8 GPUs, dp_replicate 4 x dp_shard 8. Written by amt launch.
#   on every machine: HEAD=first-machine bash THIS_FILE

# Shared by all nodes: tokens are made once, models are downloaded once.
export AMT_CACHE="${AMT_CACHE:-/scratch/my cache/automodel_trainer}"
export HF_HOME="${HF_HOME:-/scratch/my cache/huggingface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
mkdir -p "$AMT_CACHE" "$HF_HOME"
# NCCL finds its network by itself. Where it picks a wrong one, name yours (`ip -brief address` lists them):
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0
: "${HEAD:?set HEAD to the name or address of the first machine}"

if [ -z "${AMT_INSIDE:-}" ]; then
  # This file runs again inside of the container.
  exec docker run --rm --init --gpus all --network host --ipc host --ulimit memlock=-1 \
    --env AMT_INSIDE=1 --env HEAD="${HEAD:-}" --env AMT_CACHE --env HF_HOME --env OMP_NUM_THREADS \
    --env NCCL_DEBUG --volume "$PWD:$PWD" --workdir "$PWD" \
    --volume "$AMT_CACHE:$AMT_CACHE" --volume "$HF_HOME:$HF_HOME" \
    --volume /home/me/run.yaml:/run.yaml:ro \
    --volume "$(realpath "$0"):/launch.sh:ro" org/image:1 bash /launch.sh
fi

# A node that was lost and is back must be told where the ranks meet. torchrun says so in the first round only,
# unless each round has a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A crash starts all ranks again, 3 times, from the newest whole checkpoint. A signal saves, ends.
torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint "$HEAD":29500 --rdzv-id my-run --rdzv-conf join_timeout=1800 \
  --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 300 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m automodel_trainer fit --config /run.yaml --trainer.num_nodes 4 --trainer.devices 8 --ckpt_path auto &
torchrun=$!
for name in TERM INT USR1; do trap "kill -$name $torchrun" "$name"; done
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"
code=$?
# torchrun ends with 0 when a signal or max_time stopped the run. A file says so: 75, again.
if [ "$code" -eq 0 ] && [ -e 'runs/my $run'/requeue ]; then code=75; fi
exit "$code"
