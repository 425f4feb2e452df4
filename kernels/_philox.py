"""Philox4x32-10 and the normal numbers made of it, for every kernel that needs noise.

The convention is that of `mmfast.reference._philox`: key = a sample's seed, counter = (chunk, 0, sample, stream), and
the four normals of a chunk belong to elements 4 chunk to 4 chunk + 3 of the sample. Integers are equal to the
reference's bit by bit, normals to float32 rounding.

What a normal costs decides how fast 16-bit samples can be noised, so nothing here is a general function. A product is
one wide multiplication, of which both halves are used. Logarithm, sine and cosine are polynomials for arguments that
are known to lie in (0, 1]; Box and Muller's angle comes as a fraction of a turn, which needs no reduction by pi. The
key is the same for a whole program, so its additions are done once, on scalars. A first q_sample with Triton's log,
sin and cos took 58 instructions an element in bfloat16 on sm_90 (counted in its SASS), the same with these 45.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(key_low, key_high, chunk, sample, stream):
    """The four uint32 words of each chunk. Key, sample and stream are uint32 scalars."""
    c0 = chunk.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    c2 = c1 + sample
    c3 = c1 + stream
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        key_low = key_low + 0x9E3779B9
        key_high = key_high + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normals4(key_low, key_high, chunk, sample, stream):
    """The four normals of each chunk, by Box and Muller's transform."""
    w0, w1, w2, w3 = philox(key_low, key_high, chunk, sample, stream)
    r0 = tl.sqrt(_minus_2_log(_uniform(w0)))
    r1 = tl.sqrt(_minus_2_log(_uniform(w2)))
    c0, s0 = _cos_sin_turn(_uniform(w1))
    c1, s1 = _cos_sin_turn(_uniform(w3))
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def _uniform(word):
    """In (0, 1], float32: the middle of the word's interval of 2^-32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _minus_2_log(u):
    """-2 ln u of a normal float32 u, within 1e-7 of itself: u = (1 + f) 2^e with 1 + f from sqrt(1/2) to sqrt(2)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # 2^23 e
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = 0.2896437644958496 + f * -0.17919836938381195
    p = 0.3308747410774231 + f * (-0.298347532749176 + f * p)
    p = 0.5000589489936829 + f * (-0.39916834235191345 + f * p)
    p = -2.0 + f * (0.9999995827674866 + f * (-0.6666831970214844 + f * p))
    return exponent.to(tl.float32) * -1.6525917e-7 + f * p  # -2 ln 2 / 2^23


@triton.jit
def _cos_sin_turn(u):
    """cos(2 pi u) and sin(2 pi u) of u in [0, 1], within 3e-7.

    With r = |u - 1/2| - 1/4 they are sin(2 pi r) and cos(2 pi r), the latter with the sign of 1/2 - u.
    """
    v = 0.5 - u
    r = tl.abs(v) - 0.25
    q = r * r
    c = 81.60248565673828 + q * (-76.5813980102539 + q * 39.76161575317383)
    c = r * (6.2831854820251465 + q * (-41.34168243408203 + q * c))
    s = -85.45357513427734 + q * (60.14401626586914 + q * -24.98223876953125)
    s = 1.0 + q * (-19.739208221435547 + q * (64.93934631347656 + q * s))
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    return c, (s.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
