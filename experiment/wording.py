"""Text for users: errors of argparse and jsonargparse in plain words, and help."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from experiment.invocation import command

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}
KINDS |= {"collections.abc.Sequence": "a list"}
KIND = re.compile(rf"(typing\.)?Literal\[(?P<values>[^\]]*)\]|<class '(?P<name>{'|'.join(KINDS)})'>")
MEANINGS = {
    "loss": "mean cross-entropy in nats; lower is better",
    "perplexity": "exp(loss): as uncertain as a choice among so many equally likely tokens",
    "bits_per_byte": "bits to encode a byte of text; comparable across tokenizers",
    "accuracy": "share of the texts classified correctly",
    "f1": "mean over the classes of the harmonic mean of precision and recall",
}  # of an evaluation's metrics, without the split
COMMANDS_OF = {
    "lm": ("fit", "validate", "test", "predict"),
    "classify": ("fit", "validate", "test", "predict"),
    "convert": ("hugging_face", "llama2c", "gguf", "adapter", "import"),
    "board": ("add", "write", "repeat"),
}  # commands of the commands of tinylab
PROBLEM = r"Problem with given class_path '[^']*?(?P<name>\w+)': (?P<why>.*?)(?= - Expected a | Given value|$)"
PLAIN = r"(Does not validate against any of the Union subtypes Subtypes:)?( ?Expected a)?[\s\[\],.]*"


def reworded(message: str, options: Iterable[str] = ()) -> str:
    """The message as one line that names the option, its value and what was expected; others are unchanged.

    Args:
        message: Of argparse or jsonargparse.
        options: All options, ``--`` included, to suggest one for a typo.
    """
    message = " ".join(message.split())
    if found := re.search(
        r"Multiple subclasses with name (?P<name>\w+)\. .*? ambiguity: (?P<paths>[\w., ]+)\.(?= )", message
    ):
        return f"{found['name']}: several classes have this name; give the whole path: {found['paths']}"
    if found := re.search(PROBLEM, message):
        key = re.match(r'Parser key "(?P<key>[^"]+)"', message)
        return f"{key['key'] + ' ' if key else ''}{found['name']}: {found['why']}"
    if found := re.match(
        r'Parser key "(?P<key>.+?)": (?P<types>.*?Expected a .*) (Got|Given) value: (?P<value>.*)$', message
    ):
        types = re.sub("Errors:.*", "", found["types"])  # for a union, each type's own error
        if re.fullmatch(PLAIN, KIND.sub("", types)):  # only types in KINDS, no class that may say more
            return f"{found['key']} {found['value']}: expected {listed(_kinds(types))}"
    if found := re.match(r"unrecognized arguments: (?P<word>[^\s=]+)", message):
        if found["word"].startswith("-"):
            return f"{found['word']}: there is no such option{_near_option(found['word'], options)}; --help lists them"
        quotes = "put a value with spaces or quotes in single quotes"
        return f"{found['word']}: expected an option, such as --NAME VALUE ({quotes}); --help lists them"
    if found := re.search(r"(Group '(?P<group>[^']+)' )?does not accept option '(?P<key>[^']+)'", message):
        key = ".".join(filter(None, (found["group"], found["key"])))
        near = hint(f"--{key}", options).replace("--", "")
        return f"{key}: there is no such option{near}; --help lists them"
    if found := re.search(r"invalid choice: '(?P<word>.*)' \(choose from (?P<known>.*)\)", message):
        known = [word.strip(" '") for word in found["known"].split(",")]
        return f"{found['word']}: expected {listed(known)}{hint(found['word'], known)}"
    if found := re.search(r"to be one of {(?P<known>.*)}, but it was not provided", message):
        return f"no command is given: expected {listed(found['known'].split(','))}; --help explains them"
    if found := re.match(r"the following arguments are required: (?P<names>.*)", message):
        names = " and ".join(name.rpartition(".")[2] for name in found["names"].split(", "))
        return f"{names}: not given; --help explains them"
    if found := re.match(r"argument (?P<name>\S+): (expected one|invalid (?P<kind>\w+) value: '(?P<of>.*)')", message):
        value = "" if found["of"] is None else f" {found['of']}"
        return f"{found['name']}{value}: expected {KINDS.get(found['kind'], 'a value')}"
    if found := re.search(r"No supported (?P<kind>\w+) backend found", message):
        return (
            f"this machine has no {found['kind'].upper()} that PyTorch can use: leave configs/gpu.yaml out, "
            "or give --trainer.accelerator cpu"
        )
    return message


def _kinds(types: str) -> Iterable[str]:
    """Each type of a text such as ``typing.Literal['a', 'b'], <class 'int'>``, in words."""
    for found in KIND.finditer(types):
        if found["values"]:
            yield from (value.strip(" '") for value in found["values"].split(","))
        else:
            yield KINDS[found["name"]]


def listed(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def hint(word: str, known: Iterable[str]) -> str:
    """The closest known word, or one that starts with it, as a question in brackets; empty if there is none."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)]
    if len(near) != 1:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""


def _near_option(word: str, options: Iterable[str]) -> str:
    """As `hint`, but an option may also lack its group, as ``--max_steps``."""
    last = {option: option.rpartition(".")[2].lstrip("-") for option in options}
    begun = any(option.startswith(word) for option in last)
    if (part := word.lstrip("-")) not in last.values() or begun:
        if near := hint(word, last):
            return near
        part = next(iter(difflib.get_close_matches(part, last.values(), n=1, cutoff=0.75)), None)
    named = [option for option in last if last[option] == part]
    return f" (did you mean {listed(named)}?)" if named else ""


def hint_command(word: str, known: Iterable[str]) -> str:
    """As `hint`; for a command of a command, such as ``fit``, the whole of it."""
    groups = [group for group, commands in COMMANDS_OF.items() if word in commands and group in known]
    named = [command(f"{group} {word}") for group in groups]
    return f" (did you mean {listed(named)}?)" if named else hint(word, known)


def plain_help(text: str) -> str:
    """jsonargparse's help without docstring markup, repeated defaults, and the option for each
    group's own file, which --config replaces."""
    text = re.sub(r"^  --[\w.]+ CONFIG\s+Path to a configuration file\.\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s+Default:\s+\S+\.(?=\s+\(type:)", "", text)
    return re.sub(r"(:\w+:)?`+~?", "", text)


def as_called(text: str) -> str:
    """A text with its commands, such as ``tinylab lm``, rewritten by `command`."""
    return re.sub(r"(?<!/)(?<!-m )\btinylab (\w+)", lambda found: command(found[1]), text)


def unreadable_config(file: Path, error: OSError) -> str:
    """The message for a configuration that cannot be opened, with likely alternatives."""
    if not isinstance(error, FileNotFoundError):
        near = f" (did you mean {own}?)" if (own := file / "config.yaml").is_file() else ""
        return f"config {file} cannot be read ({error.strerror}){near}: expected a YAML file"
    runs = Path("runs").glob("*/*/config.yaml")
    others = sorted({*file.parent.glob("*.yaml"), *Path("configs").rglob("*.yaml"), *runs})
    named = [str(other) for other in others if file.name in (other.name, other.stem) and other.name != "config.yaml"]
    near = f" (did you mean {listed(named)}?)" if named else hint(str(file), map(str, others))
    return f"config {file} does not exist{near}: expected a YAML file"
