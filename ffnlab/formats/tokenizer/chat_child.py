"""Renders chat templates in a process of its own, started by `ffnlab.formats.tokenizer.chat`.

A template is a program of whoever made the model. Jinja's sandbox keeps it from the machine, but
not from looping for ever or asking for gigabytes: the process has little memory, and little time
for each request. The environment is that of `transformers` (`utils/chat_template_utils.py`). Reads
JSON objects from standard input, one a line, and answers each with one; imports nothing of ffnlab,
so that it starts quickly.
"""

import datetime
import functools
import json
import math
import sys


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def strftime_now(format):
    """The date of today in templates."""
    return datetime.datetime.now().strftime(format)


def environment():
    """Where templates are run: an `ImmutableSandboxedEnvironment`."""
    from jinja2 import exceptions, ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """`{% generation %}` marks what a model says, for training, and changes no text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(utils.Namespace):
        """Without attributes that begin with an underscore: these lead into the interpreter."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            found = dict(*args, **kwargs)
            for name in found:
                allow(name)
            utils.Namespace.__init__(self, found)

        def __setitem__(self, name, value):
            allow(name)
            utils.Namespace.__setitem__(self, name, value)

    def allow(name):
        if isinstance(name, str) and name.startswith("_"):
            raise exceptions.SecurityError(f"attribute {name!r} of a namespace")

    def raise_exception(message):
        raise exceptions.TemplateError(message)

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    found.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": Namespace}
    return found


def render(template, variables: dict, most: int) -> str:
    """The text of one conversation, of a compiled template."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ValueError(f"more than {most} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=1)
def compiled(template: str):
    """A template; that of the request before is kept."""
    return environment().from_string(template)


def answer(request: dict) -> dict:
    """The texts of all conversations, or what went wrong."""
    try:
        template = compiled(request["template"])
        return {"texts": [render(template, v, request["most"]) for v in request["variables"]]}
    except Exception as error:  # noqa: BLE001 (a template may raise anything)
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def limit(memory: int, seconds: int) -> None:
    """Limits what the process takes in all, and what it computes from now on."""
    try:
        import resource
    except ImportError:  # on Windows the parent's clock is the limit
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(used.ru_utime + used.ru_stime) + seconds
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, until)):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def main() -> None:
    """Answers requests, one at a time."""
    for line in sys.stdin:
        request = json.loads(line)
        limit(request["memory"], request["seconds"])
        print(json.dumps(answer(request)), flush=True)


if __name__ == "__main__":
    main()
