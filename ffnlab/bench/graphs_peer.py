"""The other side of `ffnlab bench graphs`: torch's CSR product and PyTorch Geometric's layer.

Run by `peer_server.py`. Requests and answers; "result" names a file for what was computed:

    {"do": "load", "directory": D, "threads": n}   -> {"dtype", "threads", "versions"}
    {"do": "forward", "case": C, "result": F}      -> {"seconds", "form"}
    {"do": "backward", "case": C, "result": F}     -> {"seconds", "form"}
    {"do": "two_products", "case": C, "result": F} -> {"seconds", "form"}
    {"do": "train", "case": C, "rate": r}          -> {"seconds", "form", "loss"}

D holds C.npz for each case: edges sorted by receiver ("senders", "starts", those of the transpose,
the "values" of both), "x", "gradient", "labels", "w". Forward is y = A x; backward is that and A'
gradient by autograd; two products are the same by hand, with a matrix that is stored both ways. A
step is one of SGD on `GCNConv` from the same W on, with edges normalized beforehand: over edges,
eager or compiled, or over a CSR matrix. All float32.
"""

import pathlib

import numpy as np


class Tasks:
    """Answers requests.

    Attributes:
      forms: finds the fastest way to do a task (`peer_server.Forms`).
    """

    def __init__(self, forms):
        import torch_geometric

        self.torch, self.geometric, self.forms = forms.torch, torch_geometric, forms
        self.cases = {}

    def context(self):
        """In which requests are answered."""
        return self.torch.enable_grad()

    def load(self, directory, threads):
        """Reads the cases."""
        self.forms.threads = threads
        for file in sorted(pathlib.Path(directory).glob("*.npz")):
            with np.load(file, allow_pickle=False) as saved:
                self.cases[file.stem] = Case(self.torch, dict(saved))
        versions = {"torch": self.torch.__version__, "PyG": self.geometric.__version__}
        return {"dtype": "float32", "threads": threads, "versions": versions}

    def forward(self, case, result):
        """y = A x."""
        given = self.cases[case]
        forms = {
            f"CSR, {name}": lambda matrix=matrix: (matrix @ given.x,)
            for name, (matrix, _) in given.matrices.items()
        }
        return self.answer(f"forward, {case}", forms, result)

    def backward(self, case, result):
        """y = A x and its gradient, as torch finds it."""
        given = self.cases[case]
        forms = {
            f"CSR, {name}": lambda matrix=matrix: given.by_autograd(matrix)
            for name, (matrix, _) in given.matrices.items()
        }
        return self.answer(f"backward, {case}", forms, result)

    def two_products(self, case, result):
        """The same as two products."""
        given = self.cases[case]
        forms = {
            f"CSR, {name}": lambda m=matrix, other=other: (m @ given.x, other @ given.gradient)
            for name, (matrix, other) in given.matrices.items()
        }
        return self.answer(f"two products, {case}", forms, result)

    def answer(self, task, forms, result):
        """The fastest form's answer, its arrays written to a file."""
        found = self.forms.fastest(task, "arrays", forms, {})
        arrays = found.pop("arrays")
        if result:
            np.savez(result, *(array.detach().numpy() for array in arrays))
        return found

    def train(self, case, rate):
        """One step."""
        given = self.cases[case]
        if not given.learners:
            names = ("edges", "CSR", "edges, compiled")
            given.learners = {name: Learner(self, given, rate, name) for name in names}
        return self.forms.learned(f"train, {case}", given.learners, lambda x: x.step())


class Case:
    """Arrays of a case as tensors.

    Attributes:
      matrices: by the width of their indices, a CSR matrix and its transpose.
    """

    def __init__(self, torch, arrays):
        self.torch, self.learners = torch, {}
        self.x, self.gradient, self.w, self.values = (
            torch.tensor(arrays[name]) for name in ("x", "gradient", "w", "values")
        )
        self.labels = torch.tensor(arrays["labels"], dtype=torch.int64)
        self.ends = torch.tensor(
            np.stack([arrays["senders"], arrays["receivers"]]), dtype=torch.int64
        )
        sides = (
            ("starts", "senders", "values"),
            ("transposed_starts", "transposed_senders", "transposed_values"),
        )
        self.matrices = {
            str(dtype).removeprefix("torch."): [
                torch.sparse_csr_tensor(
                    torch.tensor(arrays[starts], dtype=dtype),
                    torch.tensor(arrays[columns], dtype=dtype),
                    torch.tensor(arrays[values]),
                    (len(self.x), len(self.x)),
                )
                for starts, columns, values in sides
            ]
            for dtype in (torch.int64, torch.int32)
        }

    def by_autograd(self, matrix):
        """(y, gradient of x)."""
        x = self.x.detach().requires_grad_()
        y = matrix @ x
        y.backward(self.gradient)
        return y, x.grad


class Learner:
    """A layer of its own and SGD."""

    def __init__(self, tasks, case, rate, form):
        self.torch, self.case, self.rate = tasks.torch, case, rate
        self.layer = tasks.geometric.nn.GCNConv(*case.w.shape, normalize=False)
        is_matrix = form == "CSR"
        self.edges = (case.matrices["int64"][0],) if is_matrix else (case.ends, case.values)
        compile = tasks.torch.compile if "compiled" in form else lambda layer: layer
        self.forward = compile(self.layer)
        self.restart()

    def restart(self):
        """Goes back to the given W."""
        with self.torch.no_grad():
            self.layer.lin.weight.copy_(self.case.w.T)
            self.layer.bias.zero_()
        self.optimizer = self.torch.optim.SGD(self.layer.parameters(), lr=self.rate)

    def step(self):
        """A step; the loss before it."""
        y = self.forward(self.case.x, *self.edges)
        loss = self.torch.nn.functional.cross_entropy(y, self.case.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
