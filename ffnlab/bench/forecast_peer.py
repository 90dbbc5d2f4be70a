"""The other side of a forecast's training step in `ffnlab bench graphs`: plain torch.

Run by `peer_server.py`. Requests and answers:

    {"do": "load", "directory": D, "threads": n} -> {"dtype", "threads", "versions"}
    {"do": "train", "rate": r}                   -> {"seconds", "form", "loss"}

D holds forecast.npz: parameters ("p." and their path; those of blocks have a leading axis), senders
and receivers of the three graphs, features of edges and nodes, the fields "x" and "y" [h, w, c]. A
step is one of SGD on the mean relative distance of the fields, from the given weights on.
"""

import pathlib

import numpy as np

BLOCKS = "layers.period[0]"


class Tasks:
    """Answers requests.

    Attributes:
      forms: finds the fastest way to do a task (`peer_server.Forms`).
    """

    def __init__(self, forms):
        self.torch, self.forms, self.learners = forms.torch, forms, {}

    def context(self):
        """In which requests are answered."""
        return self.torch.enable_grad()

    def load(self, directory, threads):
        """Reads the network and its fields."""
        self.forms.threads = threads
        with np.load(pathlib.Path(directory) / "forecast.npz", allow_pickle=False) as saved:
            self.arrays = {name: saved[name] for name in saved.files}
        versions = {"torch": self.torch.__version__}
        return {"dtype": "float32", "threads": threads, "versions": versions}

    def train(self, rate):
        """One step."""
        if not self.learners:
            self.learners = {
                name: Learner(self.torch, self.arrays, rate, name)
                for name in ("index_add_", "index_add_, compiled")
            }
        return self.forms.learned("train", self.learners, lambda learner: learner.step())


class Learner:
    """A network of its own and SGD."""

    def __init__(self, torch, arrays, rate, form):
        self.torch, self.rate = torch, rate
        self.heads = int(arrays["heads"])
        self.given = {
            name: torch.tensor(a, dtype=torch.int64 if a.dtype.kind == "i" else torch.float32)
            for name, a in arrays.items()
            if not name.startswith("p.") and name != "heads"
        }
        self.first = {n[2:]: torch.tensor(a) for n, a in arrays.items() if n.startswith("p.")}
        self.forward = torch.compile(self.loss) if form.endswith("compiled") else self.loss
        self.restart()

    def restart(self):
        """Goes back to the given weights."""
        self.p = {name: value.clone().requires_grad_() for name, value in self.first.items()}
        self.optimizer = self.torch.optim.SGD(list(self.p.values()), lr=self.rate)

    def step(self):
        """A step; the loss before it."""
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def linear(self, x, name, i=None):
        """x w + b of a map; of block i where it is one of the stack."""
        w, b = self.p[f"{name}.w"], self.p.get(f"{name}.b")
        w, b = (w, b) if i is None else (w[i], None if b is None else b[i])
        return x @ w if b is None else x @ w + b

    def norm(self, x, name, i=None):
        """Layer norm, where there is one."""
        scale, bias = self.p.get(f"{name}.scale"), self.p.get(f"{name}.bias")
        if scale is None or bias is None:
            return x
        scale, bias = (scale, bias) if i is None else (scale[i], bias[i])
        return self.torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias)

    def mlp(self, x, name, i=None):
        """Two maps, and a norm where there is one."""
        inner = f"{name}.mlp" if f"{name}.mlp.maps[0].w" in self.p else name
        h = self.torch.nn.functional.silu(self.linear(x, f"{inner}.maps[0]", i))
        return self.norm(self.linear(h, f"{inner}.maps[1]", i), f"{name}.norm", i)

    def edge(self, name, e, senders, receivers, ends, i=None):
        """An MLP on an edge and its two ends; nodes are multiplied before they are gathered."""
        s, r = ends
        h = self.linear(e, f"{name}.of_edge", i)
        h = h + self.linear(senders, f"{name}.of_sender", i)[s]
        h = h + self.linear(receivers, f"{name}.of_receiver", i)[r]
        h = self.torch.nn.functional.silu(h)
        return self.norm(self.linear(h, f"{name}.last", i), f"{name}.norm", i)

    def added(self, values, receivers, count):
        """Values of edges added up at their receivers."""
        return values.new_zeros(count, values.shape[1]).index_add_(0, receivers, values)

    def crossing(self, name, e, senders, receivers, ends):
        """Receivers after messages from the other side."""
        told = self.added(self.edge(f"{name}.edge", e, senders, receivers, ends), ends[1],
                          len(receivers))  # fmt: skip
        return receivers + self.mlp(self.torch.cat([told, receivers], 1), f"{name}.node")

    def block(self, i, e, x, ends):
        """A gated round of messages."""
        torch, (_, r) = self.torch, ends
        gate = torch.sigmoid(self.edge(f"{BLOCKS}.gate", e, x, x, ends, i)).mean(1, keepdim=True)
        e = e + self.edge(f"{BLOCKS}.edge", e, x, x, ends, i) * gate
        scores = self.mlp(e, f"{BLOCKS}.score", i)
        rows = r[:, None].expand_as(scores)
        top = scores.new_zeros(len(x), self.heads)
        top = top.scatter_reduce(0, rows, scores, "amax", include_self=False).detach()
        powers = torch.exp(scores - top[r])
        p = powers / self.added(powers, r, len(x))[r]
        weighed = (e[:, None] * p[..., None]).flatten(1)
        told = self.added(weighed, r, len(x))
        return e, x + self.mlp(torch.cat([told, x], 1), f"{BLOCKS}.node", i)

    def ends(self, name):
        """(senders, receivers) of a graph."""
        return self.given[f"{name}_senders"], self.given[f"{name}_receivers"]

    def loss(self):
        """Mean relative distance of the fields."""
        given = self.given
        grid = self.mlp(given["x"].flatten(0, 1), "of_grid")
        up, e, down = (self.mlp(given[f"{n}_edges"], f"of_{n}") for n in ("up", "mesh", "down"))
        x = self.crossing("up", up, grid, self.mlp(given["nodes"], "of_node"), self.ends("up"))
        grid = grid + self.mlp(grid, "keep")
        for i in range(len(self.p[f"{BLOCKS}.edge.last.w"])):
            e, x = self.block(i, e, x, self.ends("mesh"))
        found = self.mlp(self.crossing("down", down, x, grid, self.ends("down")), "last")
        y = given["y"].flatten(0, 1)
        return ((found - y).norm(dim=0) / y.norm(dim=0)).mean()
