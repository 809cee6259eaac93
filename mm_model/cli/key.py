"""`mm key`: who may ask the endpoint."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from mm_model.errors import ConfigError
from mm_model.serving.access import KeyScope, new_key, parse_keys


def make(name: str, scopes: str, file: Path | None) -> None:
    """Show a new key; write the line that the endpoint knows it by, or show that, too.

    Raises:
        ConfigError: the name or a scope is malformed, or the file holds the name already.
    """
    wanted = scopes.split(",")
    if not set(wanted) <= set(KeyScope):
        raise ConfigError("scopes of a key", got=scopes, allowed=", ".join(KeyScope))
    key, line = new_key(name, frozenset(map(KeyScope, wanted)))
    if file is None:
        typer.echo(f"for MM_API_KEYS, or a line of the file MM_API_KEYS_FILE:\n{line}\n")
    else:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        text = before + ("" if before.endswith("\n") or not before else "\n") + line + "\n"
        parse_keys(text, str(file))
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as written:
            written.write(text)
        typer.echo(f"written to {file}; the endpoint reads it when it starts\n")
    typer.echo(f"the key, shown this once; clients send it from MM_API_KEY:\n{key}")
