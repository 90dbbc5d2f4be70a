"""The other side of `ffnlab bench learning`: torch's LSTM, and a loop over a small network.

Run by `peer_server.py`. Requests and answers:

    {"do": "load", "directory": D, "threads": n}     -> {"dtype", "threads", "versions"}
    {"do": "recurrent", "rate": r}                   -> {"seconds", "form", "loss"}
    {"do": "small", "steps": n, "rate": r}           -> {"seconds", "form", "loss"}
    {"do": "hypernetwork", "steps": n, "rate": r}    -> {"seconds", "form", "loss"}
    {"do": "forward_forward", "steps": n, "rate": r, "inner": k} -> {"seconds", "form", "loss"}
    {"do": "peak"}                                   -> {"peak"}, bytes of the largest resident set

D holds recurrent.npz ("x" [b, t, in], "target" [b, t, hidden], "w_input", "w_hidden", "b"),
small.npz ("x" [n, b, in], "labels" [n, b], "w0", "b0", "w1", "b1"), matrices as [in, out], and
alone.npz ("p0", "p1", "wrong" [steps + 1, b]). All learn from these weights on, by SGD: the first
takes a step on the mean squared error, and the loss is that before it; the second takes n steps on
the cross-entropy of the batches in turn, and the loss is that of the batch after them; so does the
third, whose layers learn alone, k steps each on a batch, from right and wrong classes written over
the first inputs. Forms are eager and `torch.compile`, and of the LSTM either order of batch and
time. All float32.

hypernetwork.npz ("task" [1, e], "pieces" [K, e], "w0", "b0", "w1", "b1") gives the small network's
weights in chunks, joined and cut: the biases and the matrix of a layer, then the next. It learns
from the same batches.
"""

import pathlib
import resource

import numpy as np

THETA = 4.0  # by which differences of goodness are multiplied


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
        """Reads what is learned from."""
        self.forms.threads, self.given = threads, {}
        for file in pathlib.Path(directory).glob("*.npz"):
            with np.load(file, allow_pickle=False) as saved:
                self.given[file.stem] = {k: self.torch.tensor(v) for k, v in saved.items()}
        versions = {"torch": self.torch.__version__}
        return {"dtype": "float32", "threads": threads, "versions": versions}

    def recurrent(self, rate):
        """One step of an LSTM."""
        if "recurrent" not in self.learners:
            self.learners["recurrent"] = {
                "batch first": Sequences(self.torch, self.given["recurrent"], rate, True),
                "time first": Sequences(self.torch, self.given["recurrent"], rate, False),
                "time first, compiled": Sequences(
                    self.torch, self.given["recurrent"], rate, False, compiled=True
                ),
            }
        return self.forms.learned("recurrent", self.learners["recurrent"], lambda x: x.step())

    def small(self, steps, rate):
        """Steps of a small network."""
        if "small" not in self.learners:
            self.learners["small"] = {
                name: Small(self.torch, self.given["small"], rate, compiled=name == "compiled")
                for name in ("eager", "compiled")
            }
        return self.forms.learned("small", self.learners["small"], lambda x: x.steps(steps))

    def hypernetwork(self, steps, rate):
        """Steps of a hypernetwork for the small network."""
        if "hypernetwork" not in self.learners:
            given = self.given["small"] | {"hyper": self.given["hypernetwork"]}
            self.learners["hypernetwork"] = {
                name: Generated(self.torch, given, rate, compiled=name == "compiled")
                for name in ("eager", "compiled")
            }
        return self.forms.learned(
            "hypernetwork", self.learners["hypernetwork"], lambda x: x.steps(steps)
        )

    def forward_forward(self, steps, rate, inner):
        """Steps in which the layers of a small network learn alone."""
        if "forward_forward" not in self.learners:
            given = self.given["small"] | self.given["alone"]
            self.learners["forward_forward"] = {
                name: Alone(self.torch, given, rate, inner, compiled=name == "compiled")
                for name in ("eager", "compiled")
            }
        learners = self.learners["forward_forward"]
        return self.forms.learned("forward_forward", learners, lambda x: x.steps(steps))

    def peak(self):
        """The largest resident set of this process so far."""
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Learner:
    """A network of its own and SGD."""

    def __init__(self, torch, network, rate, compiled):
        self.torch, self.network, self.rate = torch, network, rate
        self.start = {name: value.clone() for name, value in network.state_dict().items()}
        self.forward = torch.compile(network, dynamic=False) if compiled else network
        self.restart()

    def restart(self):
        """Goes back to the given weights."""
        self.network.load_state_dict(self.start)
        self.optimizer = self.torch.optim.SGD(self.network.parameters(), lr=self.rate, fused=True)

    def descend(self, loss):
        """A step."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Sequences(Learner):
    """An LSTM."""

    def __init__(self, torch, given, rate, batch_first, compiled=False):
        width, gates = given["w_input"].shape
        network = torch.nn.LSTM(width, gates // 4, batch_first=batch_first)
        with torch.no_grad():
            network.weight_ih_l0.copy_(given["w_input"].T)
            network.weight_hh_l0.copy_(given["w_hidden"].T)
            network.bias_ih_l0.copy_(given["b"])
            network.bias_hh_l0.zero_().requires_grad_(False)  # two biases are one, learned once
        pair = given["x"], given["target"]
        self.x, self.target = (
            part if batch_first else part.transpose(0, 1).contiguous() for part in pair
        )
        super().__init__(torch, network, rate, compiled)

    def step(self):
        """A step; the loss before it."""
        loss = self.torch.nn.functional.mse_loss(self.forward(self.x)[0], self.target)
        self.descend(loss)
        return loss.item()


class Small(Learner):
    """Two maps with a ReLU between them, in the loop of torch's tutorials."""

    def __init__(self, torch, given, rate, compiled):
        self.batches = list(zip(given["x"], given["labels"].long(), strict=True))
        self.position = 0
        super().__init__(torch, self.network_of(torch, given), rate, compiled)

    def network_of(self, torch, given):
        """The network, with the given weights."""
        return two_maps(torch, given)

    def restart(self):
        """Goes back to the given weights and the first batch."""
        super().restart()
        self.position = 0

    def steps(self, count):
        """Some steps; the loss of the batch after them."""
        for _ in range(count):
            self.descend(self.loss())
            self.position += 1
        return self.loss().item()

    def loss(self):
        """Of the batch that is next."""
        x, labels = self.batches[self.position % len(self.batches)]
        return self.torch.nn.functional.cross_entropy(self.forward(x), labels)


class Generated(Small):
    """A hypernetwork of two maps that gives the weights of one of two maps in chunks."""

    def network_of(self, torch, given):
        """See `Small`."""
        return hypernetwork(torch, given["hyper"], [given[name].shape for name in ("w0", "w1")])


def two_maps(torch, given):
    """Two maps with a ReLU between them."""
    nn = torch.nn
    maps = [nn.Linear(*given[name].shape) for name in ("w0", "w1")]
    with torch.no_grad():
        for i, linear in enumerate(maps):
            linear.weight.copy_(given[f"w{i}"].T)
            linear.bias.copy_(given[f"b{i}"])
    return nn.Sequential(maps[0], nn.ReLU(), maps[1])


def hypernetwork(torch, given, shapes):
    """A module: rows to scores, by a network of two maps of these shapes [in, out]."""
    sizes = [size for a, b in shapes for size in (b, a * b)]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.task, self.pieces = (
                torch.nn.Parameter(given[name].clone()) for name in ("task", "pieces")
            )
            self.maps = two_maps(torch, given)

        def forward(self, x):
            rows = torch.cat([self.task.expand(len(self.pieces), -1), self.pieces], 1)
            flat = self.maps(rows).reshape(-1)[: sum(sizes)]
            b0, w0, b1, w1 = flat.split(sizes)
            inner = torch.relu(torch.addmm(b0, x, w0.view(shapes[0])))
            return torch.addmm(b1, inner, w1.view(shapes[1]))

    return Network()


class Alone:
    """Two maps with a ReLU between them, each taught by its own loss."""

    def __init__(self, torch, given, rate, inner, compiled):
        nn = torch.nn
        self.torch, self.inner, self.rate = torch, inner, rate
        self.given, self.directions = given, (given["p0"], given["p1"])
        self.batches = list(zip(given["x"], given["labels"].long(), strict=True))
        self.wrong = given["wrong"].long()
        self.classes = given["w1"].shape[1]
        self.layers = nn.ModuleList([nn.Linear(*given[name].shape) for name in ("w0", "w1")])
        calls = (lambda h: self.layers[0](h).relu(), lambda h: self.layers[1](h))
        self.calls = [torch.compile(c, dynamic=False) if compiled else c for c in calls]
        losses = [lambda read, i=i: self.loss_of(calls[i](read), i) for i in range(2)]
        self.losses = [torch.compile(f, dynamic=False) if compiled else f for f in losses]
        self.restart()

    def restart(self):
        """Goes back to the given weights and the first batch."""
        with self.torch.no_grad():
            for i, linear in enumerate(self.layers):
                linear.weight.copy_(self.given[f"w{i}"].T)
                linear.bias.copy_(self.given[f"b{i}"])
        sgd = self.torch.optim.SGD
        self.optimizers = [sgd(m.parameters(), lr=self.rate, fused=True) for m in self.layers]
        self.position = 0

    def loss_of(self, z, i):
        """mean softplus(-theta (right - wrong)), rows of right classes before those of wrong."""
        functional = self.torch.nn.functional
        right, wrong = functional.cosine_similarity(z, self.directions[i][None]).chunk(2)
        return functional.softplus(-THETA * (right - wrong)).mean()

    def pair(self):
        """Inputs of the next batch with right classes, then with wrong ones, [2 b, in]."""
        x, labels = self.batches[self.position % len(self.batches)]
        wrong = self.wrong[self.position % len(self.wrong)]  # the tries go further than the turns
        classes = self.torch.cat([labels, wrong])
        high = x.abs().amax(1, keepdim=True).repeat(2, 1)
        mark = self.torch.nn.functional.one_hot(classes, self.classes) * high
        return self.torch.cat([mark, x[:, self.classes :].repeat(2, 1)], dim=1)

    def steps(self, count):
        """Some steps; the mean loss of the layers on the batch after them."""
        for _ in range(count):
            read = self.pair()
            for loss_of, call, optimizer in zip(
                self.losses, self.calls, self.optimizers, strict=True
            ):
                for _ in range(self.inner):
                    optimizer.zero_grad()
                    loss_of(read).backward()
                    optimizer.step()
                with self.torch.no_grad():
                    read = call(read)
            self.position += 1
        with self.torch.no_grad():
            first, second = self.calls
            z = first(self.pair())
            return (self.loss_of(z, 0).item() + self.loss_of(second(z), 1).item()) / 2
