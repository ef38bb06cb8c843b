"""Before the slow imports: the program sets its allocators up, a user's own settings win, and Ctrl-C is quiet."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from pathlib import Path
from experiment import startup

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) >> 10

startup.set_up_allocators()
if "divided" in sys.argv:
    startup.give_back_large_blocks()
before, block = resident(), bytearray(b"x") * (64 << 20)
del block
print(resident() - before, os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""


def outcome(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """MiB that stay with the process after it has freed 64, and two variables as it leaves them."""
    ours = ("MALLOC_", "PYTORCH_", "THP_", "GLIBC_", "LD_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=plain | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    kept, *variables = done.stdout.split()
    return int(kept), *variables


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_for_the_next_batch_unless_the_user_has_set_the_allocator() -> None:
    assert outcome() == (pytest.approx(64, abs=8), "expandable_segments:True", "1")
    assert outcome(MALLOC_ARENA_MAX="1")[0] < 16
    assert outcome(PYTORCH_ALLOC_CONF="max_split_size_mb:64")[1] == "max_split_size_mb:64"
    assert outcome(PYTORCH_CUDA_ALLOC_CONF="backend:native", THP_MEM_ALLOC_ENABLE="0")[1:] == ("None", "0")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back_where_weights_are_divided_among_processes() -> None:
    assert outcome("divided")[0] < 16
    assert outcome("divided", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**30))[0] == pytest.approx(64, abs=8)


INTERRUPTED = """
import os, signal, sys, time

class Interrupt:
    def find_spec(name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.meta_path.insert(0, Interrupt)
from tinylab.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "arguments", ["lm.cli lm fit", "classify.cli classify fit", "lm.tell tell", "lm.convert convert"]
)
@pytest.mark.parametrize("resume", ["", "make demo"])
def test_interrupt_while_modules_are_imported_ends_without_a_traceback(arguments: str, resume: str) -> None:
    env = os.environ | {"TINYLAB_RESUME": resume}
    command = [sys.executable, "-c", INTERRUPTED, *arguments.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=25)
    expected = "\ninterrupted; resume with\n  make demo\n" if resume else "\ninterrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, expected, "")


@pytest.mark.parametrize("words", ["lm fit", "classify fit", "tinylab tell", "tinylab lm fit"])
def test_python_without_the_libraries_is_told_to_set_them_up(words: str) -> None:
    root = Path(__file__).parents[2]
    plain = [sys.executable, "-S", "-m", *words.split()]
    done = subprocess.run(plain, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "make setup, then source .venv/bin/activate" in done.stderr
