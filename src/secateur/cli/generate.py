"""``secateur generate``: run a model on one prompt."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.cli import console
from secateur.cli.options import Debug, Json, Model, Quiet, RunDevice, RunDtype


@dataclass
class Generated:
    """What ``secateur generate --json`` prints; ``text`` is the continuation without the prompt."""

    model: str
    prompt: str
    text: str

    def to_json(self) -> str:
        return json_format.dumps(vars(self), indent=2)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.", show_default=False)],
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template of the model.")] = False,
    device: RunDevice = "auto",
    dtype: RunDtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt."""
    said = console.Stream() if not json else None
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.generate import generate as run

        text = run(
            model,
            prompt,
            new_tokens=new_tokens,
            seed=seed,
            temperature=temperature,
            chat=chat,
            device=device,
            dtype=dtype,
            stream=None if said is None else said.write,
            reporter=reporter,
        )
    if json:
        console.write(Generated(model, prompt, text).to_json())
    elif said is not None:
        said.end(text)
