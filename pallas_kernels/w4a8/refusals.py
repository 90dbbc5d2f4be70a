"""Why the GPU kernels cannot run a call, without importing them."""

from pallas_kernels.w4a8.packed import Fragments


def sm90(*, codes, group, act, treatment, narrow, **_):
    """Why the Hopper kernel cannot run a call; None when it can."""
    if not isinstance(codes, Fragments):
        return "takes codes in the order of `w4a8.pack`, these are canonical"
    if group != 128:
        return f"takes groups of 128 rows, group={group}"
    if act is None and not narrow:
        return "rounds x to e4m3, act=None"
    if treatment == "table" and codes.encoding != "tc":
        return f"treatment='table' takes codes packed as 'tc', these are {codes.encoding!r}"
    return None


def sm80(*, codes, group, act, treatment, narrow, **_):
    """Why the kernel of Ampere and Ada cannot run a call; None when it can."""
    if treatment == "table":
        return "scales partial sums, treatment='table'"
    return sm90(codes=codes, group=group, act=act, treatment=treatment, narrow=narrow)
