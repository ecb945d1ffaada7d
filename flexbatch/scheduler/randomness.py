"""The random numbers of sampling: a pure function of a row's settings and of how many tokens it has generated.

Knows nothing of batches, of sweeps or of logits, so no row's sample can depend on its neighbours or on a restart.
"""

from __future__ import annotations

from hashlib import blake2b

from flexbatch.sampling import SamplingParams


def uniform(params: SamplingParams, request_id: str, position: int) -> float:
    """Return the number in [0, 1) that picks token ``position`` (tokens generated before it) of one request.

    Counter based: the 53 leading bits of a BLAKE2b hash. With ``params.seed`` it depends on seed and position alone,
    else on ``params.run_seed``, ``request_id`` and position. The three never run into each other: the two kinds of
    stream are hashed under different personalisations, and every number is written with a separator.
    """
    if params.seed is not None:
        digest = blake2b(f"{params.seed}/{position}".encode(), digest_size=8, person=b"row seed")
    else:
        # surrogatepass: an id from JSON may hold an unpaired surrogate, which is no reason to fail here.
        name = request_id.encode("utf-8", "surrogatepass")
        digest = blake2b(f"{params.run_seed}/{position}/".encode() + name, digest_size=8, person=b"run seed")
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
