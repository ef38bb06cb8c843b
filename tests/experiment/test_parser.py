"""What a configuration says is what the options get."""

import pytest

from experiment.commands.parser import load_yaml


@pytest.mark.parametrize("text", ["[no, yes]", "- no\n- yes", "['no', \"yes\"]"])
def test_words_of_a_list_are_no_booleans(text: str) -> None:
    assert load_yaml(text) == ["no", "yes"]


def test_words_elsewhere_stay_what_yaml_says() -> None:
    text = "a: no\nnames: [On, off, x]\nb: {c: yes, d: [true, false, NO]}\n"
    assert load_yaml(text) == {"a": False, "names": ["On", "off", "x"], "b": {"c": True, "d": [True, False, "NO"]}}
