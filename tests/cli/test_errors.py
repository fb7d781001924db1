"""Every error is one line and a hint on stderr, nothing on stdout, and the exit status of its class."""

from __future__ import annotations

import inspect

import pytest

from secateur import errors


def classes():
    return [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.SecateurError) and value is not errors.UnknownNameError
    ]


def test_the_exit_codes_are_those_of_the_design():
    codes = {cls.__name__: cls.exit_code for cls in classes()}
    special = {"RunError": 1, "VerificationError": 3, "Interrupted": 130}
    assert len(codes) > 10
    assert all(code == special.get(name, 2) for name, code in codes.items())


@pytest.mark.parametrize("cls", classes())
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_error_is_one_line_a_hint_and_its_status(run, verb, cls, flags):
    def fail(reporter):
        raise cls("the cause [bold]with brackets[/bold] " + "and a long tail " * 20, hint="the mend")

    verb("inspect").during = fail
    result = run("inspect", "some-model", *flags)
    lines = result.err.splitlines()
    assert result.status == cls.exit_code
    assert result.out == ""
    assert len(lines) == 2
    assert lines[0].startswith("error: the cause [bold]with brackets[/bold] and a long tail")
    assert lines[1] == "hint: the mend"


def test_an_error_without_a_hint_is_one_line(run, verb):
    def fail(reporter):
        raise errors.SourceError("gone")

    verb("inspect").during = fail
    assert run("inspect", "m").err == "error: gone\n"


def test_a_bug_is_told_in_one_line_and_with_debug_in_full(run, verb):
    def fail(reporter):
        raise ZeroDivisionError("inside")

    verb("inspect").during = fail
    short, full = run("inspect", "m"), run("inspect", "m", "--debug")
    assert short.status == full.status == 1
    assert short.err.splitlines()[0] == "error: internal error: ZeroDivisionError: inside"
    assert "--debug" in short.err
    assert "Traceback" not in short.err
    assert "Traceback" in full.err
    assert full.err.splitlines()[-1] == "error: internal error: ZeroDivisionError: inside"


def test_debug_shows_the_traceback_of_a_user_error_too(run, verb):
    def fail(reporter):
        raise errors.SourceError("gone")

    verb("inspect").during = fail
    result = run("inspect", "m", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), errors.Interrupted("stopped", hint="go on with --resume")])
def test_ctrl_c_is_status_130_and_keeps_what_the_verb_says(run, verb, error):
    def fail(reporter):
        raise error

    verb("prune").during = fail
    result = run("prune", "m", "-o", "out")
    assert result.status == 130
    assert result.err.splitlines()[-2].startswith("error: ")
    if isinstance(error, errors.Interrupted):
        assert result.err.splitlines()[-1] == "hint: go on with --resume"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prune"], "MODEL"),
        (["prune", "m", "--sparsty", "0.5"], "--sparsity"),
        (["prune", "m", "--sparsity", "half"], "--sparsity"),
        (["prune", "m", "extra"], "extra"),
        (["prun", "m"], "prune"),
        (["generate", "m"], "--prompt"),
        (["generate", "m", "--prompt", "x", "--new-tokens", "0"], "--new-tokens"),
        (["prune", "m", "--sparsity", "1"], "[0, 1)"),
        (["prune", "m", "--sparsity", "nan"], "[0, 1)"),
        (["prune", "m", "--pattern", "4:2"], "4:2"),
        (["prune", "m", "--pattern", "2:4", "--sparsity", "0.7"], "0.7"),
        (["prune", "m", "--samples", "0"], "samples"),
        (["prune", "m", "--override", "*down*"], "*down*"),
        (["prune", "m", "--override", "*down*=1.5"], "1.5"),
        (["prune", "m", "--method-option", "damping"], "damping"),
        (["prune", "m", "--recipe", "no-such-file.yaml"], "no-such-file.yaml"),
        (["methods", "wandda"], "wandda"),
    ],
)
def test_bad_usage_is_status_2_and_starts_no_verb(run, verb, arguments, named):
    stand_ins = [verb(name) for name in ("prune", "generate", "inspect", "evaluate")]
    result = run(*arguments)
    lines = result.err.splitlines()
    assert result.status == 2
    assert result.out == ""
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert named in result.err
    assert not any(stand_in.calls for stand_in in stand_ins)


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.status == 0
    assert "prune" in result.out
