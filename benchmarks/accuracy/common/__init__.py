"""Shared by the training scripts: trainer, sampler, processes, checkpoints, log, options."""
