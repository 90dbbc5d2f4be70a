"""Renders chat templates in a process of its own, started by `ffnlab.models.chat`.

A template is a program of whoever made the model. Jinja's sandbox keeps it from the machine, but
not from looping for ever or asking for gigabytes: the process has little memory and little time.
The environment is that of `transformers` (`utils/chat_template_utils.py`). Reads a JSON object from
standard input and writes one; imports nothing of ffnlab, so that it starts quickly.
"""

import contextlib
import datetime
import json
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


def answer(request: dict) -> dict:
    """The texts of all conversations, or what went wrong."""
    try:
        template = environment().from_string(request["template"])
        return {"texts": [render(template, v, request["most"]) for v in request["variables"]]}
    except Exception as error:  # noqa: BLE001 (a template may raise anything)
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    with contextlib.suppress(ImportError):  # not on Windows, where the parent's clock is the limit
        import resource

        for kind, limit in (("RLIMIT_AS", "memory"), ("RLIMIT_CPU", "seconds")):
            resource.setrlimit(getattr(resource, kind), (request[limit], request[limit]))
    json.dump(answer(request), sys.stdout)


if __name__ == "__main__":
    main()
