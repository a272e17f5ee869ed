import json

import pytest

from mechinterp.errors import UserError
from mechinterp.token_file import read_token_file


def test_sequences_are_read_as_they_are(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([[5, 7, 5, 7], [0]]))
    assert read_token_file(path) == [[5, 7, 5, 7], [0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[1, 2]", "is not JSON"),
        ("{}", "must hold a JSON list of lists of token ids"),
        ("[]", "must hold"),
        ("[[1], []]", "sequence 2 must be a list of token ids; found"),
        ("[[1], 3]", "sequence 2 must be a list of token ids; found 3"),
        ("[[1, 2.5]]", "sequence 1 holds 2.5, which is no token id"),
        ("[[true]]", "holds true"),
        ("[[1, -4]]", "holds -4"),
        ('[["a"]]', 'holds "a"'),
    ],
)
def test_anything_else_is_refused(tmp_path, text, says):
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_token_file(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such token file"):
        read_token_file(tmp_path / "none.json")
