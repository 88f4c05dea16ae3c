"""A bundle that was changed is refused, and told where; what cannot be told is said."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bundle import __main__ as command
from bundle import archive, contents, inventory
from bundle.archive import BadBundleError
from bundle.inventory import CannotCollectError
from bundle.small_repository import Change, Repository, edited, repository
from bundle.verify import Findings, verify
from report.read import read


@dataclass
class Made:
    """A certified run of the small repository, and its bundle."""

    repository: Repository
    folder: Path
    bundle: bytes
    ids: set[str]

    def verify(self, bundle: bytes, **more: Any) -> Findings:
        found = verify(bundle, self.repository.root, **more)
        print(*found.good, *found.open, *found.bad, sep="\n")
        return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With the suites of its commit collected for each question."""
    small = repository(tmp_path_factory.mktemp("bundle"))
    code, said, folder = small.run("--certified")
    assert code == 0, said
    assert "certificate: every check of a MUST holds; 1 of a SHOULD do not" in said
    data = read(folder)
    bundle = archive.pack(contents.of_run(folder, data))
    return Made(small, folder, bundle, {c["id"] for c in data["checks"]})


@pytest.fixture
def made(real: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """With what the suites have known."""
    monkeypatch.setattr(inventory, "of_commit", lambda *_, **__: set(real.ids))
    return real


def test_a_bundle_is_whole_unaltered_and_complete(real: Made) -> None:
    found = real.verify(real.bundle)
    assert (found.code, found.bad, found.open) == (0, [], [])
    assert [line.partition(":")[0] for line in found.good] == [
        "whole",
        "unaltered, as far as that shows",
        "complete",
        "certificate",
    ]
    assert len(real.ids) == 5, "with the thorough one"


@pytest.mark.thorough
def test_the_suites_of_the_commit_are_asked_not_those_of_today(real: Made) -> None:
    commit = read(real.folder)["run"]["commit"]
    real.repository.write("suites/conformance/test_new.py", "def test_new(): pass\n")
    try:
        found = inventory.of_commit(
            real.repository.root, commit, ["suites/conformance"], "gloo", thorough=False
        )
    finally:
        (real.repository.root / "suites/conformance/test_new.py").unlink()
    assert found == {i for i in real.ids if "test_more" not in i}


def test_the_same_run_makes_the_same_bytes(made: Made) -> None:
    again = archive.pack(contents.of_run(made.folder, read(made.folder)))
    assert again == made.bundle
    assert made.verify(again, expected=made.verify(made.bundle).digest).code == 0


def test_one_byte_changed_is_refused(made: Made) -> None:
    size = len(made.bundle)
    for place in {*range(0, size, 211), *range(size - 140, size)}:
        spoilt = bytearray(made.bundle)
        spoilt[place] ^= 1
        with pytest.raises(BadBundleError):
            archive.unpack(bytes(spoilt))
    for part in (made.bundle[:-1], made.bundle[1:], made.bundle + b"\0", b"", b"PK"):
        assert made.verify(part).code == 1


def test_a_changed_file_is_named_where_the_checksums_were_left(made: Made) -> None:
    files = archive.unpack(made.bundle)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped, zipfile.ZipFile(io.BytesIO(made.bundle)) as old:
        for name in old.namelist():
            content = files.get(name, old.read(name))
            zipped.writestr(name, content + b" " if "junit" in name else content)
        zipped.comment = made.bundle[-71:]
    (bad,) = made.verify(stream.getvalue()).bad
    assert bad.startswith("junit.xml was changed; its bytes are not those that its digest is of")


def removed(data: dict[str, Any]) -> None:
    data["checks"].pop(0)
    data["run"]["selected"] -= 1


def passes(data: dict[str, Any]) -> None:
    (check,) = (c for c in data["checks"] if "test_taste" in c["id"])
    check |= {"verdict": "pass", "message": ""}
    data["run"]["certificate"]["should"] = 0


def passes_on_all_ranks(data: dict[str, Any]) -> None:
    passes(data)
    for check in data["checks"]:
        for rank in check["ranks"]:
            rank |= {"fate": "passed", "message": "", "details": ""}


def faster(data: dict[str, Any]) -> None:
    data["checks"][0]["seconds"] += 0.1


def duplicated(data: dict[str, Any]) -> None:
    data["checks"].append(copy.deepcopy(data["checks"][0]))
    data["run"]["selected"] += 1


def unknown(data: dict[str, Any]) -> None:
    duplicated(data)
    data["checks"][-1]["id"] += "[more]"


def must(data: dict[str, Any]) -> None:
    for check in data["checks"]:
        check["level"] = "MUST"


def of_changes(data: dict[str, Any]) -> None:
    data["run"]["commit"] += "-dirty"


def of_another_torch(data: dict[str, Any]) -> None:
    data["run"]["torch"] = "9.9.9"


ALL = ("summary.json", "reports", "inventory.txt")
CASE = '<testcase classname="suites.conformance.test_small.TestIt" name="'
EDITS: dict[str, tuple[Change, tuple[str, ...], str]] = {
    "a check removed": (removed, (), "junit.xml: 5 tests, and results.json has 4 checks"),
    "a check removed, and from summary and inventory": (removed, ALL, "junit.xml: 5 tests"),
    "a result edited": (passes, (), "pass in results.json, failed in junit.xml"),
    "a result edited, and all ranks": (passes_on_all_ranks, ALL, "failed in junit.xml"),
    "a time edited": (faster, ALL, "s in junit.xml"),
    "a check twice": (duplicated, ALL, "is there 2 times"),
    "a check too many": (unknown, ALL, "1 checks of the bundle are none of commit"),
    "a level edited": (must, ALL, "the certificate is granted, though 1 checks of a MUST"),
    "another commit": (of_changes, ALL, "complete for no commit"),
    "another torch": (
        of_another_torch,
        (),
        "summary.json: not what results.json adds up to: results, run",
    ),
    "a result edited, not the summary": (passes_on_all_ranks, ("reports",), "summary.json"),
}


@pytest.mark.parametrize(("change", "also", "said"), EDITS.values(), ids=EDITS)
def test_an_edit_is_refused_though_the_checksums_were_made_again(
    made: Made, change: Change, also: tuple[str, ...], said: str
) -> None:
    found = made.verify(edited(made.bundle, change, *also))
    assert found.code == 1
    assert any(said in line for line in found.bad), found.bad
    assert found.good[0].startswith("whole")


def without_first_case(made: Made) -> tuple[str, str]:
    """What stands in junit.xml for the first check of the results, and nothing."""
    text = archive.unpack(made.bundle)["junit.xml"].decode()
    first = json.loads(archive.unpack(made.bundle)["results.json"])["checks"][0]["id"]
    start = text.index(f'{CASE}{first.rpartition("::")[2]}"')
    end = text.find("<testcase", start + 1)
    return text[start:end], ""


def test_a_check_removed_from_all_parts_is_missed_in_the_commit(made: Made) -> None:
    everywhere = edited(made.bundle, removed, *ALL, junit=without_first_case(made))
    found = made.verify(everywhere)
    assert [line.partition(":")[0] for line in found.bad] == ["incomplete"]
    assert found.code == 1


def test_what_was_edited_in_all_parts_only_a_digest_shows(made: Made) -> None:
    text = archive.unpack(made.bundle)["junit.xml"].decode()
    start = text.index("<failure")
    failure = text[start : text.index("</failure>") + len("</failure>")]
    forged = edited(made.bundle, passes_on_all_ranks, *ALL, junit=(failure, ""))
    assert made.verify(forged).code == 0, "a bundle has no signature"
    found = made.verify(forged, expected=made.verify(made.bundle).digest)
    assert found.code == 1
    assert "that was expected" in found.bad[0]


def refilled(made: Made, **changes: bytes | None) -> bytes:
    files = archive.unpack(made.bundle)
    for name, content in changes.items():
        full = next(n for n in files if n.startswith(name.replace("_", ".")))
        files.pop(full)
        if content is not None:
            files[full] = content
    return archive.pack(files)


def test_a_part_that_is_edited_or_gone_is_named(made: Made) -> None:
    junit = archive.unpack(made.bundle)["junit.xml"]
    head, body = junit.split(b"<testsuites", 1)
    bomb = head + b'<!DOCTYPE x [<!ENTITY a "aaaa">]><testsuites' + body
    results = archive.unpack(made.bundle)["results.json"]
    cases = {
        "report.txt: not what": refilled(made, report_txt=b"all is well\n"),
        "report.html: not what": refilled(made, report_html=b"<p>all is well\n"),
        "junit.xml: not as pytest": refilled(made, junit=bomb),
        "junit.xml: not XML": refilled(made, junit=junit[:-20]),
        "inventory.txt: 1 ids": refilled(made, inventory=b"a::b\n"),
        "summary.json: not what": refilled(made, summary=b"{}"),
        "it has no junit.xml": refilled(made, junit=None),
        "results.json: not JSON (a name is twice": refilled(
            made,
            results=results.replace(b'{"run"', b'{"run": {}, "run"').replace(
                b'{\n "run"', b'{"run": {},\n "run"'
            ),
        ),
        "results.json: not JSON (NaN": refilled(made, results=b'{"run": NaN}'),
        "results.json: not JSON (maximum": refilled(made, results=b"[" * 100_000),
        "results.json: at $": refilled(made, results=b'{"run": {}, "checks": []}'),
    }
    for said, bundle in cases.items():
        found = made.verify(bundle)
        assert any(line.startswith(said) for line in found.bad), (said, found.bad)
        assert found.code == 1


def zipped(write: Callable[[zipfile.ZipFile], None]) -> bytes:
    """A zip of any content, with a digest that fits."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        write(made)
        made.comment = b"-" * 71
    body = stream.getvalue()[:-71]
    return body + b"sha256:" + archive._sha256(body).encode()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "logs/../rank-1.log", "logs/../../x", "a\\b", "results.json/x", "x"],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(BadBundleError, match="a bundle holds no such file"):
        archive.unpack(zipped(lambda z: z.writestr(name, "x")))
    with pytest.raises(BadBundleError, match="a bundle holds no such file"):
        archive.pack({name: b""})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_no_bundle_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(made: zipfile.ZipFile) -> None:
        made.writestr("junit.xml", "a")
        made.writestr("junit.xml", "b")

    def large(made: zipfile.ZipFile) -> None:
        made.writestr("junit.xml", b"\0" * 5000)

    with pytest.raises(BadBundleError, match=r"junit.xml: it is there twice"):
        archive.unpack(zipped(twice))
    with pytest.raises(BadBundleError, match="it has no SHA256SUMS"):
        archive.unpack(zipped(large))
    monkeypatch.setattr(archive, "MOST_BYTES", 4000)
    with pytest.raises(BadBundleError, match="more than 4000 bytes"):
        archive.unpack(zipped(large))


def test_a_commit_that_is_not_here_leaves_it_open(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown_commit(*arguments: Any, **more: Any) -> set[str]:
        raise CannotCollectError("commit abc is not in the history of this checkout")

    monkeypatch.setattr(inventory, "of_commit", unknown_commit)
    found = made.verify(made.bundle)
    assert found.code == 3
    assert "--own-inventory takes the list in the bundle" in found.open[0]
    found = made.verify(made.bundle, own_inventory=True)
    assert found.code == 0
    assert any("complete by its own list of checks alone" in line for line in found.good)


def test_another_torch_that_collects_otherwise_leaves_it_open(made: Made) -> None:
    def change(data: dict[str, Any]) -> None:
        unknown(data)
        of_another_torch(data)

    bundle = edited(made.bundle, change, *ALL)
    found = made.verify(bundle)
    assert any("the run had torch 9.9.9" in line for line in found.open)


def test_only_commits_of_this_history_are_collected(real: Made) -> None:
    with pytest.raises(CannotCollectError, match="not in the history of this checkout"):
        inventory.of_commit(real.repository.root, "0" * 40, [], "gloo", thorough=True)


def test_the_command(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.zip"
    assert command.main([str(made.folder), "--out", str(file)]) == 0
    said = capsys.readouterr().out
    digest = said.split("sha256 ")[1].split()[0]
    file.write_bytes(file.read_bytes().replace(b"PK", b"pk", 1))
    assert command.main(["--verify", str(file), "--expect-digest", f"sha256:{digest}"]) == 1
    said = capsys.readouterr().out
    assert said.count("REFUSED") == 2
    for wrong in (["--verify", str(tmp_path / "none")], ["--expect-digest", "x"], ["--out"]):
        with pytest.raises(SystemExit) as caught:
            command.main(wrong)
        assert caught.value.code == 2
    assert command.main([str(tmp_path)]) == 3
