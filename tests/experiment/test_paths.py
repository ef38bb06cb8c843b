"""Any text may stand where a file might, and none ends in a traceback."""

import pytest

from experiment.errors import InputError
from experiment.runs.reading import find_checkpoint
from experiment.sources.files import load_texts
from experiment.sources.paths import existing_file, user_path
from lm.data.tokenizer_files import load_tokenizer

NO_NAMES = ["I loved it. " * 400, "~ a classic", "~nobody-of-this-name/file", "nul\0"]


@pytest.mark.parametrize("text", NO_NAMES)
@pytest.mark.parametrize("read", [user_path, load_texts, load_tokenizer, lambda text: find_checkpoint(user_path(text))])
def test_what_is_no_name_of_a_file_is_refused_in_one_short_line(read, text: str) -> None:
    assert existing_file(text) is None
    with pytest.raises(InputError) as error:
        read(text, "train") if read is load_texts else read(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
