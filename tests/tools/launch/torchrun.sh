#!/bin/bash
# my-run: 8 GPU(s), dp_replicate 4 x dp_shard 8. Written by amt launch.
#   bash THIS_FILE
# Look at: data.train is chats.jsonl

# Shared by all nodes: tokens are made once, models are downloaded once.
export AMT_CACHE="${AMT_CACHE:-$HOME/.cache/automodel_trainer}"
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
mkdir -p "$AMT_CACHE" "$HF_HOME"
# NCCL finds its network by itself. Where it picks a wrong one, name yours (`ip -brief address` lists them):
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0

# A crash starts all ranks again, 3 times, from the newest whole checkpoint. A signal saves, ends.
torchrun --standalone \
  --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 300 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m automodel_trainer fit --config /home/me/run.yaml --trainer.num_nodes 1 --trainer.devices 8 --ckpt_path auto &
torchrun=$!
for name in TERM INT USR1; do trap "kill -$name $torchrun" "$name"; done
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"
code=$?
# torchrun ends with 0 when a signal or max_time stopped the run. A file says so: 75, again.
if [ "$code" -eq 0 ] && [ -e 'runs/my $run'/requeue ]; then code=75; fi
exit "$code"
