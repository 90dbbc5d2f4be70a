"""The other side of `ffnlab bench analysis`: intervals of a network by torch, layer after layer.

Run by `peer_server.py`. Requests and answers; "result" names a file for what was computed:

    {"do": "load", "directory": D, "threads": n}   -> {"dtype", "threads", "versions"}
    {"do": "bounds", "result": F}                  -> {"seconds", "form"}

D holds bounds.npz: "low" and "high" of boxes [b, in], "w0", "b0", … of the maps, [in, out] and
[out], with ReLU between them. The bounds of a map are those of its center and radius,

    center @ w + b  -+  radius @ |w|

or of both signs of its entries; all boxes at once, eager or compiled. All float32.
"""

import pathlib

import numpy as np


class Tasks:
    """Answers requests.

    Attributes:
      forms: finds the fastest way to do a task (`peer_server.Forms`).
    """

    def __init__(self, forms):
        self.torch, self.forms = forms.torch, forms

    def context(self):
        """In which requests are answered."""
        return self.torch.inference_mode()

    def load(self, directory, threads):
        """Reads the network and the boxes."""
        self.forms.threads = threads
        with np.load(pathlib.Path(directory) / "bounds.npz", allow_pickle=False) as saved:
            arrays = {name: self.torch.tensor(saved[name]) for name in saved.files}
        self.low, self.high = arrays["low"], arrays["high"]
        count = sum(name.startswith("w") for name in arrays)
        self.maps = [(arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(count)]
        self.sizes = [w.abs() for w, _ in self.maps]
        self.signs = [(w.clamp(min=0), w.clamp(max=0)) for w, _ in self.maps]
        self.compiled = {
            name: self.torch.compile(form)
            for name, form in (("radius", self.by_radius), ("signs", self.by_signs))
        }
        versions = {"torch": self.torch.__version__}
        return {"dtype": "float32", "threads": threads, "versions": versions}

    def by_radius(self):
        """Center and radius of every layer."""
        low, high = self.low, self.high
        for i, ((w, b), size) in enumerate(zip(self.maps, self.sizes, strict=True)):
            center = (low + high) / 2 @ w + b
            radius = (high - low) / 2 @ size
            low, high = center - radius, center + radius
            if i < len(self.maps) - 1:
                low, high = low.relu(), high.relu()
        return low, high

    def by_signs(self):
        """Positive and negative entries of every map."""
        low, high = self.low, self.high
        for i, ((_, b), (up, down)) in enumerate(zip(self.maps, self.signs, strict=True)):
            low, high = low @ up + high @ down + b, high @ up + low @ down + b
            if i < len(self.maps) - 1:
                low, high = low.relu(), high.relu()
        return low, high

    def bounds(self, result):
        """Both ends of the logits over every box."""
        eager = {"radius": self.by_radius, "signs": self.by_signs}
        compiled = {f"{name}, compiled": form for name, form in self.compiled.items()}
        found = self.forms.fastest("bounds", "arrays", eager, compiled)
        low, high = found.pop("arrays")
        if result:
            np.savez(result, low=low.numpy(), high=high.numpy())
        return found
