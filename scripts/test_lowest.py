"""Run the tests of the model libraries' use with the lowest versions that pyproject.toml allows.

Makes a virtual environment with exactly those versions of diffusers, transformers and what they load with. All other
libraries, torch among them, are those of the environment that this script runs in: nothing large is installed twice.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = ("diffusers", "transformers", "tokenizers", "huggingface-hub", "accelerate", "peft", "safetensors")
TESTS = (
    "tests/test_flux_adapter.py",
    "tests/test_wan_adapter.py",
    "tests/test_encodings.py",
    "tests/test_components.py",
    "tests/test_model_folders.py",
    "tests/test_start.py",
    "tests/test_clip_reward.py",
    "tests/test_pickscore_reward.py",
)


def lowest_pins(names: tuple[str, ...] = PINNED) -> list[str]:
    """Return ``name==version`` for the floors in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matches = [re.match(r"([\w-]+)>=([\w.]+)", each) for each in project["dependencies"]]
    floors = {match[1]: match[2] for match in matches if match}
    return [f"{name}=={floors[name]}" for name in names]


def make_environment(folder: Path) -> Path:
    """Install the pins into a virtual environment that sees this one's libraries after them; returns its Python."""
    venv.create(folder, with_pip=False, clear=True)
    python = folder / "bin" / "python"
    inside = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *lowest_pins()], check=True)
    here = sysconfig.get_path("purelib")
    (Path(inside) / "other_libraries.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
    return python


def main() -> None:
    """Make the environment, say what is in it, and run the tests; ends with their exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv" / "lowest", help="folder to make it in")
    parser.add_argument("tests", nargs="*", default=TESTS, help="what to run instead of the chosen files")
    arguments = parser.parse_args()
    python = make_environment(arguments.environment)
    print(*lowest_pins(), flush=True)
    for pin in lowest_pins():
        name, version = pin.split("==")
        code = f"from importlib.metadata import version; print(version({name!r}))"
        found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        if found.removesuffix(".0") != version.removesuffix(".0"):
            raise SystemExit(f"{name} {found} is imported, and {version} was to be")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "pytest", "-q", *arguments.tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
