"""``tinylab play [RUN …]``: a page on this machine to try what runs have learned.

Each package brings its own tab, `lm.play` and `classify.play`; a run's checkpoint says which.
The page is local: it listens on 127.0.0.1 only and loads nothing from a network.
"""

import os
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.command_parser import CommandParser, one_line_errors
from experiment.console import console
from experiment.errors import InputError
from experiment.extras import require
from experiment.quiet import quiet_libraries
from experiment.sources.paths import user_path

if TYPE_CHECKING:
    import gradio as gr

HEAD = Path(__file__).with_name("play.html")
PORT = 7860
FONTS = ("system-ui", "-apple-system", "'Segoe UI'", "Roboto", "'DejaVu Sans'", "sans-serif")  # what the machine has


def newest_demo() -> list[Path]:
    """The runs of the newest `make demo` that has any.

    Raises:
        InputError: There is none.
    """
    for demo in sorted(Path("runs").glob("demo-*"), reverse=True):
        if runs := sorted(path.parent for path in demo.glob("*/checkpoints") if any(path.glob("*.ckpt"))):
            return runs
    raise InputError("there is no run of make demo in runs: run it first, or name the folder of another run")


def find_tabs(runs: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The checkpoints by package, in the order of PACKAGES, each under a unique name.

    Raises:
        InputError: A folder has no checkpoint, or one that no package knows.
    """
    from experiment.runs.reading import PACKAGES, find_checkpoint, package_of

    found: dict[str, dict[str, Path]] = {package: {} for package in PACKAGES.values()}
    names = [run.resolve().name for run in runs]
    for run, name in zip(runs, names, strict=True):
        checkpoint = find_checkpoint(run)
        found[package_of(checkpoint)][name if names.count(name) == 1 else str(run)] = checkpoint
    return {package: checkpoints for package, checkpoints in found.items() if checkpoints}


def open_page(runs: Sequence[Path], port: int | None = None) -> tuple["gr.Blocks", str]:
    """Serve the page, from threads of this process.

    Args:
        runs: Folders of runs, or checkpoints in them.
        port: On 127.0.0.1; by default the first free one from PORT.

    Returns:
        The page, which the caller closes, and its address.

    Raises:
        InputError: A run cannot be read, the port is taken, or Gradio is not installed.
    """
    require("gradio", "play")
    # Both are read when the libraries are imported. A run's base model was downloaded when it was trained.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Gradio checks that its own server is up; a proxy would look for it on the proxy's machine.
    for variable in ("no_proxy", "NO_PROXY"):
        os.environ[variable] = ",".join(filter(None, (os.environ.get(variable), "127.0.0.1", "localhost")))
    tabs = find_tabs(runs)
    import gradio as gr
    import torch

    torch.set_num_threads(1)  # visitors share the cores: several threads for each would only wait for each other
    # A readable gray for quiet text; the theme's own is too pale.
    quiet = dict.fromkeys(("body_text_color_subdued", "block_info_text_color"), "*neutral_500")
    with gr.Blocks(title="tinylab", analytics_enabled=False) as page:
        gr.HTML('<h1>tinylab</h1><p class="quiet">Try what the runs have learned.</p>', elem_classes="head")
        with gr.Tabs():
            for package, checkpoints in tabs.items():
                import_module(f"{package}.play").add_tabs(checkpoints)
    page.queue(default_concurrency_limit=max(2, os.cpu_count() or 1), max_size=100)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, quiet=True, footer_links=[],
            prevent_thread_lock=True, run_history=False, theme=gr.themes.Base(font=FONTS).set(**quiet), head_paths=HEAD,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"port {port or PORT} is in use: stop its program, or choose another with --port") from error
    return page, address


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = CommandParser("tinylab play", __doc__)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folders of runs; by default those of the newest make demo"
    )
    parser.add_argument("--port", type=int, help=f"port on 127.0.0.1; by default the first free one from {PORT}")
    with one_line_errors():
        options = parser.parse_args(args)
    quiet_libraries()
    with one_line_errors(), console.status("loading"):
        page, address = open_page([user_path(run) for run in options.runs] or newest_demo(), options.port)
    console.print(f"open {address} in a browser; Ctrl-C ends it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close()


if __name__ == "__main__":
    main()
