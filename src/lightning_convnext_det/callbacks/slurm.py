"""Requeue a SLURM job after its training has been saved, and continue from that checkpoint.

Lightning 2.6 saves and requeues in its signal handler, in the middle of a step and on each rank by itself. Here the job
is requeued after the save that all ranks take part in. Lightning looks for ``hpc_ckpt_*.ckpt`` in the trainer's
``default_root_dir`` when it starts under SLURM without a ``ckpt_path``, so a link of that name leads to ``last.ckpt``.
"""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

_LINK = "hpc_ckpt_1.ckpt"


def requeue_signal(trainer: pl.Trainer) -> signal.Signals | None:
    """Return the signal by which SLURM asks to save and requeue; None outside SLURM or without auto-requeue."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue(trainer: pl.Trainer, checkpoint: str) -> str:
    """Requeue the SLURM job, from rank 0; it continues from a checkpoint.

    Returns:
        What came of it, for a message.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    job = f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if job else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"not requeued: SLURM_JOB_ID is '{job}'"
    _remember(trainer, checkpoint)
    try:
        run = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"job {job} is not requeued: scontrol cannot be run ({error.strerror})"
    said = " ".join(run.stderr.split())[:200]
    return f"job {job} is requeued" if run.returncode == 0 else f"job {job} is not requeued: scontrol says '{said}'"


def forget(trainer: pl.Trainer) -> None:
    """Remove the link to the checkpoint of a job that is complete."""
    link = Path(trainer.default_root_dir, _LINK)
    if link.is_symlink():
        with suppress(OSError):
            link.unlink()


def _remember(trainer: pl.Trainer, checkpoint: str) -> None:
    link = Path(trainer.default_root_dir, _LINK)
    if "://" in checkpoint:
        trainer.strategy.checkpoint_io.save_checkpoint(trainer.strategy.checkpoint_io.load_checkpoint(checkpoint), link)
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(checkpoint, link.parent))
