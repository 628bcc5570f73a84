"""The manual says what the code does: generated parts, manual pages, and what the pages refer to."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from limitfs.cli import main
from limitfs.options import names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "man").glob("limitfs.*"))
TEXTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def test_generated_parts_are_up_to_date() -> None:
    # A process of its own: other tests may have told sources by now what this kernel has.
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_outdated_part_is_found(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs)
    (tmp_path / "limitfs").symlink_to(ROOT / "limitfs")
    page = docs / "pathname-space.md"
    page.write_text(page.read_text().replace("| `usage` |", "| `use` |"))
    done = subprocess.run(
        [sys.executable, docs / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "docs/pathname-space.md differs: run docs/generate.py\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manual_pages_are_clean(page: Path) -> None:
    done = subprocess.run(["mandoc", "-Tlint", page], capture_output=True, text=True, check=False)
    # Which other manual pages this machine has is not the page's fault.
    said = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert said == []


def test_there_are_manual_pages() -> None:
    assert [page.name for page in PAGES] == ["limitfs.5", "limitfs.8", "limitfs.d.5"]


def _commands() -> list[tuple[str, click.Command]]:
    assert isinstance(main, click.Group)
    # mount-helper is mount.limitfs(8).
    return sorted((name, command) for name, command in main.commands.items() if name != "mount-helper")


@pytest.mark.parametrize(("name", "command"), _commands(), ids=[name for name, _command in _commands()])
def test_the_manual_has_every_command_and_option(name: str, command: click.Command) -> None:
    page = (DOCS / "man/limitfs.8").read_text()
    assert f".It Cm {name}" in page
    for option in (p for p in command.params if isinstance(p, click.Option)):
        for word in option.opts:
            assert re.search(rf"^\.It Fl .*\b{re.escape(word.lstrip('-'))}\b", page, re.MULTILINE), word


def test_the_manual_has_every_mount_option() -> None:
    page = (DOCS / "man/limitfs.8").read_text()
    assert [name for name in names() if f".It Cm {name}" not in page] == []
    (listed,) = re.findall(
        r"^\.It Cm (allow_other , .*)$", (DOCS / "man/mount.limitfs.8").read_text(), re.MULTILINE
    )
    assert set(listed.split(" , ")) == {*names(), "noallow_other"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_links_lead_somewhere(text: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text.read_text())
    targets = {text.parent / link for link in links}
    assert [target for target in targets if not target.exists()] == []


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_files_and_tests_that_are_named_exist(text: Path) -> None:
    named = re.findall(r"`((?:limitfs|tests|docs|mount)/[\w./-]+)(?:::(\w+))?`", text.read_text())
    missing = [path for path, _test in named if not (ROOT / path).exists()]
    missing += [
        f"{path}::{test}"
        for path, test in named
        if test and (ROOT / path).is_file() and f"def {test}(" not in (ROOT / path).read_text()
    ]
    assert missing == []
