"""`nox -s build` on a repository of two small packages with real tags: it takes what it says, and finds what is wrong.

The real repository is held to the same rules, as far as they are cheap: version, changelog, tag and requirements agree.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parents[2] / ".ci"))

import release
from releasing.agreement import commands_to_tag, disagreements, headings
from releasing.archives import build, differences_when_rebuilt, metadata_faults, sdist_faults, wheel_faults
from releasing.environments import sets_of
from releasing.repository import Repository
from releasing.sets import NoSetError

ROOT = Path(__file__).parents[2]
PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "tiny-{name}"
version = "{version}"
description = "A package of a test"
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
dependencies = [{needs}]
{more}
[tool.hatch.build.targets.wheel]
packages = ["src/tiny_{name}"]
"""
USER = """
[project.optional-dependencies]
room = ["tiny-base>=1.0,<2"]

[project.entry-points."tiny.things"]
thing = "tiny_user:thing"

[dependency-groups]
doctests = ["tiny-user[room]"]

[tool.house.rooms]
"tiny_user.room" = "room"
"""
IDENTITY = [
    word
    for setting in ("user.name=A test", "user.email=a@test", "commit.gpgsign=false", "tag.gpgsign=false")
    for word in ("-c", setting)
]


class Checkout:
    """A git checkout of two packages: tiny-base, released as 1.0 and at 1.1 now; tiny-user, which needs it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--quiet")
        self.package("base", "1.0", source="def old():\n    return 1\n")
        self.changelog("base", "1.0 (2030-01-01)")
        self.write(".gitignore", "__pycache__/\ndist/\n")
        self.commit()
        self.git("tag", "tiny-base-v1.0")
        self.package("base", "1.1", source="def old():\n    return 1\n\n\ndef new():\n    return 2\n")
        self.changelog("base", "1.1 (unreleased)", "1.0 (2030-01-01)")
        self.package("user", "0.1", source="thing = 1\n", needs='"tiny-base>=1.0,<2"', more=USER)
        self.write("packages/user/src/tiny_user/room.py", "import tiny_base\n\nvalue = tiny_base.old()\n")
        self.changelog("user", "0.1 (unreleased)")
        self.commit()

    def package(self, name: str, version: str, *, source: str, needs: str = "", more: str = "") -> None:
        folder = f"packages/{name}"
        self.write(f"{folder}/pyproject.toml", PYPROJECT.format(name=name, version=version, needs=needs, more=more))
        self.write(f"{folder}/README.md", f"# tiny-{name}\n\n```python\nimport tiny_{name}\n```\n")
        self.write(f"{folder}/LICENSE", "Apache-2.0\n")
        self.write(f"{folder}/src/tiny_{name}/__init__.py", source)
        self.write(f"{folder}/src/tiny_{name}/py.typed", "")
        self.write(f"{folder}/tests/test_it.py", "")

    def changelog(self, name: str, *lines: str) -> None:
        self.write(f"packages/{name}/CHANGELOG.md", "# Changes\n" + "".join(f"\n## {line}\n" for line in lines))

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def git(self, *words: str) -> None:
        # As the tool calls it: not in the checkout whose hook may have started the tests.
        Repository(self.root).git(*IDENTITY, *words)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=a test")

    def faults(self, name: str) -> str:
        repository = Repository(self.root)
        return "\n".join(disagreements(repository, repository.find(name)))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# ------------------------------------------------------------------------------------------------ agreement


def test_the_packages_of_this_repository_agree_with_their_changelogs_and_tags() -> None:
    repository = Repository(ROOT)
    assert repository.packages
    shallow = repository.git("rev-parse", "--is-shallow-repository", check=False).stdout.decode().strip()
    if shallow not in ("true", "false"):
        pytest.skip("these sources are no git checkout")
    faults = [line for package in repository.packages.values() for line in disagreements(repository, package)]
    if shallow == "true":  # as CI services clone: without the tags, of which `nox -s build` makes sure
        faults = [line for line in faults if "expected the tag" not in line]
    assert not faults, "\n".join(faults)


def test_headings_are_versions_with_a_date_or_none() -> None:
    found = headings("# Changes\n\n## 0.2.0rc1 (unreleased)\n\n- A thing.\n\n## 0.1.0 (2030-01-31)\n")
    assert [str(one.version) for one in found] == ["0.2.0rc1", "0.1.0"]
    assert [one.date and one.date.isoformat() for one in found] == [None, "2030-01-31"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Changes\n", "found no heading"),
        ("## 0.1.0\n", "expected ## <version>"),
        ("## 0.1.0 (soon)\n", "expected ## <version>"),
        ("## 0.1.0 (2030-02-31)\n", "day"),
        ("## one (unreleased)\n", "expected a version of PEP 440"),
        ("## 0.1.0-rc1 (unreleased)\n", "expected the version 0.1.0rc1"),
    ],
)
def test_a_heading_of_another_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        headings(text)


def test_a_repository_whose_parts_agree_has_no_disagreement(checkout: Checkout) -> None:
    assert checkout.faults("base") == ""
    assert checkout.faults("user") == ""


def _tag_the_candidate(checkout: Checkout) -> None:
    checkout.git("tag", "tiny-base-v1.1")


def _tag_a_wrong_commit(checkout: Checkout) -> None:
    checkout.changelog("base", "1.1 (2030-02-01)", "1.0 (2030-01-01)")
    checkout.git("tag", "tiny-base-v1.1", "tiny-base-v1.0")


def _lower_the_version(checkout: Checkout) -> None:
    checkout.replace("packages/base/pyproject.toml", '"1.1"', '"1.0"')
    checkout.changelog("base", "1.0 (2030-01-01)")


def _require_what_is_not_there(checkout: Checkout) -> None:
    checkout.replace("packages/base/pyproject.toml", "dependencies = []", 'dependencies = ["tiny-user>=0.2"]')


DISAGREEMENTS: dict[str, tuple[Callable[[Checkout], None], str]] = {
    "another version in the changelog": (
        lambda checkout: checkout.changelog("base", "1.2 (unreleased)", "1.0 (2030-01-01)"),
        "packages/base/CHANGELOG.md: expected 1.1 in its first heading, as in pyproject.toml, found 1.2",
    ),
    "an unreleased version with a tag": (
        _tag_the_candidate,
        "expected no tag for the unreleased 1.1, found tiny-base-v1.1",
    ),
    "a tag on a wrong commit": (_tag_a_wrong_commit, "tiny-base-v1.1: expected version 1.1 at its commit, found 1.0"),
    "an older version without a tag": (
        lambda checkout: checkout.changelog("base", "1.1 (unreleased)", "1.0 (2030-01-01)", "0.9 (2029-01-01)"),
        "expected the tag tiny-base-v0.9, as it has that heading, found none",
    ),
    "an older version without a date": (
        lambda checkout: checkout.changelog("base", "1.1 (unreleased)", "1.0 (unreleased)"),
        "expected a date for 1.0, below 1.1",
    ),
    "versions that rise": (
        lambda checkout: checkout.changelog("base", "1.1 (unreleased)", "1.0 (2030-01-01)", "1.0.1 (2029-01-01)"),
        "expected falling versions, found 1.0.1 below 1.0",
    ),
    "dates that rise": (
        lambda checkout: checkout.changelog("base", "1.1 (2029-12-31)", "1.0 (2030-01-01)"),
        "expected falling dates, found 2030-01-01 below 2029-12-31",
    ),
    "a tag without a heading": (
        lambda checkout: checkout.changelog("base", "1.1 (unreleased)"),
        "expected a heading for the tag tiny-base-v1.0, found none",
    ),
    "a version that is none": (
        lambda checkout: checkout.replace("packages/base/pyproject.toml", '"1.1"', '"1.1-final"'),
        "packages/base/pyproject.toml: expected a version of PEP 440, such as 0.2.0, found '1.1-final'",
    ),
    "no changelog": (
        lambda checkout: (checkout.root / "packages/base/CHANGELOG.md").unlink(),
        "expected packages/base/CHANGELOG.md, found none",
    ),
    "a requirement that refuses the candidate": (
        _require_what_is_not_there,
        "expected 'tiny-user>=0.2' to allow tiny-user 0.1, the version in this repository",
    ),
    "a module that tells another version": (
        lambda checkout: checkout.write("packages/base/src/tiny_base/__init__.py", '__version__ = "1.0"\n'),
        "packages/base/src/tiny_base/__init__.py: expected __version__ 1.1, found 1.0",
    ),
    "changes under a version that is released": (
        _lower_the_version,
        "expected a version above 1.0, since packages/base changed after tiny-base-v1.0, found 1.0",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_disagreement_is_found_and_named(checkout: Checkout, case: str) -> None:
    change, message = DISAGREEMENTS[case]
    change(checkout)
    assert message in checkout.faults("base")


# ------------------------------------------------------------------------------------------------ tags


def test_the_commands_of_a_release_are_printed_and_nothing_is_tagged(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.changelog("base", "1.1 (2030-02-01)", "1.0 (2030-01-01)")
    checkout.commit()
    assert release.main(["--tag", "base"], checkout.root) == 0
    assert capsys.readouterr().out.splitlines()[1:4] == [
        'git tag --annotate tiny-base-v1.1 --message "tiny-base 1.1"',
        "git push origin tiny-base-v1.1",
        "uv publish dist/tiny_base-1.1.tar.gz dist/tiny_base-1.1-py3-none-any.whl",
    ]
    assert set(Repository(checkout.root).tags("tiny-base")) == {"1.0"}


def test_what_is_not_ready_gets_no_commands(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--tag", "base"], checkout.root) == 1
    assert "expected a date for 1.1, found 'unreleased'" in capsys.readouterr().out
    checkout.changelog("base", "1.1 (2030-02-01)", "1.0 (2030-01-01)")
    assert release.main(["--tag", "base"], checkout.root) == 1
    assert "commit them first" in capsys.readouterr().out
    checkout.commit()
    checkout.git("tag", "tiny-base-v1.1")
    assert release.main(["--tag", "base"], checkout.root) == 1
    assert "tiny-base 1.1 is tagged already" in capsys.readouterr().out


def test_a_package_goes_out_after_those_it_asks_for(checkout: Checkout) -> None:
    checkout.replace("packages/user/pyproject.toml", "dependencies = ", 'dependencies = ["tiny-base>=1.1"] #')
    checkout.changelog("user", "0.1 (2030-02-01)")
    checkout.commit()
    repository = Repository(checkout.root)
    assert [package.name for package in repository.in_order()] == ["tiny-base", "tiny-user"]
    with pytest.raises(ValueError, match=r"tiny-base has no tag that 'tiny-base>=1\.1' allows: release it first"):
        commands_to_tag(repository, repository.find("user"))


# ------------------------------------------------------------------------------------------------ sets


def _chosen(checkout: Checkout) -> dict[str, str]:
    repository = Repository(checkout.root)
    sets = sets_of(repository, repository.find("user"))
    return {name: f"{one['tiny-base'].version} {one['tiny-base'].tag}" for name, one in sets.items()}


def test_the_lowest_set_is_of_tags_and_the_newest_of_the_working_tree(checkout: Checkout) -> None:
    assert _chosen(checkout) == {"lowest": "1.0 tiny-base-v1.0", "newest": "1.1 None"}


def test_one_set_where_lowest_and_newest_are_the_same(checkout: Checkout) -> None:
    checkout.replace("packages/user/pyproject.toml", ">=1.0,<2", ">=1.1,<2")
    assert _chosen(checkout) == {"lowest = newest": "1.1 None"}


def test_a_version_whose_own_requirements_cannot_be_met_is_passed_over(checkout: Checkout) -> None:
    checkout.package("base", "1.2", source="", needs='"tiny-other>=2"')
    checkout.package("other", "1.0", source="")
    checkout.replace("packages/user/pyproject.toml", "dependencies = ", 'dependencies = ["tiny-other"] + ')
    text = (checkout.root / "packages/user/pyproject.toml").read_text()
    checkout.write("packages/user/pyproject.toml", text.replace('["tiny-other"] + ["', '["tiny-other", "'))
    assert _chosen(checkout) == {"lowest = newest": "1.0 tiny-base-v1.0"}


def test_ranges_that_nothing_satisfies_are_named(checkout: Checkout) -> None:
    checkout.replace("packages/user/pyproject.toml", ">=1.0,<2", ">=3")
    with pytest.raises(NoSetError, match=r"satisfy tiny-base>=3 .* found none among tiny-base 1\.0, 1\.1"):
        _chosen(checkout)


def test_every_set_is_tried_and_what_breaks_there_is_named(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.write("packages/user/src/tiny_user/__init__.py", "from tiny_base import new\n\nthing = new()\n")
    example = "import tiny_user.room\n\nassert tiny_user.room.value + tiny_user.thing == 4\n"
    checkout.write("packages/user/README.md", f"# tiny-user\n\n```python\n{example}```\n")
    assert release.main(["tiny-user"], checkout.root) == 1
    out = capsys.readouterr().out
    assert "tiny-user: set lowest (tiny-base 1.0), alone: import tiny_user\n" in out
    assert "cannot import name 'new' from 'tiny_base'" in out
    # With 1.1 all imports work, that of the room included: 1 + 2 is not 4.
    assert "tiny-user: set newest (tiny-base 1.1), with tiny-user[room]: the first example" in out
    assert out.count("Traceback") == 2 + 1  # the module, and the entry point in it; then the example
    assert out.rstrip().endswith("not fit to be released: tiny-user (what is wrong stands above)")
    assert sorted(path.name for path in (checkout.root / "dist").iterdir()) == [
        "tiny_user-0.1-py3-none-any.whl",
        "tiny_user-0.1.tar.gz",
    ]


def test_what_agrees_is_green_in_the_table(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--agreement"], checkout.root) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["tiny-base", "1.1", "unreleased"],
        ["tiny-user", "0.1", "unreleased"],
    ]


def test_an_unknown_package_is_named(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["nothing"], checkout.root) == 2
    assert capsys.readouterr().out == "expected one of tiny-base, tiny-user, got 'nothing'\n"


# ------------------------------------------------------------------------------------------------ archives


def test_archives_that_lack_files_or_hold_others_are_found(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.root / "packages/base/src/tiny_base/py.typed").unlink()
    checkout.write("packages/base/notes.txt", "")
    hatch = '[tool.hatch.build.targets.sdist]\nexclude = ["tests"]\n'
    hatch += '[tool.hatch.build.targets.wheel.force-include]\n"notes.txt" = "tiny_base/notes.txt"\n'
    path = checkout.root / "packages/base/pyproject.toml"
    path.write_text(path.read_text() + hatch)
    repository = Repository(checkout.root)
    package = repository.find("base")
    archives = build(checkout.root / package.folder, tmp_path / "built", "1900000000")
    assert sdist_faults(repository, package, archives.sdist) == [
        "expected tests/test_it.py, which git holds, found it missing",
        "expected tests, found none: add them to packages/base",
    ]
    assert wheel_faults(repository, package, archives.wheel) == [
        "expected tiny_base/py.typed, found it missing",
        "expected no tiny_base/notes.txt: it is not below src",
    ]
    with zipfile.ZipFile(archives.wheel) as wheel:
        metadata = wheel.read("tiny_base-1.1.dist-info/METADATA").decode()
    readme = (checkout.root / "packages/base/README.md").read_text()
    assert metadata_faults(package, metadata, readme) == []
    assert metadata_faults(package, metadata.replace("Version: 1.1", "Version: 1.2"), "# Other\n") == [
        "METADATA: expected Version as in pyproject.toml: 1.1, found 1.2",
        "METADATA: expected description as in pyproject.toml: the text of README.md, found another",
    ]
    archives.wheel.write_bytes(archives.wheel.read_bytes() + b"\0")
    [difference] = differences_when_rebuilt(archives, tmp_path / "again", "1900000000")
    assert "expected tiny_base-1.1-py3-none-any.whl to be the same bytes" in difference


def test_versions_order_as_versions_and_not_as_text(checkout: Checkout) -> None:
    checkout.git("tag", "tiny-base-v1.0.10")
    checkout.git("tag", "tiny-base-v1.0.9")
    checkout.git("tag", "tiny-base-vnext")
    assert max(Repository(checkout.root).released("tiny-base")) == Version("1.0.10")
