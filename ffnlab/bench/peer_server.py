"""The other side of `ffnlab bench`: `transformers` on torch, in a process of its own.

Run as a file by an interpreter that has torch and transformers; ffnlab and jax need not be there.
One JSON object per line comes in on standard input, and one answer per line goes out:

    {"do": "load", "directory": D, "threads": n}        -> {"dtype", "form", "versions", "threads"}
    {"do": "prefill", "tokens": [[…]]}                  -> {"seconds", "tokens": [b]}
    {"do": "decode", "prompt": […], "new": n}           -> {"seconds", "tokens": [n], "form"}
    {"do": "evaluate", "rows": [[…]], "batch": b}       -> {"seconds", "nats"}

Each is done in the form that is fastest here: float32, `inference_mode`, SDPA attention, logits of
the last position only where no others are needed; for decoding, the first request tries
`generate` with a dynamic and a static cache and a plain loop over the dynamic one, and the fastest
is kept.
"""

import json
import sys
import time


class Server:
    """Answers requests."""

    def __init__(self):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.transformers = torch, transformers
        self.form = None

    def load(self, directory, threads):
        """Loads the model in float32."""
        self.torch.set_num_threads(threads)
        auto = self.transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(
            directory, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config = self.transformers.GenerationConfig()
        versions = {
            "torch": self.torch.__version__,
            "transformers": self.transformers.__version__,
        }
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {"dtype": dtype, "threads": self.torch.get_num_threads(), "versions": versions}

    def prefill(self, tokens):
        """Fills a cache with prompts and gives the most likely next tokens."""
        ids = self.torch.tensor(tokens)
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        best = out.logits[:, -1].argmax(-1)
        return {"seconds": time.perf_counter() - start, "tokens": best.tolist()}

    def decode(self, prompt, new):
        """Greedy continuation, prefill included."""
        ids = self.torch.tensor([prompt])
        forms = {
            "generate, dynamic cache": lambda: self.generate(ids, new, None),
            "generate, static cache": lambda: self.generate(ids, new, "static"),
            "plain loop, dynamic cache": lambda: self.loop(ids, new),
        }
        if self.form is None:
            seconds = {name: min(timed(run)[0] for _ in range(3)) for name, run in forms.items()}
            self.form = min(seconds, key=lambda name: seconds[name])
        seconds, tokens = timed(forms[self.form])
        return {"seconds": seconds, "tokens": tokens, "form": self.form}

    def generate(self, ids, new, cache):
        """By the library's own loop."""
        options = {} if cache is None else {"cache_implementation": cache}
        out = self.model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )
        return out[0, ids.shape[1] :].tolist()

    def loop(self, ids, new):
        """By the shortest loop there is."""
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        found = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(new - 1):
            out = self.model(found[-1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return self.torch.cat(found, 1)[0].tolist()

    def evaluate(self, rows, batch):
        """Sum of -ln p of every token but the first of each row."""
        ids = self.torch.tensor(rows)
        start, nats = time.perf_counter(), 0.0
        for part in ids.split(batch):
            logits = self.model(part[:, :-1], use_cache=False).logits
            nats += self.torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            ).item()
        return {"seconds": time.perf_counter() - start, "nats": nats}


def timed(run):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main():
    """Serves until standard input ends."""
    # The folder of this file is first on the path, and its modules are not meant to be found.
    del sys.path[0]
    server = Server()
    with server.torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(server, request.pop("do"))(**request)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
