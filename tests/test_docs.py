"""The pages that people read: their links lead somewhere, their prose fits a screen, what they name is there."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WIDTH = 100
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`]*`")

HISTORY = ROOT / "CHANGELOG.md"
"""Names modules that are gone too."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines, numbered from 1, that are not in a block of code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def too_wide(text: str) -> list[str]:
    """Returns the lines of prose over the width. Tables, headings and HTML are no prose; code and links cannot be broken."""
    return [
        f"line {number}: {line}"
        for number, line in without_code(text)
        if len(line) > WIDTH and not line.startswith(("|", "#", "<")) and " " in _unbreakable_as_words(line)
    ]


def _unbreakable_as_words(line: str) -> str:
    return _CODE.sub("x", _LINK.sub("x", line)).strip()


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    """Returns the links of a page, other than web addresses, that lead to no file or to no heading."""
    dead = []
    for target in _LINK.findall(_CODE.sub("x", "\n".join(line for _, line in without_code(page.read_text())))):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file.read_text()))):
            dead.append(target)
    return dead


def missing_modules(text: str) -> list[str]:
    """Returns the modules of this project that a page runs with `python -m` and that are not there."""
    named = set(re.findall(r"python -m ((?:trainer|eval|beam_jobs|pipelines)[\w.]*)", text))
    return sorted(one for one in named if importlib.util.find_spec(one) is None)


def missing_files(text: str) -> list[str]:
    """Returns the files of this project that a page names in code, by their path, and that are not there."""
    named = set(re.findall(r"`((?:trainer|eval|beam_jobs|components|pipelines|tests|requirements)/[\w./-]+\.\w+)`", text))
    return sorted(one for one in named if not (ROOT / one).exists())


@every_page
def test_every_link_of_the_pages_leads_somewhere(page):
    assert dead_links(page) == []


@every_page
def test_prose_fits_a_screen(page):
    assert too_wide(page.read_text()) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=lambda page: page.name)
def test_what_the_pages_name_is_there(page):
    text = page.read_text()
    assert missing_modules(text) == []
    assert missing_files(text) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Own\n[a](there.md) [b](there.md#a-heading-with-code) [c](#own) [d](https://example.com/x)\n"
        "![e](gone.png) [f](there.md#another) [g](#gone)\n"
    )
    assert dead_links(page) == ["gone.png", "there.md#another", "#gone"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("word " * 20, False),
        ("word " * 21, True),
        ("`code " + "word " * 21 + "`:", False),
        (f"[{'word ' * 21}](there.md)", False),
        ("See `code " + "word " * 21 + "`.", True),
        ("    " + "word " * 21, False),
        ("| " + "word " * 21 + "|", False),
        ("```\n" + "word " * 21 + "\n```", False),
        ("```\n```\n" + "word " * 21, True),
    ],
)
def test_a_line_is_too_wide_if_it_could_be_broken(line, found):
    assert bool(too_wide(line)) == found


def test_a_module_or_file_that_is_gone_is_found():
    text = "python -m beam_jobs.inspect_dataset DATA, python -m beam_jobs.looking, `trainer/config.py`, `trainer/gone.py`"
    assert missing_modules(text) == ["beam_jobs.looking"]
    assert missing_files(text) == ["trainer/gone.py"]
