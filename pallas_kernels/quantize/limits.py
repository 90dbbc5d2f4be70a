"""Which shapes the Mosaic kernels take, without importing Pallas."""

LONGEST = 16384  # elements of a row that fit the registers of a block


def row_width(k):
    """Elements that a thread loads at once from rows of k; 0 when the kernel cannot."""
    return 0 if k > LONGEST else next((v for v in (8, 4, 2) if k % (128 * v) == 0), 0)


def group_width(n):
    """The same for rows of n columns that stay in memory."""
    return next((v for v in (4, 2) if n % (128 * v) == 0), 0)


def tokens(*, x, **_):
    """Why the kernel cannot round the rows of x; None when it can."""
    if row_width(x.shape[-1]):
        return None
    return f"takes rows of a multiple of 256 up to {LONGEST}, k={x.shape[-1]}"


def groups(*, w, **_):
    """Why the kernel cannot round w; None when it can."""
    return None if group_width(w.shape[1]) else f"takes a multiple of 256 columns, n={w.shape[1]}"
