"""Random requests over several connections, against a shadow of the disk.

random_writer.py URI SHADOW SEED ROUNDS CONNECTIONS

SHADOW is a raw file with what the disk must show now; it is left with what the disk must show at the end. A round
sends several requests at once, over all connections, none touching another's range; then reads what they touched over
one connection, and something else besides. Block status is compared with the shadow: what it calls zero must be zero.
"""
import random
import sys

import nbd

uri, shadow_path, seed, rounds, count = sys.argv[1:6]
rng = random.Random(int(seed))
with open(shadow_path, "rb") as file:
    shadow = bytearray(file.read())


def connect():
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    return handle


handles = [connect() for _ in range(int(count))]
size = handles[0].get_size()
assert size == len(shadow), f"the disk has {size} bytes, the shadow {len(shadow)}"
assert count == "1" or handles[0].can_multi_conn(), "the export does not allow several connections"
fast_zero = handles[0].can_fast_zero()


def pick_range():
    kind = rng.random()
    if kind < 0.4:
        length = 4096 * rng.randint(1, 4)
        offset = rng.randrange(0, size) // 4096 * 4096
    elif kind < 0.7:
        length = 512 * rng.randint(1, 300)
        offset = rng.randrange(0, size) // 512 * 512
    elif kind < 0.9:
        # Anything at all, where the export allows it.
        length = rng.randint(1, 200_000)
        offset = rng.randrange(0, size)
    else:
        length = rng.randint(1, 2 << 20)
        offset = rng.randrange(0, size)
    minimum = max(1, handles[0].get_block_size(nbd.SIZE_MINIMUM))
    offset = offset // minimum * minimum
    length = max(minimum, length // minimum * minimum)
    return offset, min(length, size - offset)


def settle(handle, cookie):
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)


def compare(handle, offset, length):
    data = handle.pread(length, offset)
    if data != shadow[offset:offset + length]:
        at = next(i for i in range(length) if data[i] != shadow[offset + i])
        sys.exit(f"byte {offset + at} is {data[at]:#x}, must be {shadow[offset + at]:#x} (seed {seed})")


def after_trim(handle, offset, length):
    """What a trim leaves is the old bytes or zeroes, one or the other in each sector."""
    data = handle.pread(length, offset)
    at = 0
    while at < length:
        end = min(length, (offset + at) // 512 * 512 + 512 - offset)
        piece = data[at:end]
        old = shadow[offset + at:offset + end]
        assert piece == old or not any(piece), f"trim changed byte {offset + at} into something new (seed {seed})"
        shadow[offset + at:offset + end] = piece
        at = end


def compare_status(handle, offset, length):
    seen = []

    def extents(context, at, entries, error):
        for extent, flags in zip(entries[::2], entries[1::2]):
            end = min(at + extent, size)
            if flags & nbd.STATE_ZERO and any(shadow[at:end]):
                seen.append(f"status calls {at}..{end} zero, and it is not (seed {seed})")
            at += extent
        return 0

    handle.block_status(length, offset, extents)
    assert not seen, seen


for _ in range(int(rounds)):
    under_way, taken = [], []
    for _ in range(rng.randint(1, 12)):
        offset, length = pick_range()
        if any(offset < o + n and o < offset + length for o, n in taken):
            continue
        taken.append((offset, length))
        handle = rng.choice(handles)
        kind = rng.choices(["write", "zero", "trim", "read"], [6, 2, 1, 2])[0]
        flags = nbd.CMD_FLAG_FUA if kind != "read" and rng.random() < 0.05 else 0
        if kind == "write":
            fill = rng.random()
            data = rng.randbytes(length) if fill < 0.6 else bytes([rng.randrange(256)]) * length
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            under_way.append((handle, handle.aio_pwrite(buffer, offset, flags=flags), buffer))
            shadow[offset:offset + length] = data
        elif kind == "zero":
            if rng.random() < 0.5:
                flags |= nbd.CMD_FLAG_NO_HOLE
            under_way.append((handle, handle.aio_zero(length, offset, flags=flags), None))
            shadow[offset:offset + length] = bytes(length)
        elif kind == "trim":
            settle(handle, handle.aio_trim(length, offset, flags=flags))
            after_trim(rng.choice(handles), offset, length)
        else:
            buffer = nbd.Buffer(length)
            cookie = handle.aio_pread(buffer, offset)
            settle(handle, cookie)
            assert buffer.to_bytearray() == shadow[offset:offset + length], f"read at {offset} (seed {seed})"
    if rng.random() < 0.15:
        handle = rng.choice(handles)
        under_way.append((handle, handle.aio_flush(), None))
    for handle, cookie, _ in under_way:
        settle(handle, cookie)
    if fast_zero and rng.random() < 0.1:
        offset, length = pick_range()
        try:
            handles[0].zero(length, offset, flags=nbd.CMD_FLAG_FAST_ZERO)
            shadow[offset:offset + length] = bytes(length)
        except nbd.Error as error:
            assert error.errno == "ENOTSUP", error
    for offset, length in taken:
        compare(rng.choice(handles), offset, length)
    compare(rng.choice(handles), *pick_range())
    compare_status(rng.choice(handles), *pick_range())

for offset in range(0, size, 1 << 20):
    compare(handles[0], offset, min(1 << 20, size - offset))
handles[0].flush()
for handle in handles:
    handle.shutdown()
with open(shadow_path, "wb") as file:
    file.write(shadow)
