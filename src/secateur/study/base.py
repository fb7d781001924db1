"""The dense classifier of a study with labels: the model, fine-tuned once for all studies that ask for the same"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from secateur.checkpoint.cache import build_once, cache_folder
from secateur.checkpoint.source import open_source
from secateur.progress import Reporter
from secateur.study.command import recover_flags
from secateur.study.quality import key_of, save_rows
from secateur.study.setup import Setup, open_model
from secateur.study.share import link_copy
from secateur.verbs.recover import recover


def write_texts(setup: Setup) -> None:
    """Put the labelled texts where trials, and the commands that are printed, find them."""
    texts = setup.texts
    for name, text in (("calibration", texts.calibration), ("choice", texts.choice), ("test", texts.test)):
        if texts.labelled:
            save_rows(setup.spec.texts_folder, name, text.text)


def with_base(setup: Setup, reporter: Reporter) -> Setup:
    """The same study on the model fine-tuned as it says; unchanged when it says nothing of it.

    The classifier is made in the cache, by the content of model and texts and by the settings, and linked into the
    folder of the study.
    """
    spec = setup.spec
    if spec.fine_tune is None:
        return setup
    settings = spec.lesson(spec.fine_tune)
    told = {**settings.to_dict(), "data": setup.texts.digests["calibration"]}
    name = f"base-{key_of(weights=setup.sha256, settings=told)}"
    folder = spec.out / name
    if not folder.is_dir():

        def build(partial: Path) -> None:
            reporter.note(
                f"{spec.model} is fine-tuned on {setup.texts.calibration.origin}: the dense model of all trials"
            )
            recover(
                spec.model, partial / "model", settings=settings, dense=True, evaluate=False, overwrite=True,
                reporter=reporter,
            )  # fmt: skip

        made = build_once(cache_folder() / "classifiers" / name, build) / "model"
        spec.out.mkdir(parents=True, exist_ok=True)
        link_copy(made, folder)
    opened = open_model(spec, open_source(folder, reporter=reporter), {})  # its head is another
    command = ["secateur", "recover", spec.model, "-o", name, "--dense", *recover_flags(settings), "--no-evaluate"]
    return dataclasses.replace(setup, **opened, model=str(folder), made_by=shlex.join(command))
