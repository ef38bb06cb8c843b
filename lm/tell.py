"""A terminal to talk to a model: ``tinylab tell RUN``.

Type the beginning of a story and watch it continue; Enter continues it further. If the model's tokenizer has a chat
template, what you type is a message instead. Ctrl-C stops a story, Ctrl-D the program.
"""

import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace

import yaml

with suppress(ImportError):  # arrow keys at the prompt, if available
    import readline  # noqa: F401

from experiment.command_parser import CommandParser, one_line_errors
from experiment.console import console
from experiment.quiet import quiet_libraries
from experiment.runs.reading import find_checkpoint
from experiment.sources.paths import repaired, user_path
from experiment.wording import hint
from lm.decoding.generation import TextStream, stream
from lm.demo import LanguageModelDemo
from lm.model.config import GenerationConfig

HELP = """  any text       starts a story (with a chat template: sends a message)
  Enter          continues the story
  /temperature 0.7, /top_p 0.9, /seed 1, /max_new_tokens 300 …  change a setting; /settings shows all
  /new           starts a new story or conversation
  /help, /quit   or Ctrl-D; Ctrl-C stops a story"""
SETTINGS = [field.name for field in fields(GenerationConfig)]


class Terminal:
    """One conversation: the ids that the model has read and written, and the settings.

    Args:
        model: A model with its tokenizer.
        config: The initial settings.
    """

    def __init__(self, model: LanguageModelDemo, config: GenerationConfig) -> None:
        self.decoder, self.tokenizer, self.config = model.decoder, model.tokenizer, config
        self.told = 0  # stories since the seed was set, each with its own seed
        self.forget()

    def forget(self) -> None:
        self.ids: list[int] = []
        self.messages: list[dict[str, str]] = []

    def answer(self, line: str) -> bool:
        """Execute a line; False means quit.

        Raises:
            ValueError: An unknown setting, or a value out of range.
        """
        line = repaired(line).strip("\n")
        if line.startswith("/"):
            return self._command(*line[1:].partition(" ")[::2])
        if line.strip() and self.tokenizer.chat_template:
            self.messages.append({"role": "user", "content": line})
            self.ids = self.tokenizer.encode_chat(self.messages)
        elif line.strip():
            self.ids = self.tokenizer.encode_prompt(line)
            console.print(line, end="")
        elif not self.ids:
            console.print("type a beginning first, such as: Once upon a time")
            return True
        self._tell()
        return True

    def _command(self, name: str, value: str) -> bool:
        if name in ("quit", "exit"):
            return False
        if name == "new":
            self.forget()
            console.print("forgotten; type a new beginning", style="dim")
        elif name == "settings":
            for setting in SETTINGS:
                console.print(f"  {setting} {getattr(self.config, setting)}")
        elif name in SETTINGS:
            self.config, self.told = replace(self.config, **{name: _value(name, value)}), 0
            console.print(f"{name} is {getattr(self.config, name)}", style="dim")
        elif name == "help":
            console.print(HELP)
        else:
            near = hint(f"/{name}", [f"/{known}" for known in (*SETTINGS, "settings", "new", "help", "quit")])
            raise ValueError(f"/{name}: there is no such command or setting{near}; /help and /settings list them")
        return True

    def _tell(self) -> None:
        text, start = TextStream(self.tokenizer.decode, self.ids), time.perf_counter()
        before, ending = text.text, "stopped"
        config = replace(self.config, sliding_window=True, seed=self.config.seed + self.told)
        with suppress(KeyboardInterrupt):
            stories = stream(self.decoder, [self.ids], config, self.tokenizer.eos_id, self.tokenizer.decode)
            with closing(stories):
                for _, token, reason in stories:
                    console.print(text.add(token), end="")
                    ending = reason or ending
        seconds, told = time.perf_counter() - start, len(text.ids) - len(self.ids)
        self.ids, self.told = text.ids, self.told + 1
        if self.messages:
            self.messages.append({"role": "assistant", "content": self.tokenizer.decode(self.ids)[len(before) :]})
        how = {"eos": "the end", "length": "Enter continues", "stop": "a stop string"}.get(ending, "stopped")
        speed, cut = told / max(seconds, 1e-9), " …" if ending == "length" else ""
        console.print(f"{cut}\n({how}; {told} token{'s' * (told != 1)}, {speed:,.0f} a second)", style="dim")


def _value(name: str, value: str) -> object:
    try:
        found = yaml.safe_load(value)
        replace(GenerationConfig(), **{name: found})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        _, _, expected = str(error).rpartition(": ")
        raise ValueError(f"/{name} {value}: {expected}") from None
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = CommandParser("tinylab tell", __doc__)
    about = "folder of a run, or a checkpoint; by default runs/demo/lm"
    parser.add_argument("run", nargs="?", type=str, default="runs/demo/lm", help=about)
    with one_line_errors():
        run = parser.parse_args(args).run
    quiet_libraries()
    with one_line_errors(), console.status("loading"):
        terminal = Terminal(LanguageModelDemo(find_checkpoint(user_path(run))), GenerationConfig(temperature=0.8))
    chat = terminal.tokenizer.chat_template
    what = "a chat; type a message" if chat else "type the beginning of a story"
    console.print(f"{run}: {what} (/help lists more)")
    going = True
    while going:
        try:
            going = terminal.answer(input("> "))
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print("\n(/quit or Ctrl-D ends)")
        except ValueError as error:  # a setting; InputError is one
            console.print(str(error))
    console.print()


if __name__ == "__main__":
    main()
