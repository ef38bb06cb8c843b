"""Processes that torchrun or SLURM start side by side agree on what only one of them can decide."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import DistStoreError, TCPStore

from experiment.errors import InputError

_PATIENCE = timedelta(minutes=10)  # the first process may have to read a large configuration from a slow disk
_store: TCPStore | None = None  # lives as long as the process, for others may still ask


def agreed(what: str, decide: Callable[[], str]) -> str:
    """What ``decide`` says in the process of rank 0, in every process of this launch.

    A process that was started alone, or by Lightning as the first of several, decides for itself. Each thing to agree
    on has a name of its own, and is asked for by every process.

    Raises:
        InputError: The process of rank 0 is not heard of.
    """
    place = _place()
    if place is None:
        return decide()
    rank, host, port, hosts_store, key = place
    global _store
    try:
        if _store is None:
            host_it = hosts_store and rank == 0
            _store = TCPStore(host, port, is_master=host_it, wait_for_workers=False, timeout=_PATIENCE)
        key = f"{key}/{what}"
        if rank == 0:
            choice = ""
            try:
                choice = decide()
            finally:
                _store.set(key, choice)  # nothing, where rank 0 has found an error and reports it
        else:
            choice = _store.get(key).decode()
    except DistStoreError as error:
        raise InputError(f"process {rank} has not heard of the first one at {host}:{port}: name --run_dir") from error
    if not choice:
        sys.exit(2)
    return choice


def leave_slurm_alone() -> None:
    """Within a SLURM job, be one process unless srun has started it.

    Lightning takes every process of a job for one of several tasks, and ends where the variables of srun are missing.
    """
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"  # by which Lightning tells such a process


def _place() -> tuple[int, str, int, bool, str] | None:
    """Rank, the address of a store, whether rank 0 must open it, and a key of this launch; None where alone."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        open_already = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        port = int(env["MASTER_PORT"]) + (0 if open_already else 1)
        return int(env["RANK"]), env["MASTER_ADDR"], port, not open_already, f"tinylab/{restart}"
    if SLURMEnvironment.detect() and int(env.get("SLURM_NTASKS", "1")) > 1:
        cluster = SLURMEnvironment()
        # Lightning's own store will take the port itself.
        return cluster.global_rank(), cluster.main_address, cluster.main_port + 1, True, "tinylab"
    return None
