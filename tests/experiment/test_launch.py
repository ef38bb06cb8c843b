"""However they are started, processes that belong together agree on one folder."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Commands
from tests.runs import free_port, torchrun


def kubeflow() -> list[dict[str, str]]:
    """What a PyTorchJob sets for two processes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank)} for rank in range(2)]


def lsf() -> list[dict[str, str]]:
    """What jsrun sets for two tasks on one node; the job's number decides the port."""
    ranks = Path("ranks")
    ranks.write_text("batch\n" + 2 * f"{socket.gethostname()}\n")
    shared = {"LSB_JOBID": str(free_port()), "LSB_DJOB_RANKFILE": str(ranks.resolve()), "JSM_NAMESPACE_SIZE": "2"}
    return [shared | {"JSM_NAMESPACE_RANK": str(rank), "JSM_NAMESPACE_LOCAL_RANK": str(rank)} for rank in range(2)]


def by_hand() -> list[dict[str, str]]:
    """What one sets on each of two machines, on which Lightning then starts the other processes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"NODE_RANK": str(rank)} for rank in range(2)]


@pytest.mark.parametrize("launcher", [torchrun, kubeflow, lsf, by_hand], ids=lambda launcher: launcher.__name__)
def test_processes_agree_on_what_the_first_one_decides(
    launcher: Callable[[], list[dict[str, str]]], in_tmp: Path, commands: Commands
) -> None:
    first, second = commands.together(launcher(), package="tests.experiment.agreeing")
    assert first.wait() == second.wait() == 0, first.output + second.output
    said = [process.output.splitlines()[-1] for process in (first, second)]
    assert said == [f"process {first.pid} 7"] * 2


def test_processes_that_were_started_alone_decide_for_themselves(in_tmp: Path, commands: Commands) -> None:
    processes = commands.together([{}, {}], package="tests.experiment.agreeing")
    assert len({process.output.splitlines()[-1] for process in processes}) == 2


def test_a_port_that_is_taken_is_named(in_tmp: Path, commands: Commands) -> None:
    first, _ = torchrun()
    with socket.socket() as other:
        other.bind(("", int(first["MASTER_PORT"])))
        other.listen()
        refused = commands.start("fit", env=first)
        assert refused.wait() == 2, refused.output
    assert refused.output.splitlines()[-1] == (
        f"error: port {first['MASTER_PORT']} of 127.0.0.1 is in use: the processes need a free port to meet at; "
        "set another MASTER_PORT (torchrun: --master-port)"
    )
