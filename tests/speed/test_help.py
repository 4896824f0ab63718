"""Command lines of the measuring scripts where only torch is installed."""

import json
import subprocess
import sys
from typing import Any

import pytest

BLOCKED = ("timm", "torchvision", "PIL", "matplotlib", "numpy", "tqdm")
# Each script with arguments that would start a measurement, and the extra that it needs.
SCRIPTS = {
    "benchmarks.speed.op": ([], "timm"),
    "benchmarks.speed.models": ([], "timm"),
    "benchmarks.speed.convert": ([], "timm"),
    "benchmarks.speed.gpu": ([], "timm"),
    "benchmarks.accuracy.recalibration": (["--photographs", "."], "test"),
}
PROGRAM = """
import contextlib, importlib, io, json, sys, warnings

warnings.simplefilter("ignore")  # torch warns that numpy is missing
blocked, commands = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(blocked))
results = {}
for script, arguments in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["script.py", *arguments]
        try:
            importlib.import_module(script).main()
            code = "no exit"
        except SystemExit as error:
            code = error.code
    results[" ".join([script, *arguments])] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Exit code, stdout and stderr of every command, in one process without optional packages."""
    commands = [(script, ["--help"]) for script in SCRIPTS]
    commands += [(script, arguments) for script, (arguments, _) in SCRIPTS.items()]
    program = [sys.executable, "-c", PROGRAM, json.dumps([BLOCKED, commands])]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_torch_alone(script: str, results: dict[str, Any]) -> None:
    code, out, err = results[f"{script} --help"]
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python -m {script} [-h]")
    assert "--json" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_package_is_one_line_with_the_extra(script: str, results: dict[str, Any]) -> None:
    arguments, extra = SCRIPTS[script]
    code, out, err = results[" ".join([script, *arguments])]
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"python -m {script}: error: ")
    assert "timm" in err
    assert f'pip install "simam[{extra}]"' in err
