"""Programs as read from their text, of which it is known what they compute and send."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffnlab.parallel.program import Program, Sent, read_program

MESH = Mesh(jax.devices()[:4], ("a",))
CUT = PartitionSpec("a")


def compiled(body, *shapes, out=CUT) -> str:
    """The program of a function of each device's part."""
    whole = jax.shard_map(body, mesh=MESH, in_specs=CUT, out_specs=out, check_vma=False)
    place = NamedSharding(MESH, CUT)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    return jax.jit(whole).lower(*given).compile().as_text()


def collectives(text: str) -> dict[str, Sent]:
    return read_program(text).sent


ONE = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "a", tiled=True), 8 * 6 * 4),
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), 2 * 6 * 4),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]),
        2 * 6 * 4,
    ),
}


@pytest.mark.parametrize("kind", sorted(ONE))
def test_each_kind_and_its_bytes(kind):
    body, size = ONE[kind]
    assert collectives(compiled(body, (8, 6))) == {kind: Sent(1, size)}


def test_scattered_and_exchanged():
    scattered = compiled(lambda x: jax.lax.psum_scatter(x, "a", tiled=True), (16, 6))
    (kind,) = collectives(scattered)  # a CPU may reduce and cut instead
    assert kind in ("reduce-scatter", "all-reduce")
    exchanged = compiled(lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True), (16, 6))
    assert collectives(exchanged) == {"all-to-all": Sent(1, 4 * 6 * 4)}


def test_bodies_of_loops_count_as_often_as_they_run_nested_ones_too():
    def inner(x, _):
        return jax.lax.psum(x * 2.0, "a") * 0.1, None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]), None

    found = collectives(compiled(lambda x: jax.lax.scan(outer, x, None, length=5)[0], (8, 6)))
    assert found == {"all-reduce": Sent(15, 15 * 48), "collective-permute": Sent(5, 5 * 48)}


def test_of_a_conditional_the_larger_branch_counts():
    def body(x):
        most = lambda x: jax.lax.psum(jax.lax.psum(x, "a") * 2.0, "a")  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, most, lambda x: jax.lax.psum(x, "a"), x)

    assert collectives(compiled(body, (8, 6))) == {"all-reduce": Sent(2, 96)}


def test_one_device_sends_nothing_and_text_that_is_no_program_has_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert read_program(text) == Program(64, {}) and read_program("") == Program(0, {})


def test_products_count_as_often_as_they_run_in_fusions_and_backwards():
    def loss(w, x):
        x, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=4)
        return x.sum()

    given = jnp.ones((64, 64)), jnp.ones((8, 64))
    one = 8 * 64 * 64
    forward = jax.jit(loss).lower(*given).compile().as_text()
    assert read_program(forward).multiply_adds == 4 * one
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given).compile().as_text()
    assert read_program(both).multiply_adds == 3 * 4 * one


def test_products_of_loops_of_unknown_length_are_counted_apart():
    def body(x, n):
        once = lambda x: x @ x.T @ x  # noqa: E731

        def turns(x, _):
            return jax.lax.while_loop(lambda x: x.sum() < n, once, x), None

        return jax.lax.scan(turns, once(x), None, length=3)[0]

    text = jax.jit(body).lower(jnp.ones((4, 8)), 1.0).compile().as_text()
    assert read_program(text) == Program(2 * 4 * 4 * 8, {}, varying=3 * 2 * 4 * 4 * 8)


def test_each_device_multiplies_its_share():
    cut = NamedSharding(MESH, PartitionSpec("a", None))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=cut)
    w = jax.ShapeDtypeStruct((32, 48), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec()))
    text = jax.jit(jnp.matmul).lower(x, w).compile().as_text()
    assert read_program(text) == Program(64 * 32 * 48 // 4, {})
    batched = jax.jit(lambda a, b: jnp.einsum("bij,bkj->bik", a, b))
    text = batched.lower(jnp.ones((3, 16, 32)), jnp.ones((3, 40, 32))).compile().as_text()
    assert read_program(text).multiply_adds == 3 * 16 * 40 * 32


def test_started_collectives_count_once():
    text = """HloModule m

ENTRY %main (p: f32[2,6]) -> f32[8,6] {
  %p = f32[2,6]{1,0} parameter(0)
  %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = f32[8,6]{1,0} all-gather-done(%s)
}
"""
    assert collectives(text) == {"all-gather": Sent(1, 192)}
