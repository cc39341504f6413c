"""What `cabochon serve` says before it reads a model."""

import socket

import pytest

from cabochon import cli_serve
from cabochon.errors import UserError


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(cli_serve.KEY_ENV, raising=False)
    assert cli_serve._key(None) is None
    monkeypatch.setenv(cli_serve.KEY_ENV, "from-env")
    assert cli_serve._key(None) == "from-env"
    (tmp_path / "key").write_text("from-file\n")
    assert cli_serve._key(tmp_path / "key") == "from-file"


@pytest.mark.parametrize("text", ["", "two words", "schlüssel", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused(tmp_path, text):
    (tmp_path / "key").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="expected one line of printable ASCII"):
        cli_serve._key(tmp_path / "key")
    with pytest.raises(UserError, match=r"--api-key-file .*nowhere: cannot be read"):
        cli_serve._key(tmp_path / "nowhere")


def test_a_taken_port_is_said_before_the_model_is_read():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="cannot be listened on"):
            cli_serve.serve("nowhere", port=other.getsockname()[1], api_key_file=None)


def test_a_missing_package_is_a_line_with_what_to_type(monkeypatch):
    monkeypatch.setattr(cli_serve, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"serving needs fastapi: pip install 'cabochon\[serve\]'"):
        cli_serve.serve("anything")
