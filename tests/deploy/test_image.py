"""What the image is made of. Building it takes two minutes and the network (docs/install/README.md)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cni import install

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "deploy/image/Containerfile"


def steps() -> list[str]:
    """Return the steps, each on one line, without comments."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


def admitted() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_every_package_of_podwire_gets_into_the_image_and_no_test() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    folders = {name for name in admitted() if (ROOT / name).is_dir()}
    assert folders == packages
    assert {"pyproject.toml", project["project"]["readme"]} <= {*admitted()}


def test_all_that_is_admitted_is_there() -> None:
    assert [name for name in admitted() if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "step", [step for step in steps() if step.startswith("COPY") and "--from" not in step]
)
def test_what_is_copied_is_admitted(step: str) -> None:
    words = [word for word in step.split()[1:] if not word.startswith("--")]
    assert [name for name in words[:-1] if name not in (*admitted(), ".")] == []


def test_the_last_stage_has_no_compiler_and_the_first_has_hashes() -> None:
    at = [index for index, step in enumerate(steps()) if step.startswith("FROM")]
    first, last = steps()[at[0] : at[1]], steps()[at[1] :]
    assert any("--require-hashes -r requirements/runtime.txt" in step for step in first)
    assert not [word for step in last for word in step.split() if word in ("gcc", "pip", "python3-dev")]


def test_the_bundle_is_where_install_looks_for_it() -> None:
    assert any(step.endswith(f"scripts/bundle {install.BUNDLE}") for step in steps())
    assert any(
        step == f"COPY --from=build {install.BUNDLE.parent} {install.BUNDLE.parent}" for step in steps()
    )
