"""The other side of `ffnlab bench`: another library, in a process of its own.

Run by an interpreter that has the library, as `python peer_server.py TASKS`; ffnlab and jax need
not be there. TASKS is a file with a class `Tasks`, a method for each kind of request
(`transformers_peer.py`, `graphs_peer.py`, `learning_peer.py`). One JSON object per line comes in on
standard input, {"do": method, …arguments}, and one answer per line goes out.

Each task is done in the form that is fastest here, found by trying at the first request for it:
eager forms with all threads and with one, then compiled ones (where there is a C++ compiler) with
the better number of threads.
"""

import json
import runpy
import sys
import time

TRIES = 3  # timed runs of a form, after one to warm up; the least counts


class Forms:
    """Ways to do a task, and which is the fastest.

    Attributes:
      torch: the library.
      threads: that torch may use.
      chosen: task -> (form, threads), of those asked for so far.
    """

    def __init__(self):
        import torch

        torch._dynamo.config.recompile_limit = 64  # one program per task and shape
        self.torch, self.threads, self.chosen = torch, 1, {}

    def fastest(self, task, key, eager, compiled):
        """The answer by the fastest form; the forms are tried at the first request of a task."""
        forms = eager | compiled
        if task not in self.chosen:
            seconds = self.tried(eager, sorted({1, self.threads}))
            _, threads = min(seconds, key=seconds.__getitem__)
            seconds |= self.tried(compiled, [threads])
            self.chosen[task] = min(seconds, key=seconds.__getitem__)
        name, threads = self.chosen[task]
        self.torch.set_num_threads(threads)
        seconds, result = timed(forms[name])
        return {"seconds": seconds, "form": f"{name}, threads: {threads}", key: result}

    def learned(self, task, learners, take):
        """What the fastest learner answers, with its "loss"; all begin anew after they were tried.

        learners: by form, each with `restart`; the name of a compiled one ends in "compiled".
        take: learner -> loss of what it is to learn.
        """
        eager = {name: lambda x=learner: take(x) for name, learner in learners.items()}
        compiled = {name: eager.pop(name) for name in learners if name.endswith("compiled")}
        if task not in self.chosen:
            self.fastest(task, "loss", eager, compiled)
            for learner in learners.values():
                learner.restart()
        return self.fastest(task, "loss", eager, compiled)

    def tried(self, forms, thread_counts):
        """Seconds of each form and number of threads; without those that cannot run here."""
        seconds = {}
        for threads in thread_counts:
            self.torch.set_num_threads(threads)
            for name, run in forms.items():
                try:
                    run()
                except RuntimeError as error:  # of torch.compile: no C++ compiler
                    print(f"{name}: {error}", file=sys.stderr)
                else:
                    seconds[name, threads] = min(timed(run)[0] for _ in range(TRIES))
        return seconds


def timed(run):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main(file):
    """Serves until standard input ends."""
    # The folder of this file is first on the path, and its modules are not meant to be found.
    del sys.path[0]
    tasks = runpy.run_path(file)["Tasks"](Forms())
    with tasks.context():
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(tasks, request.pop("do"))(**request)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
