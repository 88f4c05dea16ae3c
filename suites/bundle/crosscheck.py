"""Whether the parts of a bundle say the same of each check: an edit of one of them shows here."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

from bundle.contents import logs, summary
from harness.records.verdicts import UNEXPECTED, Verdict
from harness.session import certified, results

_XML = b'<?xml version="1.0" encoding="utf-8"?><testsuites '
_KINDS = dict.fromkeys(UNEXPECTED, "failed") | {
    Verdict.PASS: "passed",
    Verdict.XFAIL: "skipped",
    Verdict.PRECONDITION: "skipped",
}
_SECONDS = 0.002
"""JUnit has milliseconds, results.json a tenth of one."""


def differences(files: dict[str, bytes], data: dict[str, Any]) -> Iterator[str]:
    """Each way in which the files contradict results.json, or results.json itself, in a line."""
    yield from _in_itself(data)
    yield from _of_junit(files["junit.xml"], data["checks"])
    yield from _of_summary(files["summary.json"], summary(files["results.json"], data))
    yield from _of_inventory(files["inventory.txt"], data)
    named = set(logs(data))
    for name in sorted(files):
        if name.startswith("logs/") and name not in named:
            yield f"{name}: no check of results.json has such a log"


def _in_itself(data: dict[str, Any]) -> Iterator[str]:
    run, checks = data["run"], data["checks"]
    for identity, count in Counter(c["id"] for c in checks).items():
        if count > 1:
            yield f"results.json: {identity} is there {count} times"
    if run["selected"] != len(checks):
        yield f"results.json: {run['selected']} checks were selected, and {len(checks)} are there"
    for check in checks:
        fates = {rank["fate"] for rank in check["ranks"]}
        holds = check["verdict"] in (Verdict.PASS, Verdict.XPASS)
        if holds and fates - {"passed"}:
            said = f"{check['verdict']}, though a rank {min(fates - {'passed'})}"
            yield f"results.json: {check['id']}: {said}"
    bad = [c for c in checks if c["verdict"] in UNEXPECTED]
    granted = run.get("certificate", {}).get("granted", False)
    if run["exit"] == 0 and bad and not granted:
        yield f"results.json: the run ended with 0, and {bad[0]['id']} is {bad[0]['verdict']}"
    if "certificate" in run:
        yield from _of_certificate(run, checks)


def _of_certificate(run: dict[str, Any], checks: list[dict[str, Any]]) -> Iterator[str]:
    stated = run["certificate"]
    again = certified.certificate(checks, [c["id"] for c in checks], run["exit"], "")
    if stated["granted"]:
        if not again["granted"]:
            yield f"results.json: the certificate is granted, though {again['refused'][0]}"
        if run["inventory"]["collected"] != len(checks) or run.get("left_out"):
            yield "results.json: the certificate is granted, though checks were left out"
        if any(c["expected"] for c in checks):
            yield "results.json: the certificate is granted, though failures were expected"
        if not re.fullmatch("[0-9a-f]{40}", run["commit"]):
            yield "results.json: the certificate is granted, though for no commit"
        if run["exit"]:
            yield f"results.json: the certificate is granted, though it ended with {run['exit']}"
    if (stated["should"], stated["profile"]) != (again["should"], again["profile"]):
        yield "results.json: the certificate does not say what its checks do"


def _of_junit(text: bytes, checks: list[dict[str, Any]]) -> Iterator[str]:
    if not text.startswith(_XML) or b"<!" in text:
        yield "junit.xml: not as pytest writes it"
        return
    try:
        cases = list(ET.fromstring(text).iter("testcase"))  # without a DTD there are no entities
    except ET.ParseError as error:
        yield f"junit.xml: not XML ({error})"
        return
    found = {(c.get("classname", ""), c.get("name", "")): c for c in cases}
    if len(cases) != len(checks) or len(found) != len(cases):
        yield f"junit.xml: {len(cases)} tests, and results.json has {len(checks)} checks"
    for check in checks:
        case = found.pop(_address(check["id"]), None)
        if case is None:
            yield f"junit.xml: it has no {check['id']}"
            continue
        kind = _KINDS[Verdict(check["verdict"])]
        if (said := _outcome(case)) != kind:
            yield f"{check['id']}: {check['verdict']} in results.json, {said} in junit.xml"
        elif not abs(_seconds(case) - check["seconds"]) <= _SECONDS:
            yield (
                f"{check['id']}: {check['seconds']} s in results.json, {case.get('time')} s in "
                "junit.xml"
            )
    for classname, name in found:
        yield f"junit.xml: {classname}.{name} is no check of results.json"


def _seconds(case: ET.Element) -> float:
    try:
        return float(case.get("time", "nan"))
    except ValueError:
        return math.nan


def _outcome(case: ET.Element) -> str:
    tags = {child.tag for child in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def _address(identity: str) -> tuple[str, str]:
    """Class and name in JUnit, as pytest writes them."""
    path, bracket, parameters = identity.partition("[")
    names = path.split("::")
    names[0] = re.sub(r"\.py$", "", names[0].replace("/", "."))
    return ".".join(names[:-1]), names[-1] + bracket + parameters


def _of_summary(text: bytes, again: bytes) -> Iterator[str]:
    if text == again:
        return
    try:
        stated = json.loads(text)
        parts = [name for name, one in json.loads(again).items() if stated[name] != one]
    except (ValueError, KeyError, TypeError):
        parts = []
    where = f": {', '.join(parts)}" if parts else ""
    yield f"summary.json: not what results.json adds up to{where}"


def _of_inventory(text: bytes, data: dict[str, Any]) -> Iterator[str]:
    run = data["run"]
    lines = text.decode(errors="replace").splitlines()
    if (again := results.inventory(lines)) != (text.decode(errors="replace"), run["inventory"]):
        stated = run["inventory"]["collected"]
        yield (
            f"inventory.txt: {again[1]['collected']} ids, not the {stated} that results.json has "
            "the digest of"
        )
    ids = {check["id"] for check in data["checks"]}
    for identity in sorted(ids - set(lines))[:3]:
        yield f"inventory.txt: {identity} is in results.json, and was not collected"
    missing = sorted(set(lines) - ids)
    if len(missing) != run.get("left_out", 0):
        yield (
            f"results.json: {len(missing)} collected checks have no verdict, as {missing[0]}, and "
            f"{run.get('left_out', 0)} were left out as thorough"
            if missing
            else f"results.json: {run['left_out']} checks were left out, and all have a verdict"
        )
