"""What a configuration says is what the options get."""

from pathlib import Path

import pytest

from experiment.errors import InputError
from experiment.sources.configurations import load_yaml, read_configuration


@pytest.mark.parametrize("text", ["[no, yes]", "- no\n- yes", "['no', \"yes\"]"])
def test_words_of_a_list_are_no_booleans(text: str) -> None:
    assert load_yaml(text) == ["no", "yes"]


def test_words_elsewhere_stay_what_yaml_says() -> None:
    text = "a: no\nnames: [On, off, x]\nb: {c: yes, d: [true, false, NO]}\n"
    assert load_yaml(text) == {"a": False, "names": ["On", "off", "x"], "b": {"c": True, "d": [True, False, "NO"]}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", "config broken.yaml is not YAML (line 2: "),
        ("a: 1\n\t- x\n", "config broken.yaml is not YAML (line 2: "),
        ("a: 1\x00", "config broken.yaml is not YAML ("),
        ("a: 1\nb: 2\na: 3\n", "config broken.yaml: a is given twice, in lines 1 and 3"),
        ("- a\n", "config broken.yaml holds \"['a']\""),
        ("", "config broken.yaml holds nothing"),
    ],
)
def test_file_that_is_no_configuration_is_named_with_the_line(in_tmp: Path, text: str, words: str) -> None:
    Path("broken.yaml").write_text(text)
    with pytest.raises(InputError) as refusal:
        read_configuration("broken.yaml")
    assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)
