"""Chat templates: a conversation as the one text that its model was trained on."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ffnlab.errors import FormatError, require
from ffnlab.models.untrusted import quoted

__all__ = ["Message", "render"]

Message = Mapping[str, object]

CHILD = Path(__file__).with_name("chat_child.py")
MOST = 1 << 22  # characters of a conversation
MEMORY = 1 << 30  # bytes of address space
SECONDS = 4  # of computing
WAITING = 40  # seconds in all: the machine may be busy


def render(
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> list[str]:
    """Conversations as texts, by `transformers`' rules.

    Args:
      template: in Jinja's language; run in a process of its own, with limits on time and memory.
      conversations: messages of each, such as {"role": "user", "content": "Hello"}.
      tokens: special tokens by role, such as {"bos_token": "<s>"}.
      add_generation_prompt: end with what begins the model's answer.
    Returns:
      a text for each, special tokens included: it is encoded without more of them.
    Raises:
      FormatError: the template is damaged, refuses a conversation, or takes too long or too much.
      MissingExtraError: Jinja is not installed (extra `run`).
    """
    require("jinja2", extra="run")
    shared = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    shared |= tokens
    kept = [[{k: v for k, v in m.items() if v is not None} for m in c] for c in conversations]
    request = {
        "template": template,
        "variables": [{"messages": messages} | shared for messages in kept],
        "most": MOST,
        "memory": MEMORY,
        "seconds": SECONDS,
    }
    answer = ask(json.dumps(request))
    if "texts" not in answer:
        raise FormatError(f"the chat template fails: {quoted(answer.get('error'))}")
    return answer["texts"]


def ask(request: str) -> dict:
    """What the process answers."""
    command = [sys.executable, "-P", str(CHILD)]
    limits = f"{SECONDS} seconds or {MEMORY >> 20} MiB"
    options = {"capture_output": True, "text": True, "timeout": WAITING}
    try:
        done = subprocess.run(command, input=request, check=True, **options)
    except subprocess.SubprocessError as error:
        ending = "" if isinstance(error, subprocess.TimeoutExpired) else f": {error}"
        raise FormatError(f"the chat template takes more than {limits}{ending}") from None
    return json.loads(done.stdout)
