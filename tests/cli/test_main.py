"""How a command line ends: what is printed where, and with which exit code."""

import errno
import os
import subprocess
import sys

import click
import pytest

from genscale.cli.main import COMMANDS, commands, main


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def end(capsys):
    """Run a command line; the exit code, standard output and standard error."""

    def end(*words):
        with pytest.raises(SystemExit) as exit:
            main(words)
        return exit.value.code or 0, *capsys.readouterr()

    return end


def test_nothing_heavy_is_imported_for_the_help():
    program = (
        "import sys; from genscale.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pydantic', 'rich', 'numpy', 'pyarrow', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_python_interface_is_imported_on_use():
    program = "import sys, genscale; print('torch' in sys.modules, genscale.load_recipe('tiny').name, dir(genscale))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False tiny ['Recipe', 'Run', 'Store', 'UserError', '__version__', 'evaluate'")


def test_an_unknown_name_of_the_python_interface_is_an_attribute_error():
    import genscale

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        genscale.trian  # noqa: B018


def test_the_help_lists_every_command(end):
    code, out, _ = end("--help")
    assert code == 0
    assert all(f"\n  {name}" in out for name in COMMANDS)
    assert end()[:2] == (0, out)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_loads_and_has_help_of_its_own(name, end):
    assert isinstance(commands.get_command(click.Context(commands), name), click.Command)
    code, out, _ = end(name, "--help")
    assert code == 0
    assert f"Usage: genscale {name}" in out


def test_the_version(end):
    import genscale

    assert end("--version") == (0, f"genscale {genscale.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "genscale: no command 'trian', did you mean 'train'?"),
        (["data", "prepair"], "genscale data: no command 'prepair', did you mean 'prepare'?"),
        (["zzz"], f"genscale: no command 'zzz'; there are {', '.join(COMMANDS)}"),
        (["train"], "genscale train: Missing argument 'RECIPE'."),
        (["sample", "x", "--count", "0"], "genscale sample: Invalid value for '--count': 0 is not in the range x>=1."),
        (
            ["sample", "x", "--checkpoint", "b"],
            "genscale sample: Invalid value for '--checkpoint': expected best, last or the number of a step, found 'b'",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(words, message, end):
    assert end(*words) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "command", [["recipe", "show"], ["train"], ["data", "prepare"], ["demo"]], ids=lambda words: "-".join(words)
)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimiser.kind=adamw", "training.optimiser: unknown key, did you mean 'optimizer'?"),
        ("model.layers=four", "model.layers: expected a whole number, found 'four'"),
        ("model.heads=5", "model: heads (5) must divide width ({width}), or head_width be given"),
        ("layout.micro_batch=99", "layout.micro_batch (99 samples) is larger than training.batch ({batch} samples)"),
    ],
)
def test_a_recipe_mistake_is_one_line_and_exit_code_2_in_every_command(command, override, message, end):
    recipe = ["--only", "language"] if command == ["demo"] else ["tiny"]
    told = message.format(width=192, batch=8) if command == ["demo"] else message.format(width=256, batch=16)
    assert end(*command, *recipe, override) == (2, "", f"error: override '{override}': {told}\n")


def test_a_mistake_in_a_file_as_a_user_sees_it(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\ntraining:\n  optimiser:\n    kind: adamw\n")
    done = subprocess.run(
        [sys.executable, "-m", "genscale", "train", "x.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: x.yaml, line 3: training.optimiser: unknown key, did you mean 'optimizer'?\n"
    assert os.listdir(tmp_path) == ["x.yaml"]


def test_a_recipe_that_is_not_there(end):
    assert end("train", "tinny") == (2, "", "error: tinny: no such recipe, did you mean 'tiny'?\n")


@pytest.mark.parametrize("command", ["sample", "report", "evaluate"])
def test_a_folder_that_is_no_run(command, end):
    code, out, err = end(command, "runs/none")
    assert (code, out) == (2, "")
    assert err.startswith("error: runs/none is no run directory")
    assert err.count("\n") == 1


def failing(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("genscale.recipe.load.load_recipe", fail)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "tiny"], "interrupted; the same command goes on from here"),
        (["data", "prepare", "tiny"], "interrupted; the same command goes on from here"),
        (["recipe", "show", "tiny"], "interrupted"),
    ],
)
def test_ctrl_c_is_one_line_and_exit_code_130(words, line, end, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    code, out, err = end(*words)
    assert (code, out, err.strip()) == (130, "", line)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "", "runs/tiny/x"), "cannot write runs/tiny/x: the disk is full"),
        (OSError(errno.EROFS, "", "runs/tiny"), "cannot write runs/tiny: the file system is read-only"),
        (PermissionError(errno.EACCES, "", "stores/tiny/y"), "stores/tiny/y: permission denied"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line_with_the_path(error, message, end, monkeypatch):
    failing(monkeypatch, error)
    code, out, err = end("train", "tiny")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_fault_of_genscale_keeps_its_traceback(monkeypatch):
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["train", "tiny"])
    failing(monkeypatch, FileNotFoundError(errno.ENOENT, "", "x"))
    with pytest.raises(FileNotFoundError):
        main(["train", "tiny"])
