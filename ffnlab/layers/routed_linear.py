"""A linear map with low-rank updates mixed for each token (LoRA-Mixer, arXiv 2507.00029)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Linear
from ffnlab.layers.routers import check_k, softmax_top_k
from ffnlab.weights import cost

__all__ = ["RoutedLinear"]


class RoutedLinear(nnx.Module):
    """y = base(x) + sum_e p_e(x) x a_e b_e,   p = softmax(router(x)).

    What is trained softly is used sharply: with k, only the k largest p of a token count, divided
    by their sum where `normalize` says so. With `task`, the expert of a row is as told. A token
    whose logits hold a NaN has no update.

    Attributes:
      base: the Linear that was there; it does not train.
      router: Linear [in, e], its output is the logits.
      lora_a: Param [e, in, r]; lora_b: Param [e, r, out]; their product is the whole update, scale
        included.
      task: [rows] int, the expert of each row of x, whatever the router says; None, as in a model
        that is saved, to ask the router.
      k: experts of a token; None for all (static).
      normalize: whether k chosen ones are divided by their sum (static).
    """

    def __init__(
        self,
        base: Linear,
        router: Linear,
        a: Float[Array, "e in r"],
        b: Float[Array, "eb rb out"],
        *,
        k: int | None = None,
        normalize: bool = True,
    ):
        d_in, d_out = base.weight.shape
        experts, rank = a.shape[0], a.shape[2]
        wanted = {"a": (experts, d_in, rank), "b": (experts, rank, d_out)}
        for name, array in (("a", a), ("b", b)):
            if array.shape != wanted[name]:
                raise ConfigError(f"{name} has shape {array.shape}, expected {wanted[name]}")
        if tuple(router.weight.shape) != (d_in, experts):
            raise ConfigError(f"router is {tuple(router.weight.shape)}, expected {(d_in, experts)}")
        if k is not None:
            check_k(k, experts)
        self.base, self.router = base, router
        rows, columns = base.w.axes
        self.lora_a = nnx.Param(a, axes=("expert", rows, None))
        self.lora_b = nnx.Param(b, axes=("expert", None, columns))
        self.task: Int[Array, "*n rows"] | None = nnx.data(None)
        self.k = k
        self.normalize = normalize

    @property
    def experts(self) -> int:
        """How many updates there are."""
        return self.router.weight.shape[1]

    def __call__(self, x: Float[Array, "b *t in"]) -> Float[Array, "b *t out"]:
        base = jax.tree.map(jax.lax.stop_gradient, self.base)
        p = self.mixture(x).astype(x.dtype)
        a, b = self.lora_a.get_value().astype(x.dtype), self.lora_b.get_value().astype(x.dtype)
        inner = jnp.einsum("...i,eir->...er", x, a) * p[..., None]
        return base(x) + jnp.einsum("...er,ero->...o", inner, b)

    def mixture(self, x: Float[Array, "b *t in"]) -> Float[Array, "b *t e"]:
        """The share of each update in the output of each token, float32."""
        if self.task is not None:
            one = jax.nn.one_hot(self.task, self.experts)
            return jnp.broadcast_to(
                one.reshape(len(one), *[1] * (x.ndim - 2), -1), (*x.shape[:-1], self.experts)
            )
        return self.mixed(self.router(x))

    def mixed(self, logits: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """The shares by the router's output, float32."""
        routing = softmax_top_k(logits, self.k or self.experts, normalize=self.normalize)
        if self.k is None:
            return routing.scores
        one = jax.nn.one_hot(routing.chosen, self.experts) * routing.weight[..., None]
        return one.sum(-2)

    def flops_per_token(self, share: None) -> float:
        """Operations of a token: base, router, and all updates (`ffnlab.models.account`)."""
        rank = self.lora_a.get_value().shape[-1]
        updates = 2 * self.experts * rank * sum(self.base.weight.shape)
        return float(cost.flops(self.base.weight) + cost.flops(self.router.weight) + updates)

    def told(self, task: Int[Array, "rows"] | None) -> "RoutedLinear":
        """This layer with the expert of each row as told; None asks the router again."""
        new = jax.tree.map(lambda leaf: leaf, self)
        if task is not None:  # a stacked layer has it for each of its layers
            ahead = self.lora_a.get_value().shape[:-3]
            task = jnp.broadcast_to(task, (*ahead, *task.shape))
        new.task = nnx.data(task)
        return new
