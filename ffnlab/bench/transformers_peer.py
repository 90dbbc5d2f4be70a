"""The other side of `ffnlab bench` and `ffnlab bench train`: models of `transformers` on torch.

Run by `peer_server.py`. Requests and answers:

    {"do": "load", "directory": D, "threads": n}   -> {"dtype", "threads", "versions"}
    {"do": "prefill", "tokens": [[…]]}             -> {"seconds", "form", "tokens": [b]}
    {"do": "decode", "prompt": […], "new": n}      -> {"seconds", "form", "tokens": [n]}
    {"do": "evaluate", "rows": [[…]]}              -> {"seconds", "form", "nats"}
    {"do": "train", "rows": [[…]], "rate": r, "decay": d}
                                                   -> {"seconds", "form", "loss", "peak"}

Training is a step of AdamW (fused) from the weights of the directory on; "peak" is the largest
resident set of the process in bytes. Forms are eager and `torch.compile`; decoding is compiled over
a static cache. In all forms: float32, SDPA attention, and but for training `inference_mode`, with
logits of the last position only where no others are needed.
"""

import resource

ROWS_AT_A_TIME = (1, 4)


class Tasks:
    """Answers requests.

    Attributes:
      forms: finds the fastest way to do a task (`peer_server.Forms`).
    """

    def __init__(self, forms):
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.transformers, self.forms = forms.torch, transformers, forms
        self.learners = {}

    def context(self):
        """In which requests are answered."""
        return self.torch.inference_mode()

    def load(self, directory, threads):
        """Loads the model in float32."""
        self.forms.threads, self.directory = threads, directory
        auto = self.transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(
            directory, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config = self.transformers.GenerationConfig()
        self.compiled = self.torch.compile(self.model.forward, dynamic=False)
        versions = {
            "torch": self.torch.__version__,
            "transformers": self.transformers.__version__,
        }
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {"dtype": dtype, "threads": threads, "versions": versions}

    def prefill(self, tokens):
        """Fills a cache with prompts and gives the most likely next tokens."""
        ids = self.torch.tensor(tokens)

        def run(forward):
            return forward(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

        eager = {"eager": lambda: run(self.model)}
        return self.forms.fastest(
            "prefill", "tokens", eager, {"compiled": lambda: run(self.compiled)}
        )

    def decode(self, prompt, new):
        """Greedy continuation, prefill included."""
        ids = self.torch.tensor([prompt])
        eager = {
            "generate, dynamic cache": lambda: self.generate(ids, new),
            "plain loop, dynamic cache": lambda: self.loop(ids, new, self.model, None),
        }
        static = {
            "plain loop, static cache, compiled": lambda: self.loop(
                ids, new, self.compiled, self.static_cache(len(prompt) + new)
            )
        }
        return self.forms.fastest("decode", "tokens", eager, static)

    def evaluate(self, rows):
        """Sum of -ln p of every token but the first of each row."""
        ids = self.torch.tensor(rows)
        eager = {
            f"eager, {n} rows at a time": lambda n=n: self.nats(ids, n, self.model)
            for n in ROWS_AT_A_TIME
        }
        one = {"compiled, 1 row at a time": lambda: self.nats(ids, 1, self.compiled)}
        return self.forms.fastest("evaluate", "nats", eager, one)

    def train(self, rows, rate, decay):
        """One step on a batch."""
        with self.torch.inference_mode(False), self.torch.enable_grad():
            ids = self.torch.tensor(rows)
            if not self.learners:
                self.learners = {
                    name: Learner(self, rate, decay, compiled=name == "compiled")
                    for name in ("eager", "compiled")
                }
            answer = self.forms.learned("train", self.learners, lambda x: x.step(ids))
        return answer | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def generate(self, ids, new):
        """By the library's own loop."""
        out = self.model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return out[0, ids.shape[1] :].tolist()

    def static_cache(self, length):
        """An empty cache of a fixed length."""
        return self.transformers.StaticCache(config=self.model.config, max_cache_len=length)

    def loop(self, ids, new, forward, cache):
        """By the shortest loop there is; `forward` does the steps after the prompt."""
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for position in range(ids.shape[1], ids.shape[1] + new - 1):
            out = forward(
                found[-1],
                past_key_values=out.past_key_values,
                position_ids=self.torch.tensor([[position]]),
                use_cache=True,
            )
            found.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return self.torch.cat(found, 1)[0].tolist()

    def nats(self, ids, rows, forward):
        """Summed loss, some rows at a time."""
        total = 0.0
        for part in ids.split(rows):
            logits = forward(part[:, :-1], use_cache=False).logits
            total += self.torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            ).item()
        return total


class Learner:
    """A model of its own and AdamW."""

    def __init__(self, server, rate, decay, compiled):
        self.torch, self.options = server.torch, {"lr": rate, "weight_decay": decay}
        auto = server.transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(
            server.directory, dtype=self.torch.float32, attn_implementation="sdpa"
        ).train()
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.forward = self.torch.compile(self.model, dynamic=False) if compiled else self.model
        self.restart()

    def restart(self):
        """Goes back to the weights of the directory."""
        self.model.load_state_dict(self.start)
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), fused=True, **self.options)

    def step(self, ids):
        """A step; the loss before it."""
        logits = self.forward(ids[:, :-1], use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
