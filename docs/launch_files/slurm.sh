#!/bin/bash
#SBATCH --job-name=gtalign
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One task a GPU; srun tells every process how to find the others. Two minutes before the time is up SLURM sends
# SIGTERM: the run saves its state, and what is requeued goes on from there.
srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.train \
  --config=configs/qwen2_5_3b/full.py --config.data.root="$DATA" --workdir="$RUNS/full"
