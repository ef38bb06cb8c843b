"""How processes started by torchrun or a cluster agree on what only one of them can decide."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed
from lightning.fabric.plugins.environments import LSFEnvironment, MPIEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from experiment.errors import InputError

_PATIENCE = timedelta(minutes=10)  # the first process may have to read a large configuration from a slow disk
_store: TCPStore | None = None  # lives as long as the process, since others may still ask


def agreed(what: str, decide: Callable[[], str]) -> str:
    """The result of ``decide`` in the rank 0 process, in every process of this launch.

    A process that was started alone, or by Lightning as the first of several, decides for itself. Each thing to agree
    on has its own name, and every process asks for it.

    Raises:
        InputError: The rank 0 process cannot be reached.
    """
    place = _place()
    if place is None:
        return decide()
    rank, host, port, hosts_store, key = place
    global _store
    try:
        if _store is None:
            host_it = hosts_store and rank == 0
            # torch uses the same port later: in this process it will reuse this store.
            _store = TCPStore(
                host, port, is_master=host_it, wait_for_workers=False, timeout=_PATIENCE, multi_tenant=True
            )
        key = f"{key}/{what}"
        if rank == 0:
            choice = ""
            try:
                choice = decide()
            finally:
                _store.set(key, choice)  # empty if rank 0 found an error, which it reports
        else:
            choice = _store.get(key).decode()
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            f"port {port} of {host} is in use: the processes need a free port to meet at; set another "
            "MASTER_PORT (torchrun: --master-port)"
        ) from error
    except DistStoreError as error:
        raise InputError(f"process {rank} cannot reach the first process at {host}:{port}: give --run_dir") from error
    if not choice:
        sys.exit(2)
    return choice


def is_child() -> bool:
    """Whether Lightning started this process next to the first one of its machine, which decides everything."""
    return _place() is None and os.environ.get("LOCAL_RANK", "0") != "0"


def waited_in_vain(error: RuntimeError) -> str | None:
    """A one-line message if a collective failed because other processes did not join; None for other errors."""
    if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
        return None
    rank, world = rank_zero_only.rank, "several"
    if torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ours = [Path(__file__).parents[2] / package for package in ("experiment", "lm", "classify")]
    frames = traceback.extract_tb(error.__traceback__)
    *_, place = [frame for frame in frames if any(Path(frame.filename).is_relative_to(package) for package in ours)]
    return (
        f"process {rank} of {world} timed out waiting for another process in {place.name} ({Path(place.filename).name}:"
        f"{place.lineno}): {str(error).splitlines()[0]}; check the others for errors; to wait longer, set "
        "--trainer.strategy.init_args.timeout"
    )


def _place() -> tuple[int, str, int, bool, str] | None:
    """Rank, address of a store, whether rank 0 must open it, and a key of this launch; None if alone."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        open_already = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return int(env["RANK"]), env["MASTER_ADDR"], int(env["MASTER_PORT"]), not open_already, f"tinylab/{restart}"
    for environment in (SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        if environment.detect() and (cluster := environment()).world_size() > 1:
            return cluster.global_rank(), cluster.main_address, cluster.main_port, True, "tinylab"
    # Kubeflow numbers the processes; a user who starts one per machine, from which Lightning starts the others,
    # numbers the machines.
    number = env.get("RANK") or (env.get("NODE_RANK") if "LOCAL_RANK" not in env else None)
    if number is not None and "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return int(number), env["MASTER_ADDR"], int(env["MASTER_PORT"]), True, "tinylab"
    return None
