"""Chat templates: a conversation as the one text that its model was trained on."""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from ffnlab.errors import ConfigError, FormatError, require
from ffnlab.formats.untrusted import quoted

__all__ = ["Message", "Renderer", "render"]

Message = Mapping[str, object]

CHILD = Path(__file__).with_name("chat_child.py")
MOST = 1 << 22  # characters of a conversation
MEMORY = 1 << 30  # bytes of address space
SECONDS = 4  # of computing
WAITING = 40  # seconds in all: the machine may be busy
# Marks where the last message ends; templates that trim messages take the blank from it.
MARK, BLANK = "ffnlab-last-message-ends-here", " "


class Renderer:
    """The process that runs templates: started when needed, and anew where one has ended it.

    A context manager; one request at a time, from any thread.
    """

    def __init__(self):
        """Starts nothing yet."""
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._end is not None:
            self._end()
        self._running = None

    def ask(self, request: Mapping[str, object]) -> dict:
        """What the process answers to a request of `render`.

        Raises:
          FormatError: it ended instead, or took too long.
        """
        with self._lock:
            try:
                answer = self._exchange(json.dumps(request) + "\n")
            except BaseException:  # an answer that comes late must not be that of the next request
                self.close()
                raise
            if not answer:
                self.close()
                limits = f"{SECONDS} seconds or {MEMORY >> 20} MiB"
                raise FormatError(f"the chat template takes more than {limits}")
        return json.loads(answer)

    def _exchange(self, line: str) -> str:
        if self._running is None:
            self._running = subprocess.Popen(
                [sys.executable, "-P", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._end = weakref.finalize(self, end, self._running)
        running = self._running
        assert running.stdin is not None and running.stdout is not None
        alarm = threading.Timer(WAITING, running.kill)
        alarm.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                running.stdin.write(line)
                running.stdin.flush()
            return running.stdout.readline()
        finally:
            alarm.cancel()


def end(running: subprocess.Popen[str]) -> None:
    """Ends a process."""
    running.kill()
    with contextlib.suppress(OSError):  # it has not read everything
        running.communicate()


def render(
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    continue_last: bool = False,
    renderer: Renderer | None = None,
) -> list[str]:
    """Conversations as texts, by `transformers`' rules.

    Args:
      template: in Jinja's language; run in a process of its own, with limits on time and memory.
      conversations: messages of each, such as {"role": "user", "content": "Hello"}.
      tokens: special tokens by role, such as {"bos_token": "<s>"}.
      add_generation_prompt: end with what begins the model's answer.
      continue_last: end within the last message instead, for the model to go on with it.
      renderer: the process; without one another is started and ended.
    Returns:
      a text for each, special tokens included: it is encoded without more of them.
    Raises:
      ConfigError: both kinds of ending, or no last message to go on with.
      FormatError: the template is damaged, refuses a conversation, or takes too long or too much.
      MissingExtraError: Jinja is not installed (extra `run`).
    """
    require("jinja2", extra="run")
    shared = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    shared |= tokens
    kept = [[{k: v for k, v in m.items() if v is not None} for m in c] for c in conversations]
    if continue_last:
        kept = [marked(messages, add_generation_prompt) for messages in kept]
    request = {
        "template": template,
        "variables": [{"messages": messages} | shared for messages in kept],
        "most": MOST,
        "memory": MEMORY,
        "seconds": SECONDS,
    }
    with contextlib.ExitStack() as stack:
        answer = (renderer or stack.enter_context(Renderer())).ask(request)
    if "texts" not in answer:
        raise FormatError(f"the chat template fails: {quoted(answer.get('error'))}")
    return [unfinished(text) for text in answer["texts"]] if continue_last else answer["texts"]


def marked(messages: list[dict[str, object]], add_generation_prompt: bool) -> list[dict]:
    """Messages with the mark at the end of the last one."""
    content = messages[-1].get("content") if messages else None
    if add_generation_prompt or not isinstance(content, str):
        raise ConfigError(
            "continue_last needs a last message whose content is text, and add_generation_prompt "
            f"to be False; it is {add_generation_prompt}, the content {content!r}"
        )
    return [*messages[:-1], messages[-1] | {"content": content + MARK + BLANK}]


def unfinished(text: str) -> str:
    """A text up to the last mark in it; where messages are trimmed, without blanks before it."""
    before, mark, after = text.rpartition(MARK)
    if not mark:
        raise FormatError("the chat template leaves out the last message's content")
    return before if after.startswith(BLANK) else before.rstrip()
