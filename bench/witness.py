"""Which model answered, by its server's own word, and whether it was its turn.

A server puts its service's name into each answer (`--alias`), and how many tokens it made of the
prompt: two models with unlike vocabularies make unlike numbers of it, whatever the headers say.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsup.drill.traffic import Record

TEXT = "Count the ships that sail from Antananarivo to Reykjavik."
DONE = b"data: [DONE]"


def question(route: str, *, is_stream: bool, max_tokens: int = 4) -> bytes:
    """A chat completion whose answer tells the number of its prompt's tokens."""
    body: dict[str, Any] = {
        "model": route,
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


@dataclass(frozen=True)
class Said:
    """What the server itself said: its service, and the number of tokens of the prompt."""

    service: str
    prompt_tokens: int


def heard(body: bytes) -> Said:
    """That of a whole answer or a whole stream. Raises ValueError where it is neither."""
    if not body.startswith(b"data: "):
        answer = json.loads(body)
        return Said(answer["model"], answer["usage"]["prompt_tokens"])
    lines = body.split(b"\n\n")
    if DONE not in lines:
        raise ValueError("the stream ends before it is done")
    chunks = [json.loads(x.removeprefix(b"data: ")) for x in lines if x.startswith(b"data: {")]
    told = [each["usage"]["prompt_tokens"] for each in chunks if each.get("usage")]
    if not told:
        raise ValueError("the stream does not tell its usage")
    return Said(chunks[-1]["model"], told[-1])


@dataclass(frozen=True)
class Turn:
    """From when on, and until when, a service may answer with a model (monotonic seconds)."""

    service: str
    model: str
    start: float
    end: float

    def overlaps(self, record: Record) -> bool:
        """Whether the request went on at a moment of it."""
        return record.sent_at <= self.end and record.answered_at >= self.start


def faults(
    records: Sequence[Record],
    route: Sequence[str],
    turns: Sequence[Turn],
    prompt_tokens: Mapping[str, int],
) -> Iterator[str]:
    """What is wrong with answers to requests for a route of these services, a line each."""
    for record in records:
        if record.failed:
            yield f"{record.status} {record.error}"
            continue
        try:
            told = heard(record.body)
        except (ValueError, KeyError) as error:
            yield f"no whole answer: {error}"
            continue
        if told.service != record.service:
            yield f"{told.service} answered, and the header says {record.service}"
        if record.is_fallback != (told.service != route[0]):
            yield f"{told.service} answered with x-llmsup-fallback: {record.is_fallback}"
        models = {
            turn.model for turn in turns if turn.service == told.service if turn.overlaps(record)
        }
        if told.prompt_tokens not in {prompt_tokens[model] for model in models}:
            others = [x for x, count in prompt_tokens.items() if count == told.prompt_tokens]
            yield f"{told.service} answered as {others or 'no known model'}, and not as {models}"
