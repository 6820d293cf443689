"""`make demo`: bring the demo profile up, kill its chat server under load, say what was measured.

Uses the home of the person who runs it and leaves the stack up for them to play with. Arguments go
to `llmsup start demo`.
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from bench.figures import line
from bench.models import gemma
from llmsup.config.paths import paths
from llmsup.control import client as control
from llmsup.control.wire import ServiceInfo, Status
from llmsup.drill.traffic import Client, Load, Record, chat_body
from llmsup.errors import LlmsupError

PROFILE = "demo"
CLIENTS = 4
QUIET_S = 3.0
BACK_TIMEOUT_S = 60.0
INTERRUPTED = 130
LLMSUP = str(Path(sys.executable).with_name("llmsup"))


def status() -> Status:
    return control.Client(paths()).status()


def service(name: str) -> ServiceInfo:
    return next(each for each in status()["services"] if each["service"] == name)


def answer_of(record: Record) -> str:
    if record.failed:
        return record.error
    choice = json.loads(record.body)["choices"][0]
    text = str(choice["text"] if "text" in choice else choice["message"]["content"])
    return " ".join(text.split())[:60]


async def show_answers(port: int) -> bool:
    """Ask each model once through the gateway; whether both answered."""
    client = Client("127.0.0.1", port)
    question, beginning = "What is 2 + 2?", "The colours of the rainbow are red,"
    chat = await client.ask(chat_body("chat", max_tokens=24, text=question))
    body = {"model": "code", "prompt": beginning, "max_tokens": 16, "temperature": 0}
    # Gemma is here as the base model: it completes text.
    code = await client.ask(json.dumps(body).encode(), "/v1/completions")
    await client.close()
    line(f"chat, asked: {question}", answer_of(chat))
    line("code, to complete: The colours …", f"… {answer_of(code)}")
    return not (chat.failed or code.failed)


async def usual_wait_s(port: int, model: str) -> float | None:
    """Median wait of a request for the model under the load of the test, nothing broken."""
    load = Load(port, chat_body(model), clients=CLIENTS)
    load.start()
    await asyncio.sleep(QUIET_S)
    waits = [record.wait_s for record in await load.finish()]
    return statistics.median(waits) if waits else None


async def kill_under_load(port: int) -> tuple[Load, float, float]:
    """Steady load, kill -9 of chat in the middle; returns the load and when what happened."""
    load = Load(port, chat_body("chat"), clients=CLIENTS)
    load.start()
    await asyncio.sleep(QUIET_S)
    victim = await asyncio.to_thread(service, "chat")
    assert victim["pid"] is not None
    print(f"\nkill -9 {victim['pid']} (chat), under {CLIENTS} clients that ask without a pause")
    killed_at = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    back_at = killed_at
    while back_at - killed_at < BACK_TIMEOUT_S:
        now = await asyncio.to_thread(service, "chat")
        back_at = time.monotonic()
        if now["state"] == "ready" and now["generation"] > victim["generation"]:
            break
        await asyncio.sleep(0.02)
    else:
        raise SystemExit("error: chat did not come back; see llmsup status")
    await asyncio.sleep(QUIET_S)
    await load.finish()
    return load, killed_at, back_at


def in_ms(wait_s: float | None) -> str:
    return "-" if wait_s is None else f"{wait_s * 1000:.0f} ms"


def report(load: Load, killed_at: float, back_at: float, code_wait_s: float | None) -> int:
    """Print what was measured; returns how many requests failed."""
    during = load.within(killed_at, back_at)
    before = [record.wait_s for record in load.records if record.answered_at < killed_at]
    failed = [record for record in load.records if record.failed]
    who = Counter(
        f"{record.service}{' (fallback)' if record.is_fallback else ''}" for record in during
    )
    line("requests", f"{len(load.records)}")
    line("failed", f"{len(failed)}")
    line("in flight at the kill", f"{len(load.within(killed_at, killed_at))}")
    waits = [record.wait_s for record in during]
    line("usual wait for chat", in_ms(statistics.median(before) if before else None))
    line("usual wait for code", in_ms(code_wait_s))
    line("longest wait around the kill", in_ms(max(waits, default=None)))
    line(
        "answered while chat was away",
        ", ".join(f"{count} by {name}" for name, count in who.most_common()) or "-",
    )
    line("chat back and ready after", f"{back_at - killed_at:.2f} s")
    for record in failed[:3]:
        line("failure", f"{record.status} {record.error}")
    return len(failed)


def how_to_go_on(listen: str) -> None:
    llmsup = os.path.relpath(LLMSUP)
    print(f"""
the stack is up; go on with
  curl http://{listen}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "chat", "messages": [{{"role": "user", "content": "hello"}}]}}'
  {llmsup} status
  {llmsup} logs chat -f
  {llmsup} stop""")


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        gemma()
        # Inherits the terminal: what it prints is part of the demo.
        code = subprocess.run([LLMSUP, "start", PROFILE, *sys.argv[1:]], check=False).returncode
    except KeyboardInterrupt:
        return INTERRUPTED  # llmsup start says what goes on
    if code:
        return code
    try:
        return break_and_measure()
    except KeyboardInterrupt:
        llmsup = os.path.relpath(LLMSUP)
        words = f"the stack stays up: {llmsup} status shows it, {llmsup} stop ends it"
        print(f"\n{words}", file=sys.stderr)
        return INTERRUPTED


def break_and_measure() -> int:
    try:
        listen = status()["gateway"]
        port = int(listen.rpartition(":")[2])
        print("\nboth models, through one endpoint")
        if not asyncio.run(show_answers(port)):
            return 1
        code_wait_s = asyncio.run(usual_wait_s(port, "code"))
        load, killed_at, back_at = asyncio.run(kill_under_load(port))
        failures = report(load, killed_at, back_at, code_wait_s)
    except LlmsupError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    how_to_go_on(listen)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
